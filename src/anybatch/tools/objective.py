"""The objective of a run: its batches, its loss, and the numbers a network is judged by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from anybatch.tools import classification, own_data
from anybatch.tools.data import Dataset
from anybatch.tools.run import Run

# Targets are a tensor, or anything else that `split(size)` cuts into parts.
Batches = Callable[[Run, Dataset, int], Iterator[tuple[Tensor, Any]]]
Loss = Callable[[Run, Dataset, nn.Module, Tensor, Any], Tensor]
Evaluate = Callable[[Run, nn.Module, Dataset], tuple[float | None, dict[str, float]]]
Where = Callable[[str, nn.Module], bool]
PrepareNorms = Callable[[Run, nn.Module], Where | None]


@dataclass(frozen=True)
class Objective:
    """The objective of a run.

    Attributes:
        batches: Makes the batches of an epoch from the run, its data and the epoch, from 1 on:
            examples and their targets, on the run's device. Order, noise and augmentation follow
            from seed and epoch alone.
        loss: Computes the mean loss of a network on examples of the data and their targets, with a
            gradient.
        evaluate: Takes the run, its network, which is left in evaluation mode, and the data;
            returns the mean loss on the held-out examples, None if there is none, and the numbers.
        numbers: Names of the numbers that a network is judged by, each from 0 to 1. Tables show
            the first.
        curve: Name under which stored rows keep the first number by epoch.
        units: Units in which a table may give the first number, in per cent.
        prepare_norms: Prepares a fresh network's norms for conversion; returns which norms the
            method converts, None for all.
    """

    batches: Batches
    loss: Loss
    evaluate: Evaluate
    numbers: tuple[str, ...] = ("accuracy",)
    curve: str = "accuracies"
    units: tuple[str, ...] = ("accuracy", "error")
    prepare_norms: PrepareNorms = lambda run, model: None

    @property
    def metric(self) -> str:
        """The number that tables show."""
        return self.numbers[0]


def objective(run: Run) -> Objective:
    """Return the objective of a run.

    Example:
        >>> objective(Run(data="digits")).metric
        'accuracy'
    """
    return OBJECTIVES[run.task]


def batches_from(run: Run, data: Dataset, epoch: int, count: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield `count` training batches, from the start of an epoch on into those that follow."""
    while count > 0:
        for batch in islice(objective(run).batches(run, data, epoch), count):
            count -= 1
            yield batch
        epoch += 1


def _evaluate(run: Run, model: nn.Module, data: Dataset) -> tuple[float, dict[str, float]]:
    loss, accuracy = classification.evaluate(run, model, data)
    return loss, {"accuracy": accuracy}


# Objectives by `Run.task`. Whoever has more tasks adds theirs here.
OBJECTIVES = {
    "classification": Objective(classification.batches, classification.loss, _evaluate),
    "own": Objective(own_data.batches, own_data.loss, own_data.evaluate),
}
