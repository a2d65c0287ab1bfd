"""Gradient accumulation: do micro-batches of 2 train as the whole batch of 16 does?

The MLP on digits (or ResNet-8 on CIFAR-10), steps of 16 examples in one forward or in eight, with
torch's batch norm and with the methods of the library, over several seeds. Beside the accuracy, how
far the training loss of each epoch is from that of the whole batch with the same seed.

    python benchmarks/accumulation.py [--seeds 3] [--methods bn,cbn,mabn] [--output rows.csv]
    python benchmarks/accumulation.py --data cifar10 --root DIR --seeds 1
"""

import argparse
import csv
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from anybatch.tools.machine import machine
from anybatch.tools.run import BASELINE, Run
from anybatch.tools.training import Row, train

COLUMNS = ("setting", "accuracy", "spread", "loss_gap")


def losses(row: Row) -> list[float]:
    """The training loss of each epoch."""
    return [epoch["train_loss"] for epoch in row["epochs"]]


def measure(base: Run, seeds: int, folder: Path) -> list[Row]:
    """Train one setting with every seed."""
    found = []
    for seed in range(seeds):
        print(f"{base.label}, seed {seed}", file=sys.stderr)
        found.append(train(base.but(seed=seed), folder))
    return found


def summary(name: str, rows: list[Row], whole: list[Row]) -> tuple[str, float, float, float]:
    """Accuracy in percent, its standard deviation, and the distance of the losses."""
    accuracies = [100 * row["accuracy"] for row in rows]
    gaps = [
        statistics.mean(abs(a - b) for a, b in zip(losses(row), losses(other), strict=True))
        for row, other in zip(rows, whole, strict=True)
    ]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return name, round(statistics.mean(accuracies), 2), round(spread, 2), statistics.mean(gaps)


def main() -> None:
    """Measure, print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="bn,cbn,mabn")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    model = "mlp" if given.data == "digits" else "resnet8"
    base = Run(data=given.data, root=given.root, model=model, batch_size=16)
    parts = base.but(accumulate=8)
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        whole = measure(base, given.seeds, folder)
        rows = [
            summary("BatchNorm, 16 in one forward", whole, whole),
            summary("BatchNorm, 8 x 2", measure(parts, given.seeds, folder), whole),
        ]
        for name in given.methods.split(","):
            assert name != BASELINE
            own = measure(parts.but(method=name), given.seeds, folder)
            rows.append(summary(f"{name}, 8 x 2, accumulate", own, whole))
    print("{:<30} {:>10} {:>8} {:>10}".format(*COLUMNS))
    for name, accuracy, spread, gap in rows:
        print(f"{name:<30} {accuracy:>8.2f} % {spread:>8.2f} {gap:>10.4f}")
    if given.output is not None:
        with given.output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
