"""A layer's batch in the loops: a call for each run of equal normalization batches."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.backends.layout import dense
from anybatch.backends.native_memory import CheckedMemory, address_of, row_address
from anybatch.backends.numba.arrays import KEPT, LIKE, Told, told
from anybatch.backends.numba.huge_pages import empty_like
from anybatch.backends.numba.scopes import LoopScope, scope_of
from anybatch.backends.numba.threads import is_small, parts
from anybatch.backends.protocol import (
    Contribution,
    MethodSpec,
    NormCall,
    Statistics,
    iter_norm_batches,
)

Array = Any

# A normalization batch, or the first of a run of equal ones that lie side by side, as the loops
# take it, tensors as addresses: an empty array of the type of activations; how it is cut, see
# `anybatch.backends.numba.arrays.cut_at`; input; output, to be written; scale; shift; threads;
# whether a ReLU follows; what is added before it, like the input, or 0. A plain tuple, for a named
# one takes as long to make as the kernels take for a small batch.
ForwardData = tuple[Array, int, int, int, int, int, int, bool, int]

# Of the backward pass: an empty array; how it is cut; gradient of the output; input; gradient of
# the input, to be written where it is needed; scale; gradients of scale and shift, to be written;
# whether the input needs a gradient; threads; whether a ReLU followed; its output, or 0; gradient
# of what was added before it, to be written, or 0.
BackwardData = tuple[Any, ...]


class SavedBatch(NamedTuple):
    """Statistics of a run of equal normalization batches as arrays, see `Statistics`.

    Attributes:
        applied: Of each, rows of mean and variance, and of what a rule gives, ``(B, rows, G, K)``.
        spec: The method of a rule; None for another.
        scope: What contributes to them; None for the groups' values.
        ends: Values ``(2, C)`` at or beyond which another spread than the standard deviation moves
            with a value.
    """

    applied: Array
    spec: MethodSpec | None = None
    ends: Array | None = None
    scope: LoopScope | None = None

    def statistics(self, like: Tensor) -> list[Statistics]:
        """The same as tensors, one row per group, for each normalization batch."""
        tables = torch.from_numpy(self.applied).to(KEPT[like.dtype])
        tables = tables[:, :, 0] if tables.shape[2] == 1 else tables
        found = [(self.spec or MethodSpec()).statistics(table) for table in tables]
        if self.scope is None:
            return found
        counts = torch.from_numpy(self.scope.counts).to(tables.dtype)
        counts = counts[0] if len(counts) == 1 else counts.unsqueeze(1)
        return [one.of(counts) for one in found]


Size = tuple[int, int, int]  # batches of a run, groups and examples of each
Places = tuple[Any, ...]  # addresses of scale, shift, mean, variance, batches; and of state


class Run(NamedTuple):
    """Equal normalization batches that lie side by side.

    Attributes:
        start: Where the first begins, in bytes.
        cut: Shape of one, ``(N, C, L)`` or, channels last, ``(N, L, C)``; whether they are; how
            many groups of examples it has, where they begin, and the end.
        size: How many they are, and how many groups and examples each has.
        first: Its first example and group.
    """

    start: int
    cut: Told
    size: Size
    first: tuple[int, int]


@lru_cache(maxsize=256)
def _cut(shape: tuple[int, int, int], last: bool, sizes: tuple[int, ...]) -> Told:
    """See `Run`."""
    return told([*shape, last, len(sizes), *accumulate(sizes, initial=0)])


class BatchLoops:
    """How batches of one shape and layout go through the loops.

    Args:
        call: How the layer goes through them.
        x: Such a batch, dense.
        in_runs: Whether one compiled call serves successive normalization batches of equal sizes;
            otherwise each has its own.
    """

    state: tuple[Tensor, ...] = ()  # of the method, beside the running statistics

    def __init__(self, call: NormCall, x: Tensor, in_runs: bool = False) -> None:
        channels, length, example = x.shape[1], math.prod(x.shape[2:]), x.nbytes // x.shape[0]
        runs: list[Run] = []
        earlier = None
        for first, group, examples, sizes in iter_norm_batches(call.cut):
            if in_runs and sizes == earlier:
                runs[-1] = runs[-1]._replace(size=(runs[-1].size[0] + 1, *runs[-1].size[1:]))
                continue
            shape = (examples, length, channels) if call.last else (examples, channels, length)
            cut = _cut(shape, call.last, sizes)
            runs.append(Run(first * example, cut, (1, len(sizes), examples), (first, group)))
            earlier = sizes
        self.runs, self.last, self.length = tuple(runs), call.last, length
        self.dtype, self.like, self.kept = x.dtype, LIKE[x.dtype], KEPT[x.dtype]
        self.size, self.channels = x.numel(), channels
        self.small = is_small(self.size)  # one thread does it, and writes little
        self.memory = CheckedMemory()

    def places(self, tensors: tuple[Tensor, ...]) -> Places:
        """The addresses of scale, shift, running statistics and number of batches, and `state`."""
        *rows, tracked = tensors[:5]
        found = [row_address(row, self.kept, self.channels) for row in rows]
        return *found, address_of(tracked, torch.int64, 1)

    def run_forward(
        self, call: NormCall, data: ForwardData, size: Size, places: Places, given: Any
    ) -> SavedBatch:
        """The forward of a run.

        Args:
            call: How the layer goes through the batch.
            data: See `ForwardData`.
            size: How many normalization batches it has, and how many groups and examples each.
            places: See `places`.
            given: A `LoopScope`, or what a family of kernels adds; None for nothing.
        """
        raise NotImplementedError

    def run_backward(
        self, call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Tensor
    ) -> None:
        """The backward of a run: `kept` is what its forward returned."""
        raise NotImplementedError

    def forward(
        self,
        call: NormCall,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        state: tuple[Any, ...],
        relu: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[list[SavedBatch], Tensor]]:
        """See `anybatch.backends.protocol.Backend.forward`."""
        mean, var, tracked, *more = state
        tensors = weight, bias, mean, var, tracked, *self.state
        places = self.memory.find(tensors)
        if places is None:
            places = self.memory.keep(tensors, self.places(tensors))
        size = self.size
        y: Tensor = torch.empty_like(x) if self.small else empty_like(x)
        threads = 1 if self.small else parts(size)
        x_, y_, added = address_of(x, self.dtype, size), y.data_ptr(), 0
        if residual is not None:
            residual = dense(residual, self.last)
            added = address_of(residual, self.dtype, size)
        kept = []
        for start, cut, many, first in self.runs:
            at = cut.address, x_ + start, y_ + start, places[0], places[1]
            data = (self.like, *at, threads, relu, added and added + start)
            given = more[-1] if more else None
            if type(given) is Contribution:  # `call.beyond` tells why: runs are of one batch then
                given = scope_of(given, *first, many[1], self.length)
            kept.append(self.run_forward(call, data, many, places, given))
        # The mask of a ReLU is the sign of its output.
        return y, (y,) if relu else (), (kept, tracked)

    def backward(
        self,
        call: NormCall,
        context: tuple[list[SavedBatch], Tensor],
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """See `anybatch.backends.protocol.Backend.backward`."""
        (kept, tracked), last, dtype, size = context, self.last, self.dtype, self.size
        x = dense(x, last)  # what was saved on another device may come back in another layout
        if dy.dtype is not dtype or dy.stride() != x.stride() or dy.is_neg():
            dy = dense(dy, last, dtype)
        weight = weight.contiguous()
        fresh = torch.empty_like if self.small else empty_like
        dx, threads, g, y_, g_ = fresh(x), 1 if self.small else parts(size), None, 0, 0
        if saved:
            y = dense(saved[0], last)
            g = fresh(x) if needs[3] else None
            y_, g_ = address_of(y, dtype, size), 0 if g is None else g.data_ptr()
        batches = len(call.cut[2])
        if batches == 1:
            dw, db = torch.empty_like(weight), torch.empty_like(weight)
        else:
            dw, db = weight.new_empty(2, batches, *weight.shape)
        above, x_ = address_of(dy, dtype, size), address_of(x, dtype, size)
        dx_, w = dx.data_ptr(), address_of(weight, self.kept, self.channels)
        dw_, db_, row = dw.data_ptr(), db.data_ptr(), weight.nbytes
        wanted, relu = needs[0], y_ != 0
        for (start, cut, many, _), some in zip(self.runs, kept, strict=True):
            places = (cut.address, above + start, x_ + start, dx_ + start)
            behind = (relu, y_ and y_ + start, g_ and g_ + start)
            how = (w, dw_, db_, wanted, threads, *behind)
            self.run_backward(call, (self.like, *places, *how), some, tracked)
            dw_, db_ = dw_ + many[0] * row, db_ + many[0] * row
        if batches > 1:
            dw, db = dw.sum(0), db.sum(0)
        return dx if wanted else None, dw if needs[1] else None, db if needs[2] else None, g

    def statistics(
        self, context: tuple[list[SavedBatch], Tensor], like: Tensor
    ) -> list[Statistics]:
        """See `anybatch.backends.protocol.Backend.statistics`."""
        return [one for run in context[0] for one in run.statistics(like)]
