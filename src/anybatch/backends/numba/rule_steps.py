"""Batches of a method that is a rule: see `anybatch.backends.protocol.MethodSpec`."""

from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.native_memory import CheckedMemory, address_of
from anybatch.backends.numba import backward_loops, forward_loops
from anybatch.backends.numba.arrays import LIKE, Told, told
from anybatch.backends.numba.bound_rules import described
from anybatch.backends.numba.norm_batches import (
    BackwardData,
    BatchLoops,
    ForwardData,
    Places,
    Run,
    SavedBatch,
    Size,
)
from anybatch.backends.numba.scopes import (
    PLAIN,
    PLAIN_BACKWARD,
    LoopScope,
    forward_numbers,
    run_backward,
)
from anybatch.backends.numba.threads import without_threads as without_threads
from anybatch.backends.protocol import MethodSpec, NormCall, RuleState, start_of
from anybatch.backends.rule import COUNTERS, NUMBERS, OPTIONS, ROWS, WINDOWS, RuleSet

_ZERO = np.zeros((), np.int64)
_NO_COUNTERS = (_ZERO.ctypes.data,) * COUNTERS


def obstacle(call: NormCall, x: Tensor) -> None:
    """Why the loops cannot serve a batch; they can."""


def prepare(call: NormCall, x: Tensor) -> "RuleLoops":
    """How batches of this shape and layout go through the loops."""
    return RuleLoops(call, x, call.spec, not call.beyond)


@lru_cache(maxsize=256)
def _addresses(method: RuleSet, centered: bool) -> tuple[int, int]:
    """Addresses of the descriptions of a method's two parts."""
    forward, backward, tracks_applied, _ = method
    ahead = described(forward, forward, centered, tracks_applied)
    return ahead, described(backward, forward, centered, tracks_applied)


class RuleLoops(BatchLoops):
    """The batches of a method of one layer, equal ones in one compiled call a pass.

    Args:
        spec: The method.
    """

    def __init__(self, call: NormCall, x: Tensor, spec: MethodSpec, in_runs: bool = False) -> None:
        super().__init__(call, x, in_runs)
        self.spec, self.run_backward = spec, RuleGradient(spec, self.kept).run  # type: ignore[method-assign]
        self.ahead, _ = _addresses(spec.method, spec.centered)
        self.state = (*spec.kept.rows, *spec.kept.windows, *spec.kept.counters)
        self.settings = _settings(spec.kept)
        self.limits, self.width = spec.outliers is not None, call.num_statistics
        own = spec.method.forward.rule is not None or self.width != self.channels or self.limits
        # Of a group's own statistics, where they are not all of those that normalize.
        self.own_rows = (3 if self.limits else 2) if own else 0
        self.rows, self.parameters = spec.rows, LIKE[self.kept]
        self.step = CheckedMemory()

    def places(self, tensors: tuple[Tensor, ...]) -> Places:
        *rows, mean, var, count = super().places(tensors)
        return *rows, mean, var, count, _memory(mean, var, self.spec.kept, self.kept, self.channels)

    def run_forward(
        self, call: NormCall, data: ForwardData, size: Size, places: Places, given: LoopScope | None
    ) -> SavedBatch:
        batches, groups, _ = size
        applied = own = np.empty((batches, self.rows, groups, self.width))
        if self.own_rows:
            own = np.empty((batches, self.own_rows, groups, self.channels))
        some = PLAIN
        if given is not None or self.limits:
            some = forward_numbers(self.spec, given, self.step, self.channels)
        for i, one in enumerate(self.spec.kept.numbers):
            self.settings.numbers[i] = one.item()
        memory = places[4], places[5].address, self.settings.address
        moved = *memory, call.update_weight, call.eps, call.update, some
        forward_loops.forward(self.ahead, self.parameters, data, own, applied, *moved)
        return SavedBatch(applied, self.spec, None, given)


class RuleGradient:
    """The backward of runs of normalization batches.

    Args:
        spec: The method.
        dtype: Type of parameters and state.
    """

    def __init__(self, spec: MethodSpec, dtype: torch.dtype) -> None:
        self.spec, self.dtype, self.like, averages = spec, dtype, LIKE[dtype], spec.averages
        _, self.method = _addresses(spec.method, spec.centered)
        self.state = (*averages.rows, *averages.windows, *averages.counters)
        self.settings = _settings(averages) if averages.options else _NO_SETTINGS
        self.memory, self.step = CheckedMemory(), CheckedMemory()

    def run(self, call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Tensor) -> None:
        """The backward of a run: `kept` is what its forward returned."""
        spec = self.spec
        if spec.method.backward.rule is None:
            memory, settings, weight = _NO_AVERAGES
        else:
            weight = call.update_weight
            if weight < 0:
                start, least = start_of(weight)
                weight = max(least, start / (max(int(tracked), 1) - 1 + start))
            settings, memory = self.settings, self.memory.find(self.state)
            if memory is None:
                memory = _memory(0, 0, spec.averages, self.dtype, kept.applied.shape[3])
                self.memory.keep(self.state, memory)
        moved = memory.address, settings.address, weight, call.eps, call.update
        given = self.method, self.like, data, kept.applied, *moved
        if kept.scope is None:
            backward_loops.backward(*given, PLAIN_BACKWARD)
        else:
            run = partial(backward_loops.backward, *given)
            run_backward(run, spec, kept.scope, self.step, kept.applied.shape[3])


def _memory(mean: int, var: int, kept: RuleState, dtype: torch.dtype, channels: int) -> Told:
    """Addresses of running statistics and state, see `anybatch.backends.numba.rules`."""
    rows, windows, counters, *_ = kept
    row, window = (0,) * (ROWS - len(rows)), (0,) * (WINDOWS - len(windows))
    places = (
        *(mean, var, *[address_of(one, dtype, channels) for one in rows], *row),
        *(address_of(one, dtype, len(one) * channels) for one in windows),
        *(*window, *[len(one) for one in windows], *window),
        *(address_of(one, torch.int64, 1) for one in counters),
        *_NO_COUNTERS[len(counters) :],
    )
    return told(places)


def _settings(kept: RuleState) -> Told:
    """Numbers of a layer: those that it keeps in tensors, which may change, and options."""
    number, option = NUMBERS - len(kept.numbers), OPTIONS - len(kept.options)
    numbers = (*map(float, kept.numbers), *(0.0,) * number, *kept.options, *(0.0,) * option)
    return told(numbers, np.float64)


_NO_SETTINGS = _settings(RuleState())
_NO_AVERAGES = _memory(0, 0, RuleState(), torch.float32, 0), _NO_SETTINGS, 0.0


def to_table(kept: list[SavedBatch]) -> Tensor:
    """Statistics of all normalization batches as one table, ``(rows, groups of all, K)``."""
    tables = [np.concatenate(list(run.applied), 1) for run in kept]
    return torch.from_numpy(tables[0] if len(tables) == 1 else np.concatenate(tables, 1))


def from_table(spec: MethodSpec, table: Tensor, runs: tuple[Run, ...]) -> list[SavedBatch]:
    """The reverse of `to_table`."""
    found, first, rows = [], 0, table.numpy()
    for _, _, (batches, groups, _), _ in runs:
        some = rows[:, first : first + batches * groups].reshape(len(rows), batches, groups, -1)
        applied: Any = np.ascontiguousarray(some.swapaxes(0, 1))
        found.append(SavedBatch(applied, spec))
        first += batches * groups
    return found
