"""The autograd function around the compiled kernels of a CPU."""

from functools import lru_cache
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anybatch import kernels
from anybatch.layers.normalize import refuse_second_derivative
from anybatch.layers.partition import Partition
from anybatch.layers.statistics import Statistics, stack

if TYPE_CHECKING:
    from anybatch.layers.base import NormLayer

Array = Any  # numpy's; the library does not import numpy


class ForwardArrays(NamedTuple):
    """One normalization batch as the compiled kernels take it.

    Attributes:
        x: Input, ``(N, C, L)``, or ``(N, L, C)`` where channels are `last`.
        y: Output, to be written.
        last: Whether channels are.
        starts: Where groups of examples begin, and the end.
        weight: Scale.
        bias: Shift.
        parts: Threads.
        relu: Whether a ReLU follows.
        added: What is added before it, like `x`; empty for nothing.
    """

    x: Array
    y: Array
    last: bool
    starts: Array
    weight: Array
    bias: Array
    parts: int
    relu: bool
    added: Array


class BackwardArrays(NamedTuple):
    """One normalization batch of the backward pass, see `ForwardArrays`.

    Attributes:
        dy: Gradient of the output.
        x: Input.
        dx: Gradient of the input, to be written where it is `wanted`.
        last: Whether channels are.
        starts: Where groups of examples begin, and the end.
        weight: Scale.
        dw: Gradient of the scale, to be written.
        db: Gradient of the shift, to be written.
        wanted: Whether the input needs a gradient.
        parts: Threads.
        relu: Whether a ReLU followed.
        y: Its output; empty without one.
        g_added: Gradient of what was added before it, to be written; empty where none is wanted.
    """

    dy: Array
    x: Array
    dx: Array
    last: bool
    starts: Array
    weight: Array
    dw: Array
    db: Array
    wanted: bool
    parts: int
    relu: bool
    y: Array
    g_added: Array


class Kept(NamedTuple):
    """Statistics of one normalization batch as arrays of the compiled kernels, see `Statistics`.

    Attributes:
        used: Rows of mean and variance, ``(2, G, K)``, or of r and d as well, ``(4, G, K)``.
        centers: Centres ``(G, K)`` of the groups' own variances, where they are not the means.
        share: Part of the groups' own statistics in those used.
        own: Whether the backward statistics are the batch's own.
        centered: Whether there is a mean.
        ends: Values ``(2, C)`` at or beyond which another spread than the standard deviation moves
            with a value.
    """

    used: Array
    centers: Array | None = None
    share: float = 1.0
    own: bool = True
    centered: bool = True
    ends: Array | None = None

    def statistics(self, like: Tensor) -> Statistics:
        """The same as tensors, for a forward that is computed again."""
        tables = torch.from_numpy(self.used).to(like.dtype)
        mean, var, r, d = (*tables, None, None)[:4]
        center = None if self.centers is None else torch.from_numpy(self.centers).to(like.dtype)
        row = [mean if self.centered else None, var, r, d if self.centered else None, center]
        if var.shape[0] == 1:
            row = [None if table is None else table[0] for table in row]
        mean, var, r, d, center = row
        assert var is not None
        return Statistics(mean, var, r, d, center, self.share, torch.tensor(self.own))


def as_statistics(kept: list[Kept], like: Tensor) -> Statistics:
    """Those of the successive normalization batches of a forward, as one table."""
    parts = [step.statistics(like) for step in kept]
    return parts[0] if len(parts) == 1 else stack(parts)


class _Step(NamedTuple):
    """The examples of a normalization batch, and the sizes of its groups."""

    rows: slice
    sizes: tuple[int, ...]


@lru_cache(maxsize=256)
def _steps(cut: Partition) -> tuple[_Step, ...]:
    ends, groups = list(accumulate(cut.batches)), list(accumulate(cut.steps))
    return tuple(
        _Step(slice(end - size, end), cut.sizes[group - number : group])
        for end, size, group, number in zip(ends, cut.batches, groups, cut.steps, strict=True)
    )


