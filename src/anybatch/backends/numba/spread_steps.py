# mypy: disable-error-code="no-untyped-call"
"""Batches of a norm by another spread: L1 and range."""

import numpy as np
from torch import Tensor

from anybatch.backends.native_memory import running_addresses
from anybatch.backends.numba import spread
from anybatch.backends.numba.arrays import LIKE
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
from anybatch.backends.protocol import NormCall


def obstacle(call: NormCall, x: Tensor) -> None:
    """Why the loops cannot serve a batch; they can."""


def prepare(call: NormCall, x: Tensor) -> Work:
    """How batches of this shape and layout go through the loops."""
    return work_for(call, x, forward_batch, backward_batch)


def forward_batch(
    call: NormCall, data: ForwardData, number: tuple[int, int], state: tuple[Tensor, ...]
) -> SavedBatch:
    """The forward of one normalization batch, in one compiled call."""
    running = running_addresses(state, state[0].dtype, call.num_statistics)
    applied = np.empty((1, 2, 1, call.num_statistics))
    ends = spread.ends(LIKE[state[0].dtype], call.num_statistics)
    constants = running, call.update_weight, call.eps, call.update
    spread.spread_forward(spread.KINDS[call.spec.name], data, applied[0], ends, *constants)
    return SavedBatch(applied, ends=ends)


def backward_batch(call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Tensor) -> None:
    """The backward of one normalization batch, in one compiled call."""
    kind = spread.KINDS[call.spec.name]
    spread.spread_backward(kind, data, kept.applied[0], kept.ends, call.eps)
