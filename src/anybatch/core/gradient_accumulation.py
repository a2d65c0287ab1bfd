"""Several forwards that make one optimizer step: gradient accumulation.

Within an optimizer step the weights stand still, so the statistics of its micro-batches are those
of one batch, and pool exactly. A layer's memory therefore counts optimizer steps: each micro-batch
starts from the memory that the step began with and leaves what the step would leave if it ended
there. So a step may end after any number of micro-batches; a layer has to be told only that the
next one begins.

The two batch statistics of the backward pass are the micro-batch's own, with full weight. A method
that averages them over steps averages those of a step's micro-batches first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from anybatch.backends import is_finite, is_traced
from anybatch.backends.protocol import BACKWARD, BackwardMemory
from anybatch.core.notices import NoEffectWarning

_ENDLESS = 1000  # forwards without a step of the optimizer, more than anybody accumulates
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_START = "start_"  # of a step's memory: before the names of the layer's


class StatefulLayer(Protocol):
    """A layer, as the memory of an optimizer step needs it.

    Attributes:
        num_features: Channels.
        memory: State beside torch's buffers.
        per_step_state: Names of memory that micro-batches leave alone.
        set_state: Names of memory that forwards leave alone.
    """

    num_features: int
    method_state: dict[str, Tensor]
    per_step_state: ClassVar[tuple[str, ...]]
    set_state: ClassVar[tuple[str, ...]]
    _buffers: Any

    @property
    def num_statistics(self) -> int:
        """Statistics of a group of examples."""

    def new_state(self, *shape: int) -> Tensor:
        """Zeros of the type and place of the layer's statistics."""

    def new_counter(self) -> Tensor:
        """A whole number on the layer's device."""


class AccumulatedMoments(NamedTuple):
    """The moments that an optimizer step has seen, this micro-batch included.

    Attributes:
        total: Values a channel, a number on the layer's device.
        share: The micro-batch's part of them.
        own_mean: Mean of the micro-batch, ``(C,)``; None in the uncentred form.
        earlier_mean: Mean of those before it.
    """

    total: Tensor
    share: Tensor
    own_mean: Tensor | None
    earlier_mean: Tensor | None


