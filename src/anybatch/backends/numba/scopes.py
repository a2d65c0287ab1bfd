"""The values that contribute to a batch's statistics, as loops take them: one tuple of numbers.

Forward ``(mask, counts, earlier mean, earlier variance, outliers, share, total, limit)``, backward
``(mask, counts, psis, earlier, share)``. The mask ``(N, L)``, counts ``(G,)`` in
float64, rows of earlier micro-batches and how often channels were outliers are addresses, 0 for
none. `share` is this micro-batch's part of the `total` values of its optimizer step so far.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from anybatch.backends.native_memory import address_of
from anybatch.backends.protocol import Contribution, MethodSpec

Array = Any
PLAIN = (0, 0, 0, 0, 0, 1.0, 0.0, math.inf)
_BACKWARD = "backward_"  # before the names of an optimizer step's memory of the backward pass
PLAIN_BACKWARD = (0, 0, 0, 0, 1.0)


class LoopScope(NamedTuple):
    """The values that contribute to the statistics of one normalization batch.

    Attributes:
        counts: Values per channel behind each group's statistics, ``(G,)``.
        mask: Address of its mask; 0 for none.
        layer: See `Contribution`.
        step: See `Contribution`.
        held: What holds the mask.
    """

    counts: Array
    mask: int
    layer: Any
    step: Any
    held: Any


def scope_of(given: Contribution, first: int, group: int, groups: int, length: int) -> LoopScope:
    """That of a normalization batch, which begins at an example and a group of the whole."""
    counts, scope, layer, step = given
    mask = None if scope is None or scope.mask is None else scope.mask.contiguous()
    place = 0 if mask is None else address_of(mask, torch.bool, mask.numel()) + first * length
    values = np.array(counts[group : group + groups], np.float64)
    return LoopScope(values, place, layer, step, mask)


def run_forward(
    run: Callable[[tuple[Any, ...]], None], spec: MethodSpec, scope: LoopScope | None, own: Array
) -> None:
    """The forward of a normalization batch.

    `run` takes the tuple, and writes the batch's own statistics into `own`.
    """
    limit, outliers = spec.limit, 0
    if spec.outliers is not None:
        outliers = address_of(spec.outliers, torch.int64, own.shape[2])
    if scope is None:
        run((*PLAIN[:4], outliers, 1.0, 0.0, limit))
        return
    earlier: tuple[int, ...] = (0, 0)
    step, share, total = scope.step, 1.0, 0.0
    if step is not None:
        before, *rows = step.earlier("")
        count = float(scope.counts[0])
        total = before + count
        share = count / total
        if before:
            earlier = tuple(address_of(row, row.dtype, own.shape[2]) for row in rows)
    run((scope.mask, scope.counts.ctypes.data, *earlier, outliers, share, total, limit))
    if step is not None:
        _keep(step, "", before, count, own[0, 0], own[-1, 0])


def run_backward(
    run: Callable[[tuple[Any, ...]], None], spec: MethodSpec, scope: LoopScope, num_statistics: int
) -> None:
    """The backward of a normalization batch; see `run_forward`."""
    counts, mask = scope.counts.ctypes.data, scope.mask
    step = None if spec.method.backward.rule is None else scope.step
    if step is None:
        run((mask, counts, 0, 0, 1.0))
        return
    psis, row, share = np.empty((1, num_statistics)), 0, 1.0
    step.rewind(scope.layer, _BACKWARD, True)
    before, _, earlier = step.earlier(_BACKWARD)
    count = float(scope.counts[0])
    if before:
        share = count / (before + count)
        row = address_of(earlier, earlier.dtype, num_statistics)
    run((mask, counts, psis.ctypes.data, row, share))
    _keep(step, _BACKWARD, before, count, None, psis[0])
    step.leave(scope.layer, _BACKWARD, {}, True)


def _keep(step: Any, way: str, before: float, count: float, mean: Array | None, var: Array) -> None:
    """Keep the statistics of a step's micro-batches with one of so many values, if finite."""
    if not np.isfinite(var).all():
        step.keep_numbers(way, before, None, None)
        return
    first = None if mean is None else torch.from_numpy(mean)
    step.keep_numbers(way, before + count, first, torch.from_numpy(var))
