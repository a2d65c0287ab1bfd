"""What it saves that a norm does the ReLU that follows it, or the addition and the ReLU.

A layer alone, forward and backward, with a ReLU in place behind it and with an addition before
that: torch.nn.BatchNorm2d, a method's layer with the same operators behind it, and the layer that
does all of it. Whole training steps of ResNet-20 on 32x32 images: with torch's layers, converted,
and converted with ``fuse=True``. All in turn in one process, in another order each round; medians
of the times, and of the ratios by round to torch's.

    python benchmarks/fusion.py [--only layers steps] [--methods bn ...] [--shapes 32x64x56x56 ...]
        [--format contiguous channels_last] [--batch-sizes 2 32] [--rounds 15] [--threads 2]
        [--csv fusion.csv]
"""

import copy
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from harness import FORMATS, arguments, finish, sizes, start, training_step
from torch import Tensor, nn

from anybatch import convert
from anybatch.registry import METHODS
from anybatch.tools.measurements import Measurement, Setting, timed
from anybatch.tools.networks import build
from anybatch.tools.timing import Call, interleaved

SHAPES = ("32x64x56x56", "128x16x32x32", "2x64x56x56")
FOLLOWING = ("relu", "add and relu")
BASELINE = "nn.BatchNorm2d"
Way = Callable[[nn.Module, Tensor, Tensor | None], Tensor]


def behind(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """A layer with operators behind it, as residual networks write them."""
    y = layer(x)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


def inside(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """A layer that does the same by itself."""
    y: Tensor = layer(x, residual=residual, activation="relu")
    return y


def layer_rows(shape: str, form: str, methods: list[str], rounds: int) -> list[Measurement]:
    """Time layers on one shape, with all that may follow them."""
    x, r, dy = (torch.randn(sizes(shape)).contiguous(memory_format=FORMATS[form]) for _ in "xrd")
    x.requires_grad_(), r.requires_grad_()
    found = []
    for follows in FOLLOWING:
        residual = r if follows == "add and relu" else None

        def step(way: Way, layer: nn.Module, residual: Tensor | None = residual) -> Call:
            def call() -> None:
                x.grad = r.grad = None
                layer.zero_grad()
                way(layer, x, residual).backward(dy)

            return call

        calls = {BASELINE: step(behind, nn.BatchNorm2d(x.shape[1]))}
        for method in methods:
            calls[f"{method}, apart"] = step(behind, METHODS[method].build(x.shape[1], 2))
            calls[f"{method}, fused"] = step(inside, METHODS[method].build(x.shape[1], 2))
        setting = Setting("layer", f"{shape}, {follows}", form)
        found += timed(setting, interleaved(calls, rounds), BASELINE)
    return found


def step_rows(batch: int, form: str, methods: list[str], rounds: int) -> list[Measurement]:
    """Time training steps of ResNet-20."""
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=FORMATS[form])
    target = torch.randint(10, (batch,))
    plain = build("resnet20", 10, (3, 32, 32)).to(memory_format=FORMATS[form])  # type: ignore[call-overload]
    networks = {BASELINE: plain}
    for method in methods:
        networks[f"{method}, apart"] = convert(copy.deepcopy(plain), method, batch_size=batch)
        fused = convert(copy.deepcopy(plain), method, batch_size=batch, fuse=True)
        networks[f"{method}, fused"] = fused

    calls = {name: training_step(network, x, target) for name, network in networks.items()}
    setting = Setting("step", f"resnet20, batch {batch}", form)
    return timed(setting, interleaved(calls, rounds), BASELINE)


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", default=["layers", "steps"])
    parser.add_argument("--methods", nargs="+", default=["bn"], choices=METHODS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--format", nargs="+", default=tuple(FORMATS), choices=FORMATS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 32])
    given = parser.parse_args(typed)
    budget, rows = start(given), []
    torch.manual_seed(0)
    for form in given.format:
        for shape in given.shapes if "layers" in given.only else ():
            if not budget.over(f"{shape}, {form}"):
                rows += layer_rows(shape, form, given.methods, given.rounds)
        for batch in given.batch_sizes if "steps" in given.only else ():
            if not budget.over(f"batch {batch}, {form}"):
                rows += step_rows(batch, form, given.methods, given.rounds)
    return finish(rows, {}, given)


if __name__ == "__main__":
    sys.exit(main())
