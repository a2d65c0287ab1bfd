"""The autograd function around the GPU kernels."""

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anybatch import backends
from anybatch.backends.protocol import MOMENTUM, RENORM, WINDOW, Course
from anybatch.core.autograd import Call, gradients, refuse_second_derivative
from anybatch.core.compiled import is_plain
from anybatch.core.statistics import Statistics

if TYPE_CHECKING:
    from anybatch.core.norm_layer import NormLayer


class Kept(NamedTuple):
    """What a forward leaves to its backward, beside input and scale.

    Attributes:
        layer: The layer.
        launches: The kernels.
        course: How they go through the batch.
        used: Statistics that it was normalized by, see `anybatch.backends.protocol.Recipe`.
        tracked: Batches that its running statistics have seen.
        arrivals: A number on the device, 0 between launches.
    """

    layer: "NormLayer"
    launches: ModuleType
    course: Course
    used: Tensor
    tracked: Tensor
    arrivals: Tensor

    def statistics(self) -> Statistics:
        """The statistics as the other passes take them."""
        table, kind = (
            self.used if self.used.shape[1] > 1 else self.used[:, 0],
            self.course.recipe.kind,
        )
        mean, var = table[0], table[1]
        if kind == RENORM:
            return Statistics(mean, var, table[2], table[3])
        if kind == MOMENTUM:
            return Statistics(mean, var, center=table[2], share=table[3])
        if kind == WINDOW:
            return Statistics(None, var, table[2], own=table[3, ..., :1] > 0)
        return Statistics(mean, var)

    def call(self) -> Call:
        """The forward as the other passes take it."""
        chosen = self.statistics()
        memory = self.layer.backward_memory(chosen, None, self.course.update)
        return Call(chosen, self.course.cut[0], self.layer.eps, memory)


class Launched(torch.autograd.Function):
    """One call of the kernels a normalization batch forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: "NormLayer",
        launches: ModuleType,
        course: Course,
        again: bool,
    ) -> Tensor:
        arrivals, running = _arrivals(layer, x), running_of(layer)
        y: Tensor
        y, used = launches.forward(x, weight, bias, running, course, arrivals)
        ctx.save_for_backward(x, weight)
        ctx.kept = kept = Kept(layer, launches, course, used, running[2], arrivals)
        # Past `Module.__setattr__`, which looks for a parameter of the name first.
        layer.__dict__["_last"] = kept.statistics() if again else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        needs, kept = ctx.needs_input_grad, ctx.kept
        dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
        if not is_plain(dy) or backends.is_watched():
            return *gradients(dy, x, weight, kept.call(), needs), *_REST
        last = kept.course.last
        dy, x = backends.dense(dy, last), backends.dense(x, last)
        state = (kept.used, kept.tracked, kept.course, needs[0], kept.arrivals)
        dx, (db, dw) = kept.launches.backward(dy, x, weight, *state)
        return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None, *_REST


_REST = (None, None, None, None)  # gradients of what is no tensor


def _arrivals(layer: "NormLayer", x: Tensor) -> Tensor:
    """A number on the device, 0 between launches, of the layer alone: streams share none."""
    if layer._arrivals is None or layer._arrivals.device != x.device:
        layer._arrivals = torch.zeros((), dtype=torch.int64, device=x.device)
    return layer._arrivals


def running_of(layer: "NormLayer") -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics and the number of batches."""
    names = "running_mean", "running_var", "num_batches_tracked"
    mean, var, tracked = (layer._buffers[name] for name in names)
    assert mean is not None and var is not None and tracked is not None
    return mean, var, tracked
