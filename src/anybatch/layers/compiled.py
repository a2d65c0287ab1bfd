"""The autograd function around the compiled kernels of small CPU batches."""

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anybatch import kernels
from anybatch.layers.normalize import Call, gradients, refuse_second_derivative
from anybatch.layers.statistics import Statistics

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
        update: bool,
    ) -> Tensor:
        y = torch.empty_like(x)
        x_, y_ = _flat(x.detach()), _flat(y)
        w, b = weight.detach().numpy(), bias.detach().numpy()
        ctx.save_for_backward(x, weight)
        ctx.kept = layer._last = layer.fused(loops, x_, y_, w, b, update)
        ctx.layer, ctx.loops, ctx.update = layer, loops, update
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not _is_plain(dy) or kernels.is_watched():
            statistics, update = ctx.kept.statistics(x), ctx.update
            memory = ctx.layer.backward_memory(statistics, None, update)
            call = Call(statistics, (x.shape[0],), ctx.layer.eps, memory)
            return *gradients(dy.to(x.dtype), x, weight, call, needs), None, None, None
        dy = dy.to(x.dtype).contiguous()
        x = x.detach().contiguous()
        dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        arrays = (_flat(dy), _flat(x), _flat(dx), weight.detach().numpy())
        ctx.layer.fused_backward(ctx.loops, *arrays, dw.numpy(), db.numpy(), ctx.kept, ctx.update)
        return (
            dx if needs[0] else None,
            dw if needs[1] else None,
            db if needs[2] else None,
            None,
            None,
            None,
        )


def _is_plain(x: Tensor) -> bool:
    """Whether a gradient is memory to read: not traced, not one of a batch of gradients."""
    return type(x) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(x)


def _flat(x: Tensor) -> Array:
    """A contiguous tensor as an array ``(N, C, L)`` of the same memory."""
    return x.numpy().reshape(x.shape[0], x.shape[1], -1)
