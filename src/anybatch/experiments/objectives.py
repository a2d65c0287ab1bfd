"""What a run learns on its data: its batches, its loss, and the numbers it is judged by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from anybatch.experiments import classification, detection, segmentation
from anybatch.experiments.average_precision import NUMBERS
from anybatch.experiments.config import Run
from anybatch.experiments.data import Dataset

# Targets are a tensor, or what else can be split into those of some of the examples.
Batches = Callable[[Run, Dataset, int], Iterator[tuple[Tensor, Any]]]
Loss = Callable[[Run, nn.Module, Tensor, Any], Tensor]
Evaluate = Callable[[Run, nn.Module, Dataset], tuple[float | None, dict[str, float]]]


@dataclass(frozen=True)
class Objective:
    """What a run learns.

    Attributes:
        numbers: What a network is judged by, each from 0 to 1: names in the rows of an epoch and of
            a result. The first is what tables are of.
        curve: Name of the first number's values by epoch, in the rows that are stored.
        units: What a table may give of the first number, in per cent.
        batches: Makes the batches of an epoch from a run, its data, and the epoch from 1 on:
            examples and their targets, on the run's device. Order, noise and augmentation follow
            from seed and epoch alone.
        loss: Mean loss of a run's network on examples and their targets, with a gradient.
        evaluate: Takes a run, its network, which is left in evaluation mode, and the data; gives
            the mean loss on the held-out examples, None where there is none, and the numbers.
    """

    numbers: tuple[str, ...]
    curve: str
    units: tuple[str, ...]
    batches: Batches
    loss: Loss
    evaluate: Evaluate

    @property
    def metric(self) -> str:
        """The number that tables are of."""
        return self.numbers[0]


def objective(run: Run) -> Objective:
    """What a run learns on its data.

    Args:
        run: The run; its data decide.

    Returns:
        The objective.

    Example:
        >>> objective(Run(data="digits")).metric
        'accuracy'
    """
    found = _OBJECTIVES[run.task]
    if detection.finds_masks(run):
        found = replace(found, numbers=(*found.numbers, *(f"mask_{n}" for n in found.numbers)))
    return found


def _classified(run: Run, model: nn.Module, data: Dataset) -> tuple[float, dict[str, float]]:
    loss, accuracy = classification.evaluate(run, model, data)
    return loss, {"accuracy": accuracy}


_OBJECTIVES = {
    "classification": Objective(
        numbers=("accuracy",),
        curve="accuracies",
        units=("accuracy", "error"),
        batches=classification.batches,
        loss=classification.loss,
        evaluate=_classified,
    ),
    "segmentation": Objective(
        numbers=("mean_iou", "pixel_accuracy"),
        curve="mean_ious",
        units=("mean IoU",),
        batches=segmentation.batches,
        loss=segmentation.loss,
        evaluate=segmentation.evaluate,
    ),
    "detection": Objective(
        numbers=NUMBERS,
        curve="average_precisions",
        units=("AP",),
        batches=detection.batches,
        loss=detection.loss,
        evaluate=detection.evaluate,
    ),
}
