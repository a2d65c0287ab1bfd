"""The effect of the moving average's weight on sampled statistics.

Source: bn-sampling, appendix D and figure 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from anybatch.conversion.norm_types import is_batch_norm
from anybatch.evaluation.recalibration import recalibrate
from anybatch.tools.classification import batches, evaluate
from anybatch.tools.data import Dataset
from anybatch.tools.run import Run
from anybatch.tools.training import prepare, step

MOMENTA = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Average:
    """Running statistics with one weight of the newest batch.

    Attributes:
        momentum: That weight.
        mean_error: Distance of the running mean from the population's by the norm of the standard
            deviation, root mean square over the layers.
        var_error: Distance of the running variance by the norm of the variance, the same.
        loss: On the held-out examples.
        accuracy: On the held-out examples, from 0 to 1.
    """

    momentum: float
    mean_error: float
    var_error: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Averages:
    """Results of one network with running statistics of every weight.

    Attributes:
        method: It was trained with.
        rows: One a weight.
        loss: Held-out loss with the population's statistics.
        accuracy: Held-out accuracy with them.
    """

    method: str
    rows: tuple[Average, ...]
    loss: float
    accuracy: float

    @property
    def best(self) -> Average:
        """The weight with the lowest held-out loss."""
        return min(self.rows, key=lambda row: row.loss)


def moving_average_influence(
    run: Run, data: Dataset, *, momenta: Sequence[float] = MOMENTA, population: int = 16
) -> Averages:
    """Train a network once, keep running statistics with every weight, and judge each of them.

    ::

        running = (1 - momentum) * running + momentum * (mean_S or var_S)                  (eq. 8)

    Running statistics have no part in training, so that one training serves all weights. They
    start from 0 and 1, as torch's do. The truth is what `anybatch.recalibrate` finds with the final
    weights on batches of training.

    Args:
        run: How to train.
        data: Its data.
        momenta: Weights of the newest batch.
        population: Batches behind the population's statistics, at most.

    Returns:
        The averages.

    Raises:
        ValueError: For a weight that is not above 0 and at most 1.

    Source: bn-sampling, appendix D, equations 8 and 9, figure 10. The figure's axis is read as the
    weight of the old average: its text calls 0.9 the usual value.
    """
    for momentum in momenta:
        if not 0 < momentum <= 1:
            raise ValueError(f"momenta={tuple(momenta)}: give numbers above 0, up to 1")
    training = prepare(run, data)
    norms: list[Any] = [m for m in training.model.modules() if is_batch_norm(m)]
    tracked = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    averages = {momentum: [t.clone() for t in tracked] for momentum in momenta}
    for norm in norms:
        norm.momentum = 1.0  # running statistics are then those of the last batch
    for epoch in range(1, run.epochs + 1):
        training.model.train()
        for x, y in batches(run, data, epoch):
            step(run, training, x, y)
            training.learning_rate.step()
            for momentum, average in averages.items():
                torch._foreach_lerp_(average, tracked, momentum)
        if training.progress is not None:
            training.progress.step()
    some = [x for x, _ in islice(batches(run, data, run.epochs + 1), population)]
    recalibrate(training.model, some, progress=False)
    truth = [t.clone() for t in tracked]
    loss, accuracy = evaluate(run, training.model, data)
    rows = []
    for momentum, average in averages.items():
        for mine, value in zip(tracked, average, strict=True):
            mine.copy_(value)
        errors = _distances(average, truth)
        rows.append(Average(momentum, *errors, *evaluate(run, training.model, data)))
    return Averages(run.method, tuple(rows), loss, accuracy)


def _distances(found: list[Tensor], truth: list[Tensor]) -> tuple[float, float]:
    """Errors of running means and variances, root mean square over the layers."""
    means, variances = [], []
    pairs = list(zip(found, truth, strict=True))
    for (mean, true_mean), (var, true_var) in zip(pairs[::2], pairs[1::2], strict=True):
        means.append(float((mean - true_mean).square().sum() / true_var.sum()))
        variances.append(float((var - true_var).square().sum() / true_var.square().sum()))
    return fmean(means) ** 0.5, fmean(variances) ** 0.5