class Compiled(torch.autograd.Function):
    """One compiled call a normalization batch forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        how: "tuple[NormLayer, ModuleType, Partition, bool, bool]",
    ) -> Tensor:
        layer, loops, cut, update, relu = how
        y: Tensor = loops.empty_like(x)
        last = not x.is_contiguous()
        x_, y_, parts = _flat(x.detach(), last), _flat(y, last), loops.parts(x.numel())
        added_ = nothing = loops.nothing(x_.dtype)
        if added is not None:
            added_ = _flat(ordered(added.detach().resolve_neg(), last), last)
        w, b = loops.read(weight), loops.read(bias)
        steps, kept = _steps(cut), []
        for rows, sizes in steps:
            some = (x_, y_) if len(steps) == 1 else (x_[rows], y_[rows])
            more = nothing if added is None else added_[rows]
            arrays = ForwardArrays(*some, last, loops.cut(sizes), w, b, parts, relu, more)
            kept.append(layer.fused(loops, arrays, update))
        if relu:  # whose mask is the sign of its output
            ctx.save_for_backward(x, weight, y)
        else:
            ctx.save_for_backward(x, weight)
        ctx.kept = layer.__dict__["_last"] = kept  # past the checks of a module
        ctx.layer, ctx.loops, ctx.cut, ctx.last, ctx.update = layer, loops, cut, last, update
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight, *activated = ctx.saved_tensors
        needs, adds = ctx.needs_input_grad, ctx.needs_input_grad[3]
        if not is_plain(dy) or kernels.is_watched():
            dy = dy.to(x.dtype)
            for y in activated:
                dy = dy.masked_fill(y <= 0, 0)
            statistics = as_statistics(ctx.kept, x)
            given = (dy, x, weight, statistics, ctx.cut, needs, ctx.update)
            return *ctx.layer.gradients(*given), dy if adds else None, None
        last, loops, steps = ctx.last, ctx.loops, _steps(ctx.cut)
        dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
        dy, x = ordered(dy, last), ordered(x.detach(), last)
        dx, one, parts = loops.empty_like(x), len(steps) == 1, loops.parts(x.numel())
        dy_, x_, dx_ = _flat(dy, last), _flat(x, last), _flat(dx, last)
        y_ = g_ = nothing = loops.nothing(x_.dtype)
        g = None
        if activated:
            y_ = _flat(ordered(activated[0].detach(), last), last)
            if adds:
                g = loops.empty_like(x)
                g_ = _flat(g, last)
        if one:
            dw, db = torch.empty_like(weight), torch.empty_like(weight)
        else:
            dw, db = weight.new_empty(2, len(steps), *weight.shape)
        w, dw_, db_ = loops.read(weight), dw.numpy(), db.numpy()
        for step, (rows, sizes) in enumerate(steps):
            some = (dy_, x_, dx_) if one else (dy_[rows], x_[rows], dx_[rows])
            own: tuple[Array, Array] = (dw_, db_) if one else (dw_[step], db_[step])
            behind = y_[rows] if activated else nothing, g_ if g is None else g_[rows]
            how = (needs[0], parts, bool(activated), *behind)
            arrays = BackwardArrays(*some, last, loops.cut(sizes), w, *own, *how)
            ctx.layer.fused_backward(loops, arrays, ctx.kept[step], ctx.update)
        if not one:
            dw, db = dw.sum(0), db.sum(0)
        return (
            dx if needs[0] else None,
            dw if needs[1] else None,
            db if needs[2] else None,
            g,
            None,
        )


def is_plain(x: Tensor) -> bool:
    """Whether a gradient is memory to read: not traced, not one of a batch of gradients."""
    return type(x) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(x)


def ordered(x: Tensor, last: bool) -> Tensor:
    """A tensor whose channels lie first or last in memory."""
    if not last:
        return x.contiguous()
    return x if kernels.lies_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


_CHANNELS_LAST = {2: (0, 1), 3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}


def _flat(x: Tensor, last: bool) -> Array:
    """An ordered tensor as an array ``(N, C, L)`` or ``(N, L, C)`` of the same memory."""
    shape = x.shape
    if last:
        array = x.numpy().transpose(_CHANNELS_LAST[len(shape)])
        return array.reshape(shape[0], -1, shape[1])
    return x.numpy().reshape(shape[0], shape[1], -1)
