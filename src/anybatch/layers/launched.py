"""The autograd function around the GPU kernels."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anybatch import kernels
from anybatch.kernels.triton import MOMENTUM, RENORM, WINDOW, Recipe
from anybatch.layers.compiled import dense, is_plain
from anybatch.layers.normalize import Call, gradients, refuse_second_derivative
from anybatch.layers.partition import Partition
from anybatch.layers.statistics import Statistics

if TYPE_CHECKING:
    from anybatch.layers.base import NormLayer


class Kept(NamedTuple):
    """What a forward leaves to its backward, beside input and scale.

    Attributes:
        layer: The layer.
        launches: The kernels.
        recipe: Its method.
        cut: How the batch is cut.
        steps: Its normalization batches.
        used: Statistics that it was normalized by, see `Recipe`.
        tracked: Batches that its running statistics have seen.
        arrivals: A number on the device, 0 between launches.
        last: Whether channels are last in memory.
        pace: Weight of the newest batch; below 0 for the mean of all.
        update: Whether state may change.
    """

    layer: "NormLayer"
    launches: ModuleType
    recipe: Recipe
    cut: Partition
    steps: tuple[tuple[Any, int, int], ...]
    used: Tensor
    tracked: Tensor
    arrivals: Tensor
    last: bool
    pace: float
    update: bool

    def statistics(self) -> Statistics:
        """The statistics as the other passes take them."""
        table, kind = self.used if self.used.shape[1] > 1 else self.used[:, 0], self.recipe.kind
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
        memory = self.layer.backward_memory(chosen, None, self.update)
        return Call(chosen, self.cut.sizes, self.layer.eps, memory)


class Launched(torch.autograd.Function):
    """One call of the kernels a normalization batch forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: "NormLayer",
        recipe: Recipe,
        launches: ModuleType,
        cut: Partition,
        update: bool,
        again: bool,
    ) -> Tensor:
        columns, groups = layer.columns, len(cut.sizes)
        values = x.shape[2:].numel()
        last = values == 1 or not x.is_contiguous()
        shape = last, x.shape[1], values, x.element_size(), columns
        steps = _steps(launches, cut, *shape)
        with _on(x):
            arrivals, running, pace = _arrivals(layer, x), _running(layer), layer._number()
            y, used = torch.empty_like(x), weight.new_empty(recipe.rows, groups, columns)
            pooled = columns != layer.num_features
            own = weight.new_empty(2, groups, layer.num_features) if pooled else used
            tensors = (x, y, weight, bias, used, own, running, arrivals, recipe)
            for step in steps:
                launches.forward(*tensors, *step, pace, layer.eps, update)
        ctx.save_for_backward(x, weight)
        kept = Kept(
            layer, launches, recipe, cut, steps, used, running[2], arrivals, last, pace, update
        )
        ctx.kept = kept
        # Past `Module.__setattr__`, which looks for a parameter of the name first.
        layer.__dict__["_last"] = kept.statistics() if again else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        needs, kept = ctx.needs_input_grad, ctx.kept
        dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
        if not is_plain(dy) or kernels.is_watched():
            return *gradients(dy, x, weight, kept.call(), needs), *_REST
        with _on(x):
            dy, x = dense(dy, kept.last), dense(x, kept.last)
            dx, groups = torch.empty_like(x) if needs[0] else x, kept.used.shape[1]
            shape = (2, groups, weight.shape[0]) if groups > 1 else (2, weight.shape[0])
            slopes = weight.new_empty(shape)
            state = (kept.used, slopes, kept.tracked, kept.arrivals, kept.recipe)
            how = (kept.pace, kept.layer.eps, kept.update, needs[0])
            for step in kept.steps:
                kept.launches.backward(dy, x, dx, weight, *state, *step, *how)
            db, dw = (slopes if groups == 1 else slopes.sum(1)).unbind()
        return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None, *_REST


_REST = (None, None, None, None, None, None)  # gradients of what is no tensor


@lru_cache(maxsize=256)
def _steps(
    launches: ModuleType,
    cut: Partition,
    last: bool,
    channels: int,
    values: int,
    itemsize: int,
    columns: int,
) -> tuple[tuple[Any, int, int], ...]:
    """How each normalization batch lies in memory, its first example and its first group."""
    steps, start, group = [], 0, 0
    for size, number in zip(cut.batches, cut.steps, strict=True):
        sizes = cut.sizes[group : group + number]
        width = channels // columns
        long = launches.needs_long(sum(cut.sizes) * channels * values)
        layout = launches.Layout(last, channels, values, itemsize, sizes, width, long)
        steps.append((layout, start, group))
        start, group = start + size, group + number
    return tuple(steps)


def _arrivals(layer: "NormLayer", x: Tensor) -> Tensor:
    """A number on the device, 0 between launches, of the layer alone: streams share none."""
    if layer._arrivals is None or layer._arrivals.device != x.device:
        layer._arrivals = torch.zeros((), dtype=torch.int64, device=x.device)
    return layer._arrivals


def _running(layer: "NormLayer") -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics and the number of batches."""
    names = "running_mean", "running_var", "num_batches_tracked"
    mean, var, tracked = (layer._buffers[name] for name in names)
    assert mean is not None and var is not None and tracked is not None
    return mean, var, tracked


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """The device of a tensor, to launch on."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
