"""Batches of a method that is a rule: see `anybatch.backends.protocol.MethodSpec`."""

from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.native_memory import CheckedMemory, address_of
from anybatch.backends.numba import backward_loops, forward_loops
from anybatch.backends.numba.arrays import KEPT, LIKE
from anybatch.backends.numba.bound_rules import described
from anybatch.backends.numba.norm_batches import (
    BackwardData,
    ForwardData,
    Run,
    SavedBatch,
    Work,
    work_for,
)
from anybatch.backends.numba.norm_batches import backward as backward
from anybatch.backends.numba.norm_batches import forward as forward
from anybatch.backends.numba.norm_batches import statistics as statistics
from anybatch.backends.numba.scopes import PLAIN, PLAIN_BACKWARD, forward_numbers, run_backward
from anybatch.backends.numba.threads import without_threads as without_threads
from anybatch.backends.protocol import MethodSpec, NormCall, RuleState, start_of
from anybatch.backends.rule import COUNTERS, NUMBERS, OPTIONS, ROWS, WINDOWS, RuleSet

_ZERO = np.zeros((), np.int64)
_NO_COUNTERS = (_ZERO.ctypes.data,) * COUNTERS
_NO_STATE = (*(0,) * (ROWS + 2 * WINDOWS), *_NO_COUNTERS)
_NO_SETTINGS = (0.0,) * (NUMBERS + OPTIONS)
_NO_AVERAGES = (0, 0, *_NO_STATE), _NO_SETTINGS, 0.0


def obstacle(call: NormCall, x: Tensor) -> None:
    """Why the loops cannot serve a batch; they can."""


def prepare(call: NormCall, x: Tensor) -> Work:
    """How batches of this shape and layout go through the loops."""
    batches = RuleBatches(call.spec)
    return work_for(call, x, batches.forward, batches.backward, not call.beyond)


@lru_cache(maxsize=256)
def _addresses(method: RuleSet, centered: bool) -> tuple[int, int]:
    """Addresses of the descriptions of a method's two parts."""
    forward, backward, tracks_applied, _ = method
    ahead = described(forward, forward, centered, tracks_applied)
    return ahead, described(backward, forward, centered, tracks_applied)


class RuleBatches:
    """The normalization batches of a method of one layer, equal ones in one compiled call a pass.

    Args:
        spec: The method.
    """

    def __init__(self, spec: MethodSpec) -> None:
        self.spec = spec
        self.ahead, self.behind = _addresses(spec.method, spec.centered)
        self.kept = (*spec.kept.rows, *spec.kept.windows, *spec.kept.counters)
        averages = spec.averages
        self.averages = (*averages.rows, *averages.windows, *averages.counters)
        self.memory, self.memory_of_backward = CheckedMemory(), CheckedMemory()
        self.step, self.step_of_backward = CheckedMemory(), CheckedMemory()

    def forward(
        self, call: NormCall, data: ForwardData, number: tuple[int, int], state: tuple[Any, ...]
    ) -> SavedBatch:
        """The forward of a run of normalization batches.

        `state` is the running mean, running variance and number of batches, and a `LoopScope` where
        not simply all values of the batch contribute.
        """
        spec, (batches, groups) = self.spec, number
        channels, num_statistics = data[3][2] if data[4] else data[3][1], call.num_statistics
        mean, var, tracked = state[:3]
        dtype, limits = mean.dtype, spec.outliers is not None
        tensors = mean, var, tracked, *self.kept
        found = self.memory.find(tensors)
        if found is None:
            rows, count = address_of(mean, dtype, channels), address_of(tracked, torch.int64, 1)
            places = _memory(rows, address_of(var, dtype, channels), spec.kept, dtype, channels)
            found = self.memory.keep(tensors, (count, places))
        count, places = found
        applied = own = np.empty((batches, spec.rows, groups, num_statistics))
        if spec.method.forward.rule is not None or num_statistics != channels or limits:
            own = np.empty((batches, 3 if limits else 2, groups, channels))
        moved = count, places, _settings(spec.kept)
        shared = self.ahead, LIKE[dtype], data, own, applied
        given = *shared, *moved, call.update_weight, call.eps, call.update
        scope = state[3] if len(state) > 3 else None
        plain = scope is None and not limits
        some = PLAIN if plain else forward_numbers(spec, scope, self.step, channels)
        forward_loops.forward(*given, some)
        return SavedBatch(applied, spec, None, scope)

    def backward(
        self, call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Tensor
    ) -> None:
        """The backward of such a run; see `forward`."""
        spec = self.spec
        if spec.method.backward.rule is None:
            averages = _NO_AVERAGES
        else:
            weight = call.update_weight
            if weight < 0:
                start, least = start_of(weight)
                weight = max(least, start / (max(int(tracked), 1) - 1 + start))
            places = self.memory_of_backward.find(self.averages)
            if places is None:
                dtype = next(one.dtype for one in (*spec.averages.rows, *spec.averages.windows))
                places = _memory(0, 0, spec.averages, dtype, kept.applied.shape[3])
                self.memory_of_backward.keep(self.averages, places)
            averages = places, _settings(spec.averages), weight
        like = LIKE[KEPT[call.work[1].dtype]]
        given = self.behind, like, data, kept.applied, *averages, call.eps, call.update
        if kept.scope is None:
            backward_loops.backward(*given, PLAIN_BACKWARD)
        else:
            run = partial(backward_loops.backward, *given)
            run_backward(run, spec, kept.scope, self.step_of_backward, kept.applied.shape[3])


def _memory(
    mean: int, var: int, kept: RuleState, dtype: torch.dtype, channels: int
) -> tuple[int, ...]:
    """Addresses of running statistics and state, see `anybatch.backends.numba.rules`."""
    rows, windows, counters, *_ = kept
    if not (rows or windows or counters):
        return mean, var, *_NO_STATE
    row, window = (0,) * (ROWS - len(rows)), (0,) * (WINDOWS - len(windows))
    return (
        *(mean, var, *[address_of(one, dtype, channels) for one in rows], *row),
        *(address_of(one, dtype, len(one) * channels) for one in windows),
        *(*window, *[len(one) for one in windows], *window),
        *(address_of(one, torch.int64, 1) for one in counters),
        *_NO_COUNTERS[len(counters) :],
    )


def _settings(kept: RuleState) -> tuple[float, ...]:
    """Numbers of a layer, as the loops take them."""
    numbers, options = kept.numbers, kept.options
    if not (numbers or options):
        return _NO_SETTINGS
    number, option = (0.0,) * (NUMBERS - len(numbers)), (0.0,) * (OPTIONS - len(options))
    return *[one.item() for one in numbers], *number, *map(float, options), *option


def to_table(kept: list[SavedBatch]) -> Tensor:
    """Statistics of all normalization batches as one table, ``(rows, groups of all, K)``."""
    tables = [np.concatenate(list(run.applied), 1) for run in kept]
    return torch.from_numpy(tables[0] if len(tables) == 1 else np.concatenate(tables, 1))


def from_table(spec: MethodSpec, table: Tensor, runs: tuple[Run, ...]) -> list[SavedBatch]:
    """The reverse of `to_table`."""
    found, first, rows = [], 0, table.numpy()
    for *_, (batches, groups), _ in runs:
        some = rows[:, first : first + batches * groups].reshape(len(rows), batches, groups, -1)
        applied: Any = np.ascontiguousarray(some.swapaxes(0, 1))
        found.append(SavedBatch(applied, spec))
        first += batches * groups
    return found
