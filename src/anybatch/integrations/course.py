"""What every framework's callback does: a schedule an epoch, and accumulation."""

from __future__ import annotations

from torch import nn

from anybatch.core.norm_layer import NormLayer
from anybatch.layers.control import Accumulation, accumulate
from anybatch.registry import METHODS
from anybatch.schedule import NormScheduler


class Course:
    """The layers of a network along a training that a framework runs.

    Args:
        model: The network, converted.
        total_epochs: Epochs of the whole training; None where that is not known.
        epoch: Epochs that are done.
        batches: Batches that make one optimizer step.

    Raises:
        ValueError: If the model has no layer of this library, or one with a schedule and no
            number of epochs.

    Example:
        >>> import anybatch
        >>> layer = anybatch.MomentumBatchNorm1d(3)
        >>> course = Course(nn.Sequential(layer), 10, 0, 1)
        >>> course.go_to(4)
        >>> course.scheduler.epoch
        5
    """

    def __init__(
        self, model: nn.Module, total_epochs: int | None, epoch: int, batches: int
    ) -> None:
        layers = [module for module in model.modules() if isinstance(module, NormLayer)]
        if not layers:
            raise ValueError(
                f"model: {type(model).__name__} has no anybatch layer: convert it first, for "
                'example with anybatch.convert(model, "bn")'
            )
        if total_epochs is None and any(_is_scheduled(layer) for layer in layers):
            raise ValueError(
                "total_epochs=None: the training is limited by steps or time, and its method "
                "moves with the epochs; give the callback their number"
            )
        self.scheduler: NormScheduler | None = None
        if total_epochs is not None:
            done = min(epoch, total_epochs)
            self.scheduler = NormScheduler(model, total_epochs, last_epoch=done)
        self.accumulation: Accumulation | None = None
        if batches > 1 and all(layer.step is None for layer in layers):
            self.accumulation = accumulate(model, batches)

    def go_to(self, epoch: int) -> None:
        """Tell the layers that so many epochs are done."""
        if self.scheduler is not None:
            while self.scheduler.last_epoch < min(epoch, self.scheduler.total_epochs):
                self.scheduler.step()

    def end_step(self) -> None:
        """An optimizer step is done."""
        if self.accumulation is not None:
            self.accumulation.end_step()

    def end(self) -> None:
        """Training is over: every forward is a step again."""
        if self.accumulation is not None:
            self.accumulation.remove()


def _is_scheduled(layer: NormLayer) -> bool:
    return any(type(layer) in map(method.layer, (1, 2, 3)) for method in _SCHEDULED)


_SCHEDULED = [method for method in METHODS.values() if method.scheduled]
