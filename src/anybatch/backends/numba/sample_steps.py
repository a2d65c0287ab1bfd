# mypy: disable-error-code="no-untyped-call"
"""Batches of batch normalization sampling: the whole forward, or backward, in one compiled call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.aten.samples import Box
from anybatch.backends.layout import dense
from anybatch.backends.native_memory import address_of, running_addresses
from anybatch.backends.numba import sampled
from anybatch.backends.numba.arrays import KEPT, LIKE
from anybatch.backends.numba.huge_pages import empty_like
from anybatch.backends.numba.norm_batches import SavedBatch
from anybatch.backends.numba.threads import parts
from anybatch.backends.protocol import NormCall, SamplePart, Statistics


class Work(NamedTuple):
    """How batches of one shape and layout go through the loops.

    Attributes:
        planes: Whether a channel's values are side by side.
        shape: Of the batch as planes or rows of channels.
        sample: Tables of runs, their shares, their counts, and the pixels of a map.
    """

    planes: bool
    shape: tuple[int, int]
    sample: Any


def obstacle(call: NormCall, x: Tensor) -> str | None:
    """Why the loops cannot serve a batch."""
    if len(call.cut[2]) > 1:
        return (
            f"norm_batch_size={call.cut[2][0]}: the loops of samples take one normalization batch"
        )
    return None


def prepare(call: NormCall, x: Tensor) -> Work:
    """How batches of this shape and layout go through the loops."""
    spatial, tables = tuple(x.shape[2:]), call.spec.tables
    rows, channels = x.shape[0], x.shape[1]
    length = x.numel() // (rows * channels)
    if spatial not in tables:
        given = call.spec.parts
        runs = [_run_table(part, spatial) for part in given]
        shares = [part.share for part in given]
        counts = [part.values for part in given]
        if len(given) == 1:
            runs, shares, counts = [*runs, sampled.NO_RUNS], [*shares, 0.0], [*counts, 0]
        tables[spatial] = tuple(runs), tuple(shares), tuple(counts), length
    planes = x.is_contiguous() and length > 1
    shape = (rows * channels, length) if planes else (rows * length, channels)
    return Work(planes, shape, tables[spatial])


def _run_table(part: SamplePart, spatial: tuple[int, ...]) -> Any:
    if isinstance(part.sample, Box):
        return sampled.box_runs(*part.sample, spatial)
    return sampled.point_runs([place.cpu().numpy() for place in part.sample.where], spatial)


def forward(
    call: NormCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor],
    relu: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """See `anybatch.backends.protocol.Backend.forward`."""
    planes, shape, sample = call.work[1]
    y: Tensor = empty_like(x)
    if residual is not None:
        residual = dense(residual, call.last)
    added = 0 if residual is None else address_of(residual, x.dtype, x.numel())
    dtype = KEPT[x.dtype]
    rows = (address_of(row, dtype, x.shape[1]) for row in (weight, bias))
    data = LIKE[x.dtype], address_of(x, x.dtype, x.numel()), y.data_ptr(), shape, planes, relu
    table, stats = np.empty((4, x.shape[1])), np.empty((2, x.shape[1]))
    running = running_addresses(state, dtype, x.shape[1])
    how = running, call.update_weight, call.eps, call.update, parts(x.numel())
    sampled.sampled_forward(LIKE[dtype], (*data, added, *rows), sample, *how, table, stats)
    return y, (y,) if relu else (), (stats, table)


def backward(
    call: NormCall,
    context: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `anybatch.backends.protocol.Backend.backward`."""
    (planes, shape, sample), last = call.work[1], call.last
    dy, x, weight = dense(dy, last, x.dtype), dense(x, last), weight.contiguous()
    dx, dw, db = empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    y = g = None
    if saved:
        y = dense(saved[0], last)
        g = empty_like(x) if needs[3] else None
    places = (0 if t is None else address_of(t, x.dtype, x.numel()) for t in (dy, x, dx, y, g))
    dy_, x_, dx_, y_, g_ = places
    dtype = KEPT[x.dtype]
    rows = (address_of(weight, dtype, x.shape[1]), dw.data_ptr(), db.data_ptr())
    data = (LIKE[x.dtype], dy_, x_, dx_, shape, planes, y is not None, y_, g_, *rows)
    sampled.sampled_backward(LIKE[dtype], data, sample, *context, call.eps, parts(x.numel()))
    dx_or_none = dx if needs[0] else None
    return dx_or_none, dw if needs[1] else None, db if needs[2] else None, g


def statistics(call: NormCall, context: Any, like: Tensor) -> list[Statistics]:
    """See `anybatch.backends.protocol.Backend.statistics`."""
    return SavedBatch(context[0][None, :, None]).statistics(like)