class StepMemory:
    """The state of a layer within an optimizer step.

    Args:
        layer: The layer.
        steps: Forwards in a step, as far as that is known.
        counts: Whether so many forwards end a step; else only `begin` does.
    """

    is_copy = False
    owner = 0  # the number of the handle that may undo it
    forwards = 0  # since the optimizer ended a step, as far as the host knows

    def __init__(self, layer: StatefulLayer, steps: int | None, counts: bool = True) -> None:
        self.steps = steps
        self.counts = counts and steps is not None
        self.tensors: dict[str, Tensor] = {}
        counter, row = layer.new_counter(), layer.new_state
        for way, width in (("", layer.num_features), (BACKWARD, layer.num_statistics)):
            self.tensors[way + "micro_batches"] = counter.clone()
            self.tensors[way + "count"] = row()
            self.tensors[way + "mean"], self.tensors[way + "var"] = row(width), row(width)
            for name, tensor in _state(layer, way):
                self.tensors[_START + name] = tensor.clone()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is none that the optimizer tells of its steps."""
        return {**self.__dict__, "is_copy": not self.counts}

    def _expect_optimizer(self) -> None:
        """Warn if nothing seems to end a step."""
        self.forwards += 1
        if self.is_copy:
            self.is_copy = False
            warning = (
                "the layers are copies of those of a network whose optimizer tells them of its "
                "steps, and nothing does here: all batches are one step. Call "
                "anybatch.accumulate(copy, optimizer=...) with the optimizer of the copy"
            )
        elif self.forwards == _ENDLESS:
            warning = (
                f"{_ENDLESS} forwards, and the optimizer has not made a step, so all of them are "
                "one. Give accumulate the optimizer whose step() is called (of a wrapper the one "
                "inside, or the other way round), or the forwards in a step"
            )
        else:
            return
        warnings.warn(f"accumulate: {warning}", NoEffectWarning, stacklevel=2)

    def begin(self) -> None:
        """The next forward is the first of an optimizer step."""
        for way in ("", BACKWARD):
            self.tensors[way + "micro_batches"].zero_()
        self.forwards = _ENDLESS  # somebody ends steps

    def apply(self, lift: Callable[[Tensor], Tensor]) -> None:
        """Move the tensors with their layer."""
        self.tensors = {name: lift(tensor) for name, tensor in self.tensors.items()}

    def load(
        self, state: Mapping[str, Tensor], prefix: str, device: torch.device | None = None
    ) -> None:
        """Take over a checkpoint's; where it has none that fits, a new step begins.

        Args:
            state: The checkpoint.
            prefix: What the names begin with there.
            device: Where tensors go that are on the meta device; None leaves them there.
        """
        if device is not None:
            self.apply(lambda t: torch.zeros_like(t, device=device) if t.is_meta else t)
        found = {name: state.get(prefix + name) for name in self.tensors}
        pairs = [(tensor, found[name]) for name, tensor in self.tensors.items()]
        if any(value is None or value.shape != tensor.shape for tensor, value in pairs):
            return self.begin()
        for tensor, value in pairs:
            assert value is not None
            tensor.copy_(value)

    def _is_first(self, way: str) -> Tensor:
        done = self.tensors[way + "micro_batches"]
        if self.steps is None or not self.counts:
            return done == 0
        return done.remainder(self.steps) == 0

    def _begins(self, way: str) -> bool:
        """The same as `_is_first`, of which a device waits."""
        done = int(self.tensors[way + "micro_batches"])
        return not (done % self.steps if self.counts and self.steps is not None else done)

    def rewind(self, layer: StatefulLayer, way: str, update: bool) -> dict[str, Tensor]:
        """Take the layer's memory back to the start of the step.

        Args:
            layer: The layer.
            way: "" for what moves in the forward pass, or `BACKWARD`.
            update: Whether state may change; if not, the layer works on copies until `leave`.

        Returns:
            What to give to `leave`.
        """
        if not self.counts and update and not way and not is_traced():
            self._expect_optimizer()
        aside: dict[str, Tensor] = {}
        if update and self.tensors["count"].is_cpu and not is_traced():
            state = dict(_state(layer, way))
            if not state:
                return aside
            both = [self.tensors[_START + name] for name in state], list(state.values())
            torch._foreach_copy_(*(both if self._begins(way) else both[::-1]))
            return aside
        first = self._is_first(way)
        for name, tensor in _state(layer, way):
            start = self.tensors[_START + name]
            rewound = torch.where(first, tensor, start)
            if update:
                start.copy_(rewound)
                tensor.copy_(rewound)
            else:
                aside[name] = tensor
                _put(layer, name, rewound)
        return aside

    def leave(self, layer: StatefulLayer, way: str, aside: dict[str, Tensor], update: bool) -> None:
        """End what `rewind` began, one micro-batch later."""
        for name, tensor in aside.items():
            _put(layer, name, tensor)
        if update:
            self.tensors[way + "micro_batches"].add_(1)

    def pool(
        self, mean: Tensor | None, var: Tensor, count: int | Tensor, update: bool
    ) -> tuple[Tensor | None, Tensor, AccumulatedMoments]:
        """Statistics of all micro-batches of the step, this one included.

        A micro-batch that is not finite has no part in those that follow.

        Args:
            mean: Mean of this one, None in the uncentred form.
            var: Biased variance, or second moment in the uncentred form.
            count: Values a channel.
            update: Whether to remember it.

        Returns:
            Mean, variance, and how they came about.
        """
        before, share = self._weigh("", count, var)
        old_mean, old_var = (self.tensors[n].to(var.dtype, copy=True) for n in ("mean", "var"))
        new_mean, new_var = mean, torch.lerp(old_var, var, share)
        if mean is not None:
            new_mean = torch.lerp(old_mean, mean, share)
            new_var = torch.addcmul(new_var, (mean - old_mean).square(), share * (1 - share))
        if update:
            self.keep("", before, count, new_mean, new_var)
        return new_mean, new_var, AccumulatedMoments(before + count, share, mean, old_mean)

    def average(
        self, way: str, first: Tensor | None, second: Tensor, count: int | Tensor, update: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Plain averages over the micro-batches of the step, this one included.

        Args:
            way: "" or `BACKWARD`.
            first: A row, or None.
            second: Another.
            count: How much this micro-batch weighs.
            update: Whether to remember it.

        Returns:
            Both averages.
        """
        before, share = self._weigh(way, count, second)
        old = (self.tensors[way + name].to(second.dtype) for name in ("mean", "var"))
        pairs = zip(old, (first, second), strict=True)
        one, two = (None if new is None else torch.lerp(kept, new, share) for kept, new in pairs)
        assert two is not None
        if update:
            self.keep(way, before, count, one, two)
        return one, two

    def _weigh(self, way: str, count: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Values seen before a micro-batch, and its share of all."""
        before = self.tensors[way + "count"].to(like.dtype).masked_fill(self._is_first(way), 0)
        return before, count / (before + count).clamp(min=1)

    def keep(
        self, way: str, before: Tensor, count: int | Tensor, mean: Tensor | None, var: Tensor
    ) -> None:
        """Keep the statistics of all micro-batches, with one of so many values, if finite."""
        finite = is_finite(var.abs()).all()
        self.tensors[way + "count"].copy_(before + count * finite)
        for name, new in (("mean", mean), ("var", var)):
            if new is not None:
                kept = self.tensors[way + name]
                kept.copy_(torch.where(finite, new, kept))


class StepBackward(NamedTuple):
    """The backward statistics of a micro-batch, averaged with those before it in the step.

    Attributes:
        layer: The layer.
        step: Its `StepMemory`.
        inner: The method's own memory of them, which counts optimizer steps.
        values: Values a channel.
        update: Whether state may change.
    """

    layer: StatefulLayer
    step: StepMemory
    inner: BackwardMemory
    values: int | Tensor
    update: bool

    def __call__(self, g: Tensor | None, psi: Tensor) -> tuple[Tensor | None, Tensor]:
        aside = self.step.rewind(self.layer, BACKWARD, self.update)
        g, psi = self.step.average(BACKWARD, g, psi, self.values, self.update)
        g, psi = self.inner(g, psi)
        self.step.leave(self.layer, BACKWARD, aside, self.update)
        return g, psi


def _state(layer: StatefulLayer, way: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a step moves, by name."""
    if not way:
        for name in _RUNNING:
            tensor = layer._buffers[name]
            if tensor is not None:
                yield name, tensor
    for name, tensor in layer.method_state.items():
        stays = name in layer.per_step_state or name in layer.set_state
        if name.startswith(BACKWARD) == bool(way) and not stays:
            yield name, tensor


def _put(layer: StatefulLayer, name: str, tensor: Tensor) -> None:
    place = layer._buffers if name in _RUNNING else layer.method_state
    place[name] = tensor


def in_loss_units(name: str, tensor: Tensor) -> bool:
    """True for memory that grows with the loss: averages of gradients."""
    counts = name.endswith("count") or not tensor.is_floating_point()
    return name.removeprefix(_START).startswith(BACKWARD) and not counts
