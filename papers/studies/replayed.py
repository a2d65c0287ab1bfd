"""Replayed statistics: recent inputs once more through today's network, and no extrapolation.

Cross-iteration batch normalization moves old statistics to today's weights by a polynomial, layer
by layer, and what that misses adds up. Here the inputs of the last steps are kept, and go through
the network again before each batch, without gradient; `anybatch.accumulate` joins the statistics of
both forwards. The joint statistics are those of today's weights in every layer. The price is a
forward of k - 1 batches a step.

    python -m papers.studies.replayed [--seeds 3] [--data cifar10 --root DIR] [--json rows.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.core.files import write_json
from anybatch.layers.control import accumulate
from anybatch.tools.data import Dataset, load
from anybatch.tools.machine import machine
from anybatch.tools.run import Run
from anybatch.tools.training import Training, prepare, train_epoch


class Trained(NamedTuple):
    """A trained network.

    Attributes:
        accuracy: On the held-out examples, from 0 to 1.
        seconds: Of training.
    """

    accuracy: float
    seconds: float


def train_replayed(run: Run, data: Dataset, batches: int) -> Trained:
    """Train with the statistics of so many batches, the older of them replayed.

    Args:
        run: A run of a method whose statistics pool, such as "bn".
        data: Its data.
        batches: Batches whose statistics are joined, the current one included; 1 replays none.
    """
    training = prepare(run, data)
    if batches > 1:
        training = training._replace(loss=_replaying(training, batches))
    rows = [train_epoch(run, training, data, epoch + 1) for epoch in range(run.epochs)]
    return Trained(rows[-1]["accuracy"], sum(row["seconds"] for row in rows))


def _replaying(training: Training, batches: int) -> Callable[[Tensor, Any], Tensor]:
    """The loss of a training that replays old inputs before each batch."""
    joined, kept = accumulate(training.model, 2), deque[Tensor](maxlen=batches - 1)

    def loss(x: Tensor, y: Any) -> Tensor:
        joined.end_step()  # the last one may have had nothing to replay
        replay(training, kept)
        kept.append(x)
        return training.loss(x, y)

    return loss


@torch.no_grad()
def replay(training: Training, kept: deque[Tensor]) -> None:
    """Run old inputs through the network, as the first forward of an optimizer step."""
    if kept:
        training.model(torch.cat(list(kept)))


def table(base: Run, seeds: int) -> list[dict[str, Any]]:
    """Train every row with every seed."""
    data = load(base)
    rows: list[tuple[str, Run, int]] = [
        ("BN, 16", base.but(method="bn", batch_size=16), 1),
        ("BN, 2", base.but(method="bn"), 1),
        ("BN, 2, of 8 batches", base.but(method="bn"), 8),
        ("BN, 2, of 16 batches", base.but(method="bn"), 16),
        ("CBN, 2", base.but(method="cbn", options=(("burn_in", 0.0),)), 1),
        ("MABN, 2", base.but(method="mabn"), 1),
    ]
    found = []
    for name, run, batches in rows:
        trained = []
        for seed in range(seeds):
            print(f"{name}, seed {seed}", file=sys.stderr)
            trained.append(train_replayed(run.but(seed=seed), data, batches))
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


def main() -> None:
    """Measure, print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
        print("{row:<22} {accuracy:>5} ± {spread:<5} {seconds:>6} s".format(**row))
    if given.json is not None:
        write_json(given.json, {"rows": rows, "made_with": machine()})


if __name__ == "__main__":
    main()
