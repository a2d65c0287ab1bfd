"""Replayed statistics: recent inputs once more through today's network, and no extrapolation.

Cross-iteration batch normalization moves old statistics to today's weights by a polynomial, layer
by layer, and what that misses adds up. Here the inputs of the last steps are kept, and go through
the network again before each batch, without gradient; `anybatch.accumulate` joins the statistics of
both forwards. The joint statistics are those of today's weights in every layer. The price is a
forward of k - 1 batches a step.

    python -m papers.studies.replayed [--seeds 3] [--data cifar10 --root DIR] [--json rows.json]
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.layers.control import accumulate
from anybatch.tools.data import Dataset, load
from anybatch.tools.run import Run
from anybatch.tools.training import Training, prepare
from papers.studies.small_trainings import Trained, run_study, train_to_end, trained_rows


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
    return train_to_end(run, training, data)


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
    return trained_rows(
        [
            (name, run, partial(train_replayed, data=data, batches=batches))
            for name, run, batches in rows
        ],
        seeds,
    )


if __name__ == "__main__":
    run_study(__doc__ or "", table)
