"""Small trainings with several seeds: accuracy, spread and seconds of each row of a table."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anybatch.core.files import write_json
from anybatch.tools.data import Dataset
from anybatch.tools.machine import machine
from anybatch.tools.run import Run
from anybatch.tools.training import Training, train_epoch


class Trained(NamedTuple):
    """A trained network.

    Attributes:
        accuracy: On the held-out examples, from 0 to 1.
        seconds: Of training.
    """

    accuracy: float
    seconds: float


Train = Callable[[Run], Trained]


def train_to_end(run: Run, training: Training, data: Dataset) -> Trained:
    """Train a prepared network for all epochs."""
    rows = [train_epoch(run, training, data, epoch + 1) for epoch in range(run.epochs)]
    return Trained(rows[-1]["accuracy"], sum(row["seconds"] for row in rows))


def trained_rows(rows: Sequence[tuple[str, Run, Train]], seeds: int) -> list[dict[str, Any]]:
    """Train every row, given by its name, run and training, with every seed."""
    found = []
    for name, run, train in rows:
        trained = []
        for seed in range(seeds):
            print(f"{name}, seed {seed}", file=sys.stderr)
            trained.append(train(run.but(seed=seed)))
        accuracies = [100 * one.accuracy for one in trained]
        found.append(
            {
                "row": name,
                "accuracy": round(statistics.fmean(accuracies), 1),
                "spread": round(statistics.stdev(accuracies), 1) if seeds > 1 else 0.0,
                "seconds": round(statistics.fmean(one.seconds for one in trained), 1),
            }
        )
    return found


def run_study(description: str, table: Callable[[Run, int], list[dict[str, Any]]]) -> None:
    """Read the command line, make a study's table, print it, and write it where asked to."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = "mlp" if given.data == "digits" else "resnet8"
    size = None if given.data == "digits" else 10000
    base = Run(data=given.data, root=given.root, model=model, batch_size=2, train_size=size)
    rows = table(base, given.seeds)
    for row in rows:
        print("{row:<24} {accuracy:>5} ± {spread:<5} {seconds:>6} s".format(**row))
    if given.json is not None:
        write_json(given.json, {"rows": rows, "made_with": machine()})
