"""The values that contribute to a batch's statistics, as loops take them: one tuple of numbers.

Forward ``(mask, counts, step, outliers, limit)``, backward ``(mask, counts, step)``. The mask
``(N, L)``, counts ``(G,)`` in float64 and how often channels were outliers are addresses, 0 for
none. `step` is the memory of an optimizer step of several micro-batches: the address of their
number, how many make a step (0 where only the optimizer tells), and addresses of the values seen
and of their mean and variance.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from anybatch.backends.native_memory import CheckedMemory, address_of
from anybatch.backends.protocol import BACKWARD, Contribution, MethodSpec

Array = Any
_NO_STEP = (0, 0, 0, 0, 0)
PLAIN = (0, 0, _NO_STEP, 0, math.inf)
PLAIN_BACKWARD = (0, 0, _NO_STEP)


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


def forward_numbers(
    spec: MethodSpec, scope: LoopScope | None, known: CheckedMemory, channels: int
) -> tuple[Any, ...]:
    """Return the `scope` argument of the forward loops; `known` caches the step's addresses."""
    outliers = 0 if spec.outliers is None else address_of(spec.outliers, torch.int64, channels)
    if scope is None:
        return (*PLAIN[:3], outliers, spec.limit)
    step = _NO_STEP if scope.step is None else _step_numbers(scope.step, "", known, channels)
    return scope.mask, scope.counts.ctypes.data, step, outliers, spec.limit


def run_backward(
    run: Callable[[tuple[Any, ...]], None],
    spec: MethodSpec,
    scope: LoopScope,
    known: CheckedMemory,
    num_statistics: int,
) -> None:
    """The backward of a normalization batch; see `forward_numbers`. `run` takes the tuple."""
    counts, mask = scope.counts.ctypes.data, scope.mask
    step = None if spec.method.backward.rule is None else scope.step
    if step is None:
        run((mask, counts, _NO_STEP))
        return
    step.rewind(scope.layer, BACKWARD, True)
    run((mask, counts, _step_numbers(step, BACKWARD, known, num_statistics)))
    step.leave(scope.layer, BACKWARD, {}, True)


def _step_numbers(step: Any, way: str, known: CheckedMemory, width: int) -> tuple[int, ...]:
    memory = step.tensors
    tensors = tuple(memory[way + name] for name in ("micro_batches", "count", "mean", "var"))
    found = known.find(tensors)
    if found is None:
        done, *rows = tensors
        dtype, widths = rows[0].dtype, (1, width, width)
        places = [address_of(row, dtype, n) for row, n in zip(rows, widths, strict=True)]
        found = known.keep(tensors, (address_of(done, torch.int64, 1), places))
    done, places = found
    return (done, step.steps if step.counts else 0, *places)
