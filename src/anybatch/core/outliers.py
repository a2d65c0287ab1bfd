"""Channels of a batch that are out of all proportion enter no state."""

from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.backends.rule import PATIENCE, SETTLED


class OutlierGuard(NamedTuple):
    """Compares a batch with the running statistics.

    Attributes:
        limit: Times the running variance that a channel may have.
        eps: Added to the variance.
        running_mean: Running mean.
        running_var: Running variance.
        tracked: Batches that they have seen.
        seen: Batches in a row, per channel, that were out of proportion.
    """

    limit: float
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None
    tracked: Tensor | None
    seen: Tensor

    def admits(self, mean: Tensor | None, var: Tensor, update: bool) -> Tensor:
        """Find the channels of a batch that may enter the state.

        Args:
            mean: Mean of the batch; None in the uncentred form.
            var: Variance, or second moment in the uncentred form.
            update: Whether the count of outliers may change.
        """
        if self.running_mean is None or self.running_var is None:
            return torch.ones_like(var, dtype=torch.bool)
        settled = True if self.tracked is None else self.tracked >= SETTLED
        spread = var if mean is None else var + (mean - self.running_mean).square()
        limit = (self.running_var + self.eps) * self.limit
        far = (spread > limit) & settled
        fits = ~far | (self.seen >= PATIENCE)
        if update:
            far = far if far.dim() == 1 else far.all(0)
            self.seen.copy_(torch.where(far, self.seen + 1, 0))
        return fits
