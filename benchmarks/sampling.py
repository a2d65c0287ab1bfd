"""Time of batch normalization sampling, relative to torch.nn.BatchNorm in the same process.

The layer alone, forward and backward, in both memory formats; then whole training steps of
ResNet-20 and ResNet-56 on 32x32 pictures at batch 128. Everything in turn, medians of the ratios
by round.

    python benchmarks/sampling.py [--rounds 21] [--ratio 0.03125] [--threads 2] [--layer] [--steps]
        [--output sampling.csv]
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import anybatch
from anybatch.experiments.compare import machine
from anybatch.experiments.config import Run
from anybatch.experiments.data import Dataset
from anybatch.experiments.timing import time_steps

SAMPLES = ("naive", "batch", "feature", "points")
SHAPES = ((32, 64, 56, 56), (128, 16, 32, 32))
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
METHODS = ("ns", "bs", "fs", "points", "vdn")
COLUMNS = ("what", "format", "method", "milliseconds", "ratio", "low", "high")
Row = tuple[str, str, str, float, float, float, float]


def layer_rows(rounds: int, ratio: float) -> list[Row]:
    """The layer alone.

    Args:
        rounds: Steps a layer, beyond the first two.
        ratio: Of the sample.

    Returns:
        A row a shape, memory format and sample.
    """
    found: list[Row] = []
    for shape in SHAPES:
        for name, memory_format in FORMATS.items():
            x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
            dy = torch.randn(shape).contiguous(memory_format=memory_format)
            norms: dict[str, nn.Module] = {"torch": nn.BatchNorm2d(shape[1])}
            for sample in SAMPLES:
                norms[sample] = anybatch.SampledBatchNorm2d(
                    shape[1], sample=sample, ratio=ratio, seed=0
                )
            times: dict[str, list[float]] = {key: [] for key in norms}
            for _ in range(rounds + 2):
                for key, norm in norms.items():
                    x.grad = None
                    start = time.perf_counter()
                    norm(x).backward(dy)
                    times[key].append(time.perf_counter() - start)
            for key, values in times.items():
                pairs = zip(values[2:], times["torch"][2:], strict=True)
                low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
                milliseconds = 1e3 * statistics.median(values[2:])
                ratios = (round(value, 3) for value in (middle, low, high))
                found.append((str(shape), name, key, round(milliseconds, 2), *ratios))
    return found


def step_rows(rounds: int, ratio: float) -> list[Row]:
    """Whole training steps.

    Args:
        rounds: Blocks a method.
        ratio: Of the sample.

    Returns:
        A row a network and method.
    """
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    data = Dataset("random", x, y, x, y, 10)
    found: list[Row] = []
    for model in ("resnet20", "resnet56"):
        base = Run(data="cifar10", model=model, batch_size=128, augment=False, noise=0.0)
        runs = {
            name: base.but(method=name, options=() if name == "vdn" else (("ratio", ratio),))
            for name in METHODS
        }
        for name, step in time_steps(runs, data, rounds).items():
            ratios = (round(value, 3) for value in (step.ratio, step.low, step.high))
            found.append((f"{model} step", "nchw", name, round(1e3 * step.seconds, 1), *ratios))
    return found


def main() -> None:
    """Measure, print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--ratio", type=float, default=1 / 32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layer", action="store_true", help="the layer alone only")
    parser.add_argument("--steps", action="store_true", help="training steps only")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    found: list[Row] = []
    if not given.steps:
        found += layer_rows(given.rounds, given.ratio)
    if not given.layer:
        found += step_rows(given.rounds, given.ratio)
    print(("{:>20} " + "{:>12} " * (len(COLUMNS) - 1)).format(*COLUMNS))
    for row in found:
        print(("{!s:>20} " + "{!s:>12} " * (len(row) - 1)).format(*row))
    if given.output is not None:
        with given.output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *found])


if __name__ == "__main__":
    main()
