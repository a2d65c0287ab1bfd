"""Batches of a method whose rule the loops know: see `anybatch.backends.protocol.MethodSpec`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.kinds import BATCH, EMA, MOMENTUM, PLAIN, RENORM, WINDOW
from anybatch.backends.native_memory import address_of, running_addresses
from anybatch.backends.numba import loops
from anybatch.backends.numba.loops import without_threads as without_threads
from anybatch.backends.numba.norm_batches import (
    BackwardData,
    ForwardData,
    SavedBatch,
    Work,
    work_for,
)
from anybatch.backends.numba.norm_batches import backward as backward
from anybatch.backends.numba.norm_batches import forward as forward
from anybatch.backends.numba.norm_batches import statistics as statistics
from anybatch.backends.protocol import MethodSpec, NormCall


def obstacle(call: NormCall, x: Tensor) -> None:
    """Why the loops cannot serve a batch; they can."""


def prepare(call: NormCall, x: Tensor) -> Work:
    """How batches of this shape and layout go through the loops."""
    return work_for(call, x, forward_batch, backward_batch)


def forward_batch(
    call: NormCall, data: ForwardData, groups: int, state: tuple[Tensor, ...]
) -> SavedBatch:
    """The forward of one normalization batch, in one compiled call."""
    spec, columns = call.spec, call.columns
    channels = data[3][2] if data[4] else data[3][1]
    dtype = state[0].dtype
    running = mean_, var_, _ = running_addresses(state, dtype, channels)
    constants = call.pace, call.eps, call.update
    kind = spec.kind
    if kind == PLAIN:
        used = own = np.empty((2, groups, columns))
        if columns != channels:
            own = np.empty((2, groups, channels))
        nothing = (mean_, var_, *loops.NONE), loops.NO_COUNT, loops.NO_SETTINGS
        loops.forward(PLAIN, *data, own, used, running, *nothing, *constants)
        return SavedBatch(used)
    used = own = np.empty((2 if kind == MOMENTUM else 4, groups, columns))
    if kind != RENORM:
        own = np.empty((2, groups, channels))
    if spec.mean is not None:
        mean_, var_ = (address_of(row, dtype, channels) for row in (spec.mean, spec.var))
    window = spec.window
    kept = loops.NONE
    if window is not None:
        kept = address_of(window, dtype, len(window) * channels), len(window)
    memory = (mean_, var_, *kept), address_of(spec.counter, torch.int64, 1), _settings(spec)
    result = loops.forward(kind, *data, own, used, running, *memory, *constants)
    if kind == MOMENTUM:
        return SavedBatch(used, own[0], 1 - result)
    if kind == WINDOW:
        return SavedBatch(used, own=result > 0, centered=False)
    return SavedBatch(used)


def _settings(spec: MethodSpec) -> tuple[float, float, float, float]:
    """Numbers of a method, as the loops take them."""
    first, second = spec.numbers
    if spec.kind == RENORM:
        return first, second, float(spec.steps[1]), float(spec.smooth)
    if spec.kind == WINDOW:
        length, warmup, renorm_warmup = spec.steps
        return float(length), float(warmup), float(renorm_warmup), first
    assert spec.keep is not None
    return spec.keep.item(), 0.0, 0.0, 0.0


def backward_batch(call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Tensor) -> None:
    """The backward of one normalization batch, in one compiled call."""
    spec = call.spec
    used, centers, share, own, centered, _ = kept
    how = used, used[0] if centers is None else centers, share, centered, call.eps
    if spec.averages == BATCH:
        loops.backward(*data, *how, BATCH, loops.NONE, loops.NO_COUNT, 0.0, True, False)
        return
    pace, psi = call.pace, spec.psi
    if pace < 0 and spec.averages == EMA:
        pace = 1 / max(int(tracked), 1)
    length = psi.numel() // used.shape[2]
    average = address_of(psi, psi.dtype, max(length, 1) * used.shape[2]), length
    count = address_of(spec.psi_counter, torch.int64, 1)
    loops.backward(*data, *how, spec.averages, average, count, 1.0 - pace, own, call.update)


def to_table(kind: int, kept: list[SavedBatch]) -> Tensor:
    """Statistics of all normalization batches as one table, see `MethodSpec`."""
    tables = []
    for used, centers, share, own, *_ in kept:
        if kind == MOMENTUM:
            assert centers is not None
            used = np.concatenate([used, centers[None], np.full_like(used[:1], share)])
        elif kind == WINDOW:
            used[3] = own  # there is no d
        tables.append(used)
    return torch.from_numpy(tables[0] if len(tables) == 1 else np.concatenate(tables, 1))


def from_table(kind: int, table: Tensor, groups: tuple[int, ...]) -> list[SavedBatch]:
    """The reverse of `to_table`, for normalization batches of so many groups."""
    found, first, rows = [], 0, table.numpy()
    for count in groups:
        used: Any = np.ascontiguousarray(rows[:, first : first + count])
        if kind == MOMENTUM:
            found.append(SavedBatch(used[:2], used[2], float(used[3, 0, 0])))
        elif kind == WINDOW:
            own = bool(used[3, 0, 0] > 0)
            used = np.concatenate([used[:3], np.zeros_like(used[:1])])
            found.append(SavedBatch(used, own=own, centered=False))
        else:
            found.append(SavedBatch(used))
        first += count
    return found
