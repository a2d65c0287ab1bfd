"""Schedule and gradient accumulation along a training that a framework runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from anybatch.core.norm_layer import NormLayer
from anybatch.layers.control import Accumulation, check_joinable, join_forwards, select
from anybatch.layers.loss_scale import set_loss_scale
from anybatch.registry import METHODS, get_method
from anybatch.schedule import NormScheduler


class Course:
    """Layers of a network along a training that a framework runs.

    A step of the layers ends with the optimizer's step (`end_step`), after any number of forwards.
    A course that an exception cut off is ended by the next one on the same network and, with
    `is_running`, by the network's next forward or ``state_dict()``.

    Args:
        model: A converted network.
        total_epochs: Epochs of the whole training; None where that is not known.
        epoch: Epochs that are done.
        is_running: Whether the training goes on (default None: somebody calls `end` at its end).

    Raises:
        ValueError: If the model has no layer of this library, or one with a schedule and no
            number of epochs.

    Example:
        >>> import anybatch
        >>> layer = anybatch.MomentumBatchNorm1d(3)
        >>> course = Course(nn.Sequential(layer), 10, 0)
        >>> course.go_to(4)
        >>> course.scheduler.epoch
        5
    """

    def __init__(
        self,
        model: nn.Module,
        total_epochs: int | None,
        epoch: int,
        is_running: Callable[[], bool] | None = None,
    ) -> None:
        layers = select(model, None)
        if total_epochs is None and any(_is_scheduled(layer) for layer in layers):
            raise ValueError(
                "total_epochs=None: the training is limited by steps or time, and its method "
                "moves with the epochs; give the callback their number"
            )
        for layer in layers:
            if layer in _courses:  # cut off by an exception
                _courses[layer].end()
        self.model = model
        self.scheduler: NormScheduler | None = None
        if total_epochs is not None:
            done = min(epoch, total_epochs)
            self.scheduler = NormScheduler(model, total_epochs, last_epoch=done)
        self.accumulation: Accumulation | None = None
        self._layers = layers
        self._accumulates = all(layer.step is None for layer in layers)  # else its owner does
        self._is_running = is_running
        self._batches = 1
        self._hooks: list[Any] = []

    def begin_batch(self, batches: int) -> None:
        """A batch begins, one of `batches` of its optimizer step.

        Raises:
            ValueError: If a layer cannot join batches.
        """
        if not self._accumulates or batches == self._batches:
            return
        if self.accumulation is not None:
            self._separate()
        self._batches = batches
        if batches == 1:
            return
        self.accumulation = join_forwards(self.model, batches)
        for layer in self._layers:
            _courses[layer] = self
        if self._is_running is not None and not self._hooks:
            hook = _AbortHook(self)
            self._hooks = [
                self.model.register_forward_pre_hook(hook),
                self.model.register_state_dict_pre_hook(hook),
            ]

    def check_joinable(self) -> None:
        """Raise ValueError if a layer cannot join batches, before any of them is trained on."""
        if self._accumulates:
            check_joinable(self.model)

    def go_to(self, epoch: int) -> None:
        """Tell the layers that so many epochs are done."""
        if self.scheduler is not None:
            while self.scheduler.last_epoch < min(epoch, self.scheduler.total_epochs):
                self.scheduler.step()

    def end_step(self) -> None:
        """An optimizer step is done."""
        if self.accumulation is not None:
            self.accumulation.end_step()

    def follow(self, scaler: Any) -> None:
        """Rescale what layers have averaged of gradients to the scale of a framework's scaler.

        Args:
            scaler: A ``torch.amp.GradScaler`` that the framework updates; None where it has none.
        """
        set_loss_scale(self.model, 1.0 if scaler is None else scaler.get_scale())

    def end(self) -> None:
        """Training is over: every forward is a step again."""
        if self.accumulation is not None:
            self._separate()
        self._remove_hooks()
        set_loss_scale(self.model, 1.0)

    def end_if_aborted(self, remove: bool) -> None:
        """End a course whose training no longer runs; torch forbids some hooks to `remove` any."""
        if self._is_running is None or self._is_running():
            return
        if self.accumulation is not None:
            self._separate()
        if remove:
            self._remove_hooks()

    def _separate(self) -> None:
        assert self.accumulation is not None
        self.accumulation.remove()
        self.accumulation, self._batches = None, 1
        for layer in self._layers:
            _courses.pop(layer, None)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _AbortHook:
    """Hook of a network that ends a course whose training no longer runs; copies do nothing."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def __call__(self, model: nn.Module, *args: Any) -> None:
        self.course.end_if_aborted(remove=len(args) == 1)  # a forward's; a state_dict has two

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _do_nothing

    def __reduce__(self) -> Any:
        return _nothing, ()


def _do_nothing(*_: Any) -> None:
    pass


def _nothing() -> Callable[..., None]:
    return _do_nothing


def check_method(method: str | None, options: Mapping[str, Any]) -> None:
    """Raise for an unknown method, and for options without one."""
    if method is not None:
        get_method(method)
    elif options:
        raise ValueError(f"options {', '.join(options)} are of a method: give method=, too")


def caller_is_running(package: str) -> Callable[[], bool]:
    """A function that tells whether the outermost calling function of a package still runs.

    Args:
        package: Start of the names of its modules.

    Returns:
        The function; in another thread than this one it answers yes.
    """
    frame, code, thread = sys._getframe(1), None, threading.get_ident()
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(package):
            code = frame.f_code
        frame = frame.f_back  # type: ignore[assignment]

    def is_running() -> bool:
        if threading.get_ident() != thread:
            return True
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        return frame is not None

    return is_running


def _is_scheduled(layer: NormLayer) -> bool:
    return any(type(layer) in map(method.layer, (1, 2, 3)) for method in _SCHEDULED)


_courses: WeakKeyDictionary[NormLayer, Course] = WeakKeyDictionary()
_SCHEDULED = [method for method in METHODS.values() if method.scheduled]
