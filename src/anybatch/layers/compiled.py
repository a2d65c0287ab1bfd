"""The autograd function around the compiled kernels of a CPU."""

from functools import lru_cache
from itertools import accumulate
from math import prod
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


class ForwardData(NamedTuple):
    """One normalization batch as the compiled kernels take it; tensors are addresses.

    Attributes:
        like: An empty array of the type of all tensors.
        x: Input.
        y: Output, to be written.
        shape: Of both, ``(N, C, L)``, or ``(N, L, C)`` where channels are `last`.
        last: Whether channels are.
        starts: Where groups of examples begin, and the end.
        weight: Scale.
        bias: Shift.
        parts: Threads.
        relu: Whether a ReLU follows.
        added: What is added before it, like `x`; 0 for nothing.
    """

    like: Array
    x: int
    y: int
    shape: tuple[int, int, int]
    last: bool
    starts: Array
    weight: int
    bias: int
    parts: int
    relu: bool
    added: int


class BackwardData(NamedTuple):
    """One normalization batch of the backward pass, see `ForwardData`.

    Attributes:
        like: An empty array of the type of all tensors.
        dy: Gradient of the output.
        x: Input.
        dx: Gradient of the input, to be written where it is `wanted`.
        shape: Of the three.
        last: Whether channels are.
        starts: Where groups of examples begin, and the end.
        weight: Scale.
        dw: Gradient of the scale, to be written.
        db: Gradient of the shift, to be written.
        wanted: Whether the input needs a gradient.
        parts: Threads.
        relu: Whether a ReLU followed.
        y: Its output; 0 without one.
        g_added: Gradient of what was added before it, to be written; 0 where none is wanted.
    """

    like: Array
    dy: int
    x: int
    dx: int
    shape: tuple[int, int, int]
    last: bool
    starts: Array
    weight: int
    dw: int
    db: int
    wanted: bool
    parts: int
    relu: bool
    y: int
    g_added: int


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
    """A normalization batch: its first example, how many it has, and the sizes of its groups."""

    first: int
    examples: int
    sizes: tuple[int, ...]


@lru_cache(maxsize=256)
def _steps(cut: Partition) -> tuple[_Step, ...]:
    ends, groups = list(accumulate(cut.batches)), list(accumulate(cut.steps))
    return tuple(
        _Step(end - size, size, cut.sizes[group - number : group])
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
        if added is not None:
            added = kernels.dense(added, last)
        like, parts = loops.LIKE[x.dtype], loops.parts(x.numel())
        w, b, kept = weight.data_ptr(), bias.data_ptr(), []
        places = [0 if t is None else t.data_ptr() for t in (x, y, added)]
        (_, rows, columns), example = _shape(x, last), _example(x)
        for first, size, sizes in _steps(cut):
            x_, y_, added_ = [place and place + first * example for place in places]
            shape, starts = (size, rows, columns), loops.cut(sizes)
            data = ForwardData(like, x_, y_, shape, last, starts, w, b, parts, relu, added_)
            kept.append(layer.fused(loops, data, update))
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
        dy, x, weight = (
            kernels.dense(dy, last, x.dtype),
            kernels.dense(x, last),
            weight.contiguous(),
        )
        dx, one, parts = loops.empty_like(x), len(steps) == 1, loops.parts(x.numel())
        y = g = None
        if activated:
            y = kernels.dense(activated[0], last)
            g = loops.empty_like(x) if adds else None
        if one:
            dw, db = torch.empty_like(weight), torch.empty_like(weight)
        else:
            dw, db = weight.new_empty(2, len(steps), *weight.shape)
        row, like, w = weight.nbytes, loops.LIKE[x.dtype], weight.data_ptr()
        places = [0 if t is None else t.data_ptr() for t in (dy, x, dx, y, g)]
        (_, rows, columns), example = _shape(x, last), _example(x)
        relu, dw_, db_ = bool(activated), dw.data_ptr(), db.data_ptr()
        for step, (first, size, sizes) in enumerate(steps):
            above, x_, dx_, *behind = [place and place + first * example for place in places]
            shape, starts, own = (
                (size, rows, columns),
                loops.cut(sizes),
                (dw_ + step * row, db_ + step * row),
            )
            how = (needs[0], parts, relu, *behind)
            data = BackwardData(like, above, x_, dx_, shape, last, starts, w, *own, *how)
            ctx.layer.fused_backward(loops, data, ctx.kept[step], ctx.update)
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
    if type(x) is not Tensor or x._is_zerotensor():
        return False
    return not torch._C._functorch.is_legacy_batchedtensor(x)


def _shape(x: Tensor, last: bool) -> tuple[int, int, int]:
    """Of a dense tensor as ``(N, C, L)`` or ``(N, L, C)``."""
    examples, channels, *space = x.shape
    length = prod(space)
    return (examples, length, channels) if last else (examples, channels, length)


def _example(x: Tensor) -> int:
    """Bytes of an example in a dense tensor."""
    return x.nbytes // x.shape[0]
