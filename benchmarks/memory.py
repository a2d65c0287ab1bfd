"""Memory with each method, relative to torch.nn.BatchNorm: kept for backward, and at most.

Of a layer alone, forward and backward, beside the same layers as in layers.py; then of a training
step of whole networks, with the arguments of training_step.py.

    python benchmarks/memory.py [--networks resnet20 ...] [--csv memory.csv] [--layers-csv ...]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import training_step
from harness import FORMATS, SHAPES, finish, reason
from torch import nn

import layers
from anybatch.tools.measurements import Measurement, Setting, counted
from anybatch.tools.memory import kept_bytes, peak_bytes, tensors_of


def layer_rows(
    shape: str, form: str, names: Sequence[str], device: torch.device
) -> tuple[list[Measurement], dict[str, str]]:
    """What layers keep and hold at most on one shape, and why of those that could not be asked."""
    x, dy = layers.data(shape, form, "float32", device)
    kept: dict[str, int | None] = {}
    peak: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    made = layers.makers(names, x.shape[0], x.shape[1], device, x.dtype)
    for name, make in made.items():
        try:
            layer = make().to(device).train()
            call = layers.call_of(layer, layers.forward_of(name, layer), x, dy)
            call()
            kept[name] = kept_bytes(lambda layer=layer: layer(x), tensors_of(layer))
            clear(x, layer)
            peak[name] = peak_bytes(call, device)
        except Exception as error:  # one that cannot run here must not stop the others
            failed[f"{name} on {shape}, {form}"] = reason(error)
        clear(x, layer)
    rows = counted(Setting("kept", shape, form), kept, layers.BASELINE)
    return rows + counted(Setting("peak", shape, form), peak, layers.BASELINE), failed


def clear(x: torch.Tensor, layer: nn.Module) -> None:
    """Gradients of the call before would be given back in the next."""
    x.grad = None
    layer.zero_grad()


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--layers-csv", type=Path)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    usual = [n for n in (*layers.METHOD_NAMES, *layers.PEERS) if not n.startswith("compiled")]
    parser.add_argument("--layers", nargs="+", default=usual)
    parser.add_argument("--device", default="cpu")
    own, rest = parser.parse_known_args(typed)
    rows: list[Measurement] = []
    failed: dict[str, str] = {}
    for form in FORMATS:
        for shape in own.shapes:
            more, why = layer_rows(shape, form, own.layers, torch.device(own.device))
            rows, failed = rows + more, failed | why
    status = finish(rows, failed, argparse.Namespace(csv=own.layers_csv, device=own.device))
    return status | training_step.main([*rest, "--device", own.device], ("kept", "peak"))


if __name__ == "__main__":
    sys.exit(main())
