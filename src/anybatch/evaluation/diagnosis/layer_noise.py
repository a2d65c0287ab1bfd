"""The noise of one norm's statistics, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 40


@dataclass(frozen=True)
class Spread:
    """The noise of one statistic of one layer, root mean square over its channels.

    Attributes:
        measured: Standard deviation from batch to batch.
        expected: That of batches of the same examples drawn at random, from how the examples
            scatter; it knows of correlated positions and of heavy tails.
        independent: That of independent Gaussian values, from their number alone.

    Example:
        >>> Spread(0.5, 0.5, 0.25).equivalent
        4.0
    """

    measured: float
    expected: float
    independent: float

    @property
    def equivalent(self) -> float:
        """The number of independent values whose mean is as noisy."""
        return math.inf if self.measured == 0 else 1 / self.measured**2


@dataclass(frozen=True)
class Histogram:
    """A histogram of a quantity over all channels.

    Attributes:
        low: Lower end.
        high: Upper end.
        counts: In bins of equal width; what is outside is in none.
        total: Of all values, those outside too.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class LayerNoise:
    """The measurements of one norm.

    Attributes:
        name: Its path in the network (the first, where it has several).
        kind: Its class.
        channels: Channels.
        dead: Channels that are constant, or not finite; they are left out of all that follows.
        examples: Examples that share statistics.
        values: Values per channel behind its statistics.
        effective: Independent values that are as good, for the mean.
        mean: Noise of the mean (xi_mu); None for a norm that subtracts none.
        var: Noise of the variance (xi_sigma), or of the second moment where there is no mean.
        g: Noise of the backward statistic g; None without a loss or a mean.
        psi: Noise of Psi; None without a loss.
        output: Root mean square difference between the output of a batch's statistics and that
            of all data's; the output's own is 1. The noise that training adds.
        gap: The same between a batch's and the running statistics: training against evaluation.
            None where there are no running statistics, or they are as they started.
        stale: The same between all data's and the running statistics; None likewise.
        stale_limit: What `stale` may be from the noise of both alone.
        disparity: Difference between its output in the network in training and in evaluation mode,
            in units of the output's standard deviation. None for a fresh network.
        seam: Change of its output in evaluation where the halves of an image are normalized apart.
        mean_histogram: Of xi_mu; None where there is no mean.
        var_histogram: Of xi_sigma.
    """

    name: str
    kind: str
    channels: int
    dead: int
    examples: int
    values: float
    effective: float
    mean: Spread | None
    var: Spread
    g: Spread | None
    psi: Spread | None
    output: float
    gap: float | None
    stale: float | None
    stale_limit: float
    disparity: float | None
    seam: float | None
    mean_histogram: Histogram | None
    var_histogram: Histogram

    @property
    def forward_values(self) -> float:
        """Independent Gaussian values that are as noisy as the noisier of mean and variance."""
        of_var = math.inf if self.var.measured == 0 else 2 / self.var.measured**2
        return of_var if self.mean is None else min(self.mean.equivalent, of_var)

    @property
    def backward_values(self) -> float | None:
        """The same on the way back, of the noisier of g and Psi; None without a loss."""
        found = [spread.equivalent for spread in (self.g, self.psi) if spread is not None]
        return min(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        derived = {"forward_values": self.forward_values, "backward_values": self.backward_values}
        return {**asdict(self), **derived}


def histogram(xi: Tensor, std: float, center: float = 0.0) -> Histogram:
    """Count values in bins over four standard deviations to either side of a center."""
    low, high = center - 4 * std, center + 4 * std
    if center:
        low = max(low, 0.0)
    if high <= low:
        high = low + 1.0
    counts = torch.histc(xi.flatten(), BINS, low, high)
    return Histogram(low, high, tuple(int(count) for count in counts), xi.numel())
