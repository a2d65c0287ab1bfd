"""What contributes to a batch's statistics, as the loops take it: one tuple of numbers.

Forward ``(stage, mask, counts, earlier mean, earlier variance, outliers, share, total, limit)``,
backward ``(stage, mask, counts, sums, earlier, share)``. The mask ``(N, L)``, counts ``(G,)`` in
float64, rows of earlier micro-batches and how often channels were outliers are addresses, 0 for
none. `share` is this micro-batch's part of the `total` values of its optimizer step so far. A pass
has two halves, `stage` 1 and 2, where processes join their statistics between them, else one, 0.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from anybatch.backends.native_memory import address_of
from anybatch.backends.numba.rules import FIRST, SECOND
from anybatch.backends.protocol import Contribution, MethodSpec

Array = Any
PLAIN = (0, 0, 0, 0, 0, 0, 1.0, 0.0, math.inf)
_BACKWARD = "backward_"  # before the names of an optimizer step's memory of the backward pass
PLAIN_BACKWARD = (0, 0, 0, 0, 0, 1.0)


class LoopScope(NamedTuple):
    """What contributes to the statistics of one normalization batch.

    Attributes:
        counts: Values per channel behind each group's statistics, ``(G,)``.
        mask: Address of its mask; 0 for none.
        group: Joins several processes; None for this one alone.
        layer: See `Contribution`.
        step: See `Contribution`.
        held: What holds the mask.
    """

    counts: Array
    mask: int
    group: Any
    layer: Any
    step: Any
    held: Any


def scope_of(given: Contribution, first: int, group: int, groups: int, length: int) -> LoopScope:
    """That of a normalization batch, which begins at an example and a group of the whole."""
    counts, scope, layer, step = given
    mask, joined = (None, None) if scope is None else (scope.mask, scope.group)
    place = 0 if mask is None else address_of(mask, torch.bool, mask.numel()) + first * length
    values = np.array(counts[group : group + groups], np.float64)
    return LoopScope(values, place, joined and scope, layer, step, mask)


def run_forward(
    run: Callable[[tuple[Any, ...]], None], spec: MethodSpec, scope: LoopScope | None, own: Array
) -> LoopScope | None:
    """The forward of a normalization batch: one call or, of several processes, two.

    `run` takes the tuple, and writes the batch's own statistics into `own`. The scope that is
    returned has the values of all processes.
    """
    limit, outliers = spec.limit, 0
    if spec.outliers is not None:
        outliers = address_of(spec.outliers, torch.int64, own.shape[2])
    if scope is None:
        run(PLAIN if outliers == 0 else (*PLAIN[:5], outliers, 1.0, 0.0, limit))
        return None
    earlier: tuple[int, ...] = (0, 0)
    stage, mask, step, share, total = 0, scope.mask, scope.step, 1.0, 0.0
    if scope.group is not None:
        stage = SECOND
        run((FIRST, mask, scope.counts.ctypes.data, *PLAIN[3:]))
        mean, var = torch.from_numpy(own[0, 0]), torch.from_numpy(own[1, 0])
        values = torch.from_numpy(scope.counts)
        pooled, spread, values = scope.group.pool(mean if spec.centered else None, var, values)
        if pooled is not None:
            mean.copy_(pooled)
        var.copy_(spread)
        scope = scope._replace(counts=values.numpy())
    if step is not None:
        before, *rows = step.earlier("")
        count = float(scope.counts[0])
        total = before + count
        share = count / total
        if before:
            earlier = tuple(address_of(row, row.dtype, own.shape[2]) for row in rows)
    run((stage, mask, scope.counts.ctypes.data, *earlier, outliers, share, total, limit))
    if step is not None:
        step.keep("", before, count, *torch.from_numpy(own[[0, -1], 0]))
    return scope


def run_backward(
    run: Callable[[tuple[Any, ...]], None],
    spec: MethodSpec,
    scope: LoopScope,
    shape: tuple[int, int],
    wanted: bool,
    dtype: torch.dtype,
) -> None:
    """The backward of a normalization batch, of groups and columns by `shape`; see `run_forward`.

    `wanted` says whether the input needs a gradient; processes send sums in a `dtype`.
    """
    counts, mask, averages = scope.counts, scope.mask, spec.method.backward.rule is not None
    through = np.empty((2, *shape))
    sums, stage, row, share = through.ctypes.data, 0, 0, 1.0
    step = scope.step if averages else None
    if scope.group is not None:
        run((FIRST, mask, counts.ctypes.data, sums, 0, 1.0))
        if not wanted and not averages:
            return
        stage = SECOND
        tables = torch.from_numpy(through).to(dtype).unbind()
        whole = scope.group.sum(tables[0] if spec.centered else None, tables[1])
        for table, found in zip(through, whole, strict=True):
            if found is not None:
                table[...] = found.numpy()
    if step is not None:
        step.rewind(scope.layer, _BACKWARD, True)
        before, _, earlier = step.earlier(_BACKWARD)
        count = float(counts[0])
        if before:
            share, row = count / (before + count), address_of(earlier, earlier.dtype, shape[1])
    run((stage, mask, counts.ctypes.data, sums, row, share))
    if step is not None:
        step.keep(_BACKWARD, before, count, None, torch.from_numpy(through[1, 0]))
        step.leave(scope.layer, _BACKWARD, {}, True)
