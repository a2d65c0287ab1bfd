# mypy: disable-error-code="no-untyped-call"
"""Batches of batch normalization sampling: the whole forward, or backward, in one compiled call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.aten.samples import Box
from anybatch.backends.layout import dense
from anybatch.backends.native_memory import CheckedMemory, address_of, row_address
from anybatch.backends.numba import sampled
from anybatch.backends.numba.arrays import KEPT, LIKE
from anybatch.backends.numba.huge_pages import empty_like
from anybatch.backends.numba.norm_batches import SavedBatch
from anybatch.backends.numba.threads import parts
from anybatch.backends.protocol import NormCall, SamplePart, Statistics


def obstacle(call: NormCall, x: Tensor) -> str | None:
    """Why the loops cannot serve a batch."""
    if len(call.cut[2]) > 1:
        return (
            f"norm_batch_size={call.cut[2][0]}: the loops of samples take one normalization batch"
        )
    return None


def _run_table(part: SamplePart, spatial: tuple[int, ...]) -> Any:
    if isinstance(part.sample, Box):
        return sampled.box_runs(*part.sample, spatial)
    return sampled.point_runs([place.cpu().numpy() for place in part.sample.where], spatial)


class SampleLoops:
    """How batches of one shape and layout go through the loops."""

    def __init__(self, call: NormCall, x: Tensor) -> None:
        spatial, tables = tuple(x.shape[2:]), call.spec.tables
        rows, self.channels = x.shape[0], x.shape[1]
        length = x.numel() // (rows * self.channels)
        if spatial not in tables:
            given = call.spec.parts
            runs = [_run_table(part, spatial) for part in given]
            shares = [part.share for part in given]
            counts = [part.values for part in given]
            if len(given) == 1:
                runs, shares, counts = [*runs, sampled.NO_RUNS], [*shares, 0.0], [*counts, 0]
            tables[spatial] = tuple(runs), tuple(shares), tuple(counts), length
        self.sample = tables[spatial]
        self.planes = x.is_contiguous() and length > 1  # a channel's values are side by side
        self.shape = (rows * self.channels, length) if self.planes else (rows * length, x.shape[1])
        self.dtype, self.kept = x.dtype, KEPT[x.dtype]
        self.memory = CheckedMemory()

    def _places(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Addresses of scale and shift, and of running statistics and the number of batches."""
        w, b, mean, var = (row_address(row, self.kept, self.channels) for row in tensors[:4])
        return (w, b), (mean, var, address_of(tensors[4], torch.int64, 1))

    def forward(
        self,
        call: NormCall,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        state: tuple[Tensor, Tensor, Tensor],
        relu: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        """See `anybatch.backends.protocol.Backend.forward`."""
        tensors = weight, bias, *state
        places = self.memory.find(tensors)
        if places is None:
            places = self.memory.keep(tensors, self._places(tensors))
        rows, running = places
        y: Tensor = empty_like(x)
        if residual is not None:
            residual = dense(residual, call.last)
        added = 0 if residual is None else address_of(residual, self.dtype, x.numel())
        data = address_of(x, self.dtype, x.numel()), y.data_ptr(), self.shape, self.planes, relu
        table, stats = np.empty((4, self.channels)), np.empty((2, self.channels))
        how = running, call.update_weight, call.eps, call.update, parts(x.numel())
        data = LIKE[self.dtype], *data, added, *rows
        sampled.sampled_forward(LIKE[self.kept], data, self.sample, *how, table, stats)
        return y, (y,) if relu else (), (stats, table)

    def backward(
        self,
        call: NormCall,
        context: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """See `anybatch.backends.protocol.Backend.backward`."""
        last = call.last
        dy, x, weight = dense(dy, last, x.dtype), dense(x, last), weight.contiguous()
        dx, dw, db = empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        y = g = None
        if saved:
            y = dense(saved[0], last)
            g = empty_like(x) if needs[3] else None
        places = (0 if t is None else address_of(t, x.dtype, x.numel()) for t in (dy, x, dx, y, g))
        dy_, x_, dx_, y_, g_ = places
        rows = (address_of(weight, self.kept, x.shape[1]), dw.data_ptr(), db.data_ptr())
        relu = (y is not None, y_, g_)
        data = (LIKE[x.dtype], dy_, x_, dx_, self.shape, self.planes, *relu, *rows)
        how = *context, call.eps, parts(x.numel())
        sampled.sampled_backward(LIKE[self.kept], data, self.sample, *how)
        dx_or_none = dx if needs[0] else None
        return dx_or_none, dw if needs[1] else None, db if needs[2] else None, g

    def statistics(self, context: Any, like: Tensor) -> list[Statistics]:
        """See `anybatch.backends.protocol.Backend.statistics`."""
        return SavedBatch(context[0][None, :, None]).statistics(like)


prepare = SampleLoops
