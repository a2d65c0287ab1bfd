"""The autograd function around the compiled kernels of small CPU batches."""

from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anybatch import kernels
from anybatch.layers.normalize import Call, gradients, refuse_second_derivative
from anybatch.layers.statistics import Statistics, stack

if TYPE_CHECKING:
    from anybatch.layers.base import NormLayer

Array = Any  # numpy's; the library does not import numpy


class Kept(NamedTuple):
    """Statistics of one forward as arrays of the compiled kernels, see `Statistics`."""

    means: Array
    variances: Array
    centers: Array
    rs: Array
    ds: Array
    share: float = 1.0
    own: bool = True

    def statistics(self, like: Tensor) -> Statistics:
        """The same as tensors, for a forward that is computed again."""

        def row(array: Array) -> Tensor | None:
            return torch.from_numpy(array).to(like.dtype) if len(array) else None

        var = row(self.variances)
        assert var is not None
        mean, r, d, center = row(self.means), row(self.rs), row(self.ds), row(self.centers)
        own = torch.tensor(self.own)
        return Statistics(mean, var, r, d, center, self.share, own)


def as_statistics(kept: list[Kept], like: Tensor) -> Statistics:
    """Those of the successive normalization batches of a forward, as one table."""
    parts = [step.statistics(like) for step in kept]
    return parts[0] if len(parts) == 1 else stack(parts)


def _rows(sizes: tuple[int, ...]) -> list[slice]:
    """The examples of each normalization batch."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class Compiled(torch.autograd.Function):
    """One compiled call forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: "NormLayer",
        loops: ModuleType,
        sizes: tuple[int, ...],
        update: bool,
    ) -> Tensor:
        y = torch.empty_like(x)
        x_, y_ = _flat(x.detach()), _flat(y)
        w, b = loops.read(weight), loops.read(bias)
        ctx.save_for_backward(x, weight)
        if len(sizes) == 1:
            kept = [layer.fused(loops, x_, y_, w, b, update)]
        else:
            kept = [layer.fused(loops, x_[part], y_[part], w, b, update) for part in _rows(sizes)]
        ctx.kept = layer._last = kept
        ctx.layer, ctx.loops, ctx.sizes, ctx.update = layer, loops, sizes, update
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not is_plain(dy) or kernels.is_watched():
            statistics = as_statistics(ctx.kept, x)
            memory = ctx.layer.backward_memory(statistics, None, ctx.update)
            call = Call(statistics, ctx.sizes, ctx.layer.eps, memory)
            return *gradients(dy.to(x.dtype), x, weight, call, needs), None, None, None, None
        dy = dy.to(x.dtype).contiguous()
        x = x.detach().contiguous()
        dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        arrays, w = (_flat(dy), _flat(x), _flat(dx)), ctx.loops.read(weight)
        back, loops, update = ctx.layer.fused_backward, ctx.loops, ctx.update
        if len(ctx.sizes) == 1:
            back(loops, *arrays, w, dw.numpy(), db.numpy(), ctx.kept[0], update)
        else:
            steps = weight.new_empty(2, len(ctx.sizes), weight.shape[0])
            dws, dbs = steps.numpy()
            for step, part in enumerate(_rows(ctx.sizes)):
                some = (array[part] for array in arrays)
                back(loops, *some, w, dws[step], dbs[step], ctx.kept[step], update)
            dw, db = steps.sum(1)
        return (
            dx if needs[0] else None,
            dw if needs[1] else None,
            db if needs[2] else None,
            None,
            None,
            None,
            None,
        )


def is_plain(x: Tensor) -> bool:
    """Whether a gradient is memory to read: not traced, not one of a batch of gradients."""
    return type(x) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(x)


def _flat(x: Tensor) -> Array:
    """A contiguous tensor as an array ``(N, C, L)`` of the same memory."""
    return x.numpy().reshape(x.shape[0], x.shape[1], -1)
