"""Time of a training step at batch 2 with each method, relative to torch.nn.BatchNorm.

Forward, backward and SGD of the MLP on digits and of ResNet-8 on 32x32 pictures, fresh networks,
blocks of all methods in turn in one process on one thread, medians of the ratios by round. With
``--cbn``, ResNet-20 and the ways of cross-iteration batch norm, beyond its burn-in.

    python benchmarks/training_step.py [--rounds 21] [--batch-size 2] [--cbn] [--output steps.csv]
"""

import argparse
import csv
from pathlib import Path

import torch

from anybatch.experiments.compare import DEFAULT_METHODS, machine
from anybatch.experiments.config import Run
from anybatch.experiments.data import Dataset, load
from anybatch.experiments.timing import time_steps

COLUMNS = ("network", "method", "batch", "microseconds", "ratio", "low", "high")


def pictures() -> Dataset:
    """Random pictures in the form of CIFAR-10: only their size matters here."""
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    return Dataset("random", x, y, x, y, 10)


def rows(batch_size: int, rounds: int) -> list[tuple[str, str, int, float, float, float, float]]:
    """Measure both networks.

    Args:
        batch_size: Examples in a step.
        rounds: Blocks a method.

    Returns:
        A row a network and method; low and high are the quartiles of the ratio.
    """
    found = []
    digits = load(Run())
    for model, data, source in (("mlp", digits, "digits"), ("resnet8", pictures(), "cifar10")):
        base = Run(data=source, model=model, batch_size=batch_size, augment=False, noise=0.0)
        runs = {name: base.but(method=name) for name in DEFAULT_METHODS}
        if "cbn" in runs:
            runs["cbn"] = base.but(method="cbn", options=(("burn_in", 0.0),))
        for name, time in time_steps(runs, data, rounds).items():
            microseconds = round(1e6 * time.seconds, 1)
            ratios = (round(value, 3) for value in (time.ratio, time.low, time.high))
            found.append((model, name, batch_size, microseconds, *ratios))
    return found


WAYS = {
    "cbn": (),
    "cbn, all positions": (("gradient_sample", None),),
    "cbn, the paper's": (
        ("gradient_sample", None),
        ("backward_stats", "batch"),
        ("running_stats", "batch"),
    ),
    "cbn, naive": (("order", 0),),
}


def cbn_rows(
    batch_size: int, rounds: int
) -> list[tuple[str, str, int, float, float, float, float]]:
    """Measure the ways of cross-iteration batch norm in ResNet-20.

    Args:
        batch_size: Examples in a step.
        rounds: Blocks a way.

    Returns:
        A row a way.
    """
    data = pictures()
    base = Run(data="cifar10", model="resnet20", batch_size=batch_size, augment=False, noise=0.0)
    runs = {"bn": base.but(method="bn")}
    for name, options in WAYS.items():
        runs[name] = base.but(method="cbn", options=(("burn_in", 0.0), *options))
    found = []
    for name, time in time_steps(runs, data, rounds).items():
        ratios = (round(value, 3) for value in (time.ratio, time.low, time.high))
        found.append(("resnet20", name, batch_size, round(1e6 * time.seconds, 1), *ratios))
    return found


def main() -> None:
    """Measure, print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--cbn", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    found = (cbn_rows if given.cbn else rows)(given.batch_size, given.rounds)
    print(("{:>12} " * len(COLUMNS)).format(*COLUMNS))
    for row in found:
        print(("{!s:>12} " * len(row)).format(*row))
    if given.output is not None:
        with given.output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *found])


if __name__ == "__main__":
    main()
