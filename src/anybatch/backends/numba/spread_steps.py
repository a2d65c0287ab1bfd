# mypy: disable-error-code="no-untyped-call"
"""Batches of a norm by another spread: L1 and range."""

import numpy as np
from torch import Tensor

from anybatch.backends.numba import spread
from anybatch.backends.numba.arrays import LIKE
from anybatch.backends.numba.norm_batches import (
    BackwardData,
    BatchLoops,
    ForwardData,
    Places,
    SavedBatch,
    Size,
)
from anybatch.backends.protocol import NormCall


def obstacle(call: NormCall, x: Tensor) -> None:
    """Why the loops cannot serve a batch; they can."""


class SpreadLoops(BatchLoops):
    """The batches of such a norm, each in one compiled call a pass."""

    def run_forward(
        self, call: NormCall, data: ForwardData, size: Size, places: Places, given: None
    ) -> SavedBatch:
        applied = np.empty((1, 2, 1, self.channels))
        ends = spread.ends(LIKE[self.kept], self.channels)
        constants = places[2:], call.update_weight, call.eps, call.update
        spread.spread_forward(spread.KINDS[call.spec.name], data, applied[0], ends, *constants)
        return SavedBatch(applied, ends=ends)

    def run_backward(
        self, call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Tensor
    ) -> None:
        kind = spread.KINDS[call.spec.name]
        spread.spread_backward(kind, data, kept.applied[0], kept.ends, call.eps)


prepare = SpreadLoops
