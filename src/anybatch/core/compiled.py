"""The autograd function around the compiled kernels of a CPU."""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anybatch import backends
from anybatch.core.autograd import refuse_second_derivative
from anybatch.core.grouping import Partition
from anybatch.core.statistics import Statistics, stack

if TYPE_CHECKING:
    from anybatch.core.norm_layer import NormLayer

Array = Any  # numpy's; the library does not import numpy


# One normalization batch as the compiled kernels take it, tensors as addresses: an empty array of
# the type of all tensors; input; output, to be written; shape of both, (N, C, L) or (N, L, C) where
# channels are last; whether they are; where groups of examples begin, and the end; scale; shift;
# threads; whether a ReLU follows; what is added before it, like the input, or 0. A plain tuple, for
# a named one takes as long to make as the kernels take for a small batch.
ForwardData = tuple[Array, int, int, tuple[int, int, int], bool, Array, int, int, int, bool, int]

# Of the backward pass: an empty array; gradient of the output; input; gradient of the input, to be
# written where it is wanted; shape of the three; whether channels are last; where groups begin, and
# the end; scale; gradients of scale and shift, to be written; whether the input needs a gradient;
# threads; whether a ReLU followed; its output, or 0; gradient of what was added before it, to be
# written, or 0.
BackwardData = tuple[
    Array,
    int,
    int,
    int,
    tuple[int, int, int],
    bool,
    Array,
    int,
    int,
    int,
    bool,
    int,
    bool,
    int,
    int,
]


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


class Way(NamedTuple):
    """How batches of one shape and layout go through the compiled kernels.

    Attributes:
        loops: The kernels.
        like: An empty array of the type of all tensors.
        dtype: That type.
        strides: Of the batch.
        last: Whether channels are last.
        cut: How it is cut.
        small: Whether one thread does it, and writes little.
        steps: Of each normalization batch where it begins, in bytes, its shape as in `ForwardData`,
            where its groups begin, and how many there are.
    """

    loops: ModuleType
    like: Array
    dtype: torch.dtype
    strides: tuple[int, ...]
    last: bool
    cut: Partition
    small: bool
    steps: tuple[tuple[int, tuple[int, int, int], Array, int], ...]


def way_of(x: Tensor, loops: ModuleType, cut: Partition) -> Way:
    """How a dense batch goes through the kernels, cut so."""
    last, like, small = not x.is_contiguous(), loops.LIKE[x.dtype], loops.is_small(x.numel())
    steps = loops.steps_of(x, cut, last)
    return Way(loops, like, x.dtype, x.stride(), last, cut, small, steps)


class Compiled(torch.autograd.Function):
    """One compiled call a normalization batch forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        how: "tuple[NormLayer, Way, bool, bool]",
    ) -> Tensor:
        layer, (loops, like, _, _, last, _, small, steps), update, relu = how
        y: Tensor = torch.empty_like(x) if small else loops.empty_like(x)
        parts = 1 if small else loops.parts(x.numel())
        x_, y_, w, b, added_ = x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), 0
        if added is not None:
            added = backends.dense(added, last)
            added_ = added.data_ptr()
        kept = []
        for first, shape, starts, groups in steps:
            here = added_ and added_ + first
            data = (like, x_ + first, y_ + first, shape, last, starts, w, b, parts, relu, here)
            kept.append(layer.fused(loops, data, groups, update))
        if relu:  # whose mask is the sign of its output
            ctx.save_for_backward(x, weight, y)
        else:
            ctx.save_for_backward(x, weight)
        layer.__dict__["_last"] = kept  # past the checks of a module
        ctx.how = layer, how[1], update, kept
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivative()
        x, weight, *activated = ctx.saved_tensors
        layer, way, update, kept = ctx.how
        needs = ctx.needs_input_grad
        if not is_plain(dy) or backends.is_watched():
            dy = dy.to(x.dtype)
            for y in activated:
                dy = dy.masked_fill(y <= 0, 0)
            statistics = as_statistics(kept, x)
            given = (dy, x, weight, statistics, way.cut, needs, update)
            return *layer.gradients(*given), dy if needs[3] else None, None
        loops, like, dtype, strides, last, _, small, steps = way
        if dy.stride() != strides or dy.dtype is not dtype or dy.is_neg():
            dy = backends.dense(dy, last, dtype)
        if x.stride() != strides:  # as what was saved on another device and came back
            x = backends.dense(x, last)
        weight = weight.contiguous()
        fresh = torch.empty_like if small else loops.empty_like
        dx, parts, g, y_, g_ = fresh(x), 1 if small else loops.parts(x.numel()), None, 0, 0
        if activated:
            y = backends.dense(activated[0], last)
            g = fresh(x) if needs[3] else None
            y_, g_ = y.data_ptr(), 0 if g is None else g.data_ptr()
        if len(steps) == 1:
            dw, db = torch.empty_like(weight), torch.empty_like(weight)
        else:
            dw, db = weight.new_empty(2, len(steps), *weight.shape)
        above, x_, dx_, w = dy.data_ptr(), x.data_ptr(), dx.data_ptr(), weight.data_ptr()
        dw_, db_, row = dw.data_ptr(), db.data_ptr(), weight.nbytes
        wanted, relu = needs[0], y_ != 0
        for (first, shape, starts, _), one in zip(steps, kept, strict=True):
            places = (above + first, x_ + first, dx_ + first)
            behind = (relu, y_ and y_ + first, g_ and g_ + first)
            how = (shape, last, starts, w, dw_, db_, wanted, parts, *behind)
            layer.fused_backward(loops, (like, *places, *how), one, update)
            dw_, db_ = dw_ + row, db_ + row
        if len(steps) > 1:
            dw, db = dw.sum(0), db.sum(0)
        return (
            dx if needs[0] else None,
            dw if needs[1] else None,
            db if needs[2] else None,
            g,
            None,
        )


# `Compiled.apply` without what `Function.apply` looks for first, which costs a small batch as much
# as most of the loops: transforms, of which there is none where a batch is served, and tensors that
# outlived one.
apply: Callable[..., Tensor] = super(torch.autograd.Function, Compiled).apply
outlived: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def is_plain(x: Tensor) -> bool:
    """Whether a gradient is memory to read: not traced, not one of a batch of gradients."""
    if type(x) is not Tensor or x._is_zerotensor():
        return False
    return not torch._C._functorch.is_legacy_batchedtensor(x)
