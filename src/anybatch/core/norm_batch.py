"""A normalization batch as rules see it, and whether forwards change state."""

import threading
from typing import Any, NamedTuple

from torch import Tensor

from anybatch import backends
from anybatch.core.gradient_accumulation import AccumulatedMoments


class Moments(NamedTuple):
    """Mean and variance of groups of examples, and how many values they come from.

    Attributes:
        mean: Row ``(C,)``, or table ``(G, C)`` of several groups; None in the uncentered form.
        var: Biased variance, or second moment in the uncentered form.
        counts: Values per channel behind each, a number or ``(G, 1)``; None where these are all
            values of the groups, and more than one each.
    """

    mean: Tensor | None
    var: Tensor
    counts: Tensor | None = None

    def at(self, rows: Any) -> "Moments":
        """Those of some groups."""
        mean, var, counts = self
        return Moments(
            None if mean is None else mean[rows],
            var[rows],
            None if counts is None else counts[rows],
        )


class Batch(NamedTuple):
    """A normalization batch, as rules see it.

    Attributes:
        sizes: Examples in each of its groups.
        values: Values that an example gives to a channel.
        seen: What its optimizer step has seen, where several forwards make one; the statistics
            that a rule gets are then those of all of them.
        counts: Values a channel behind each group's statistics, a number or a column ``(G, 1)``,
            where these are not simply those of its examples; see `ReductionScope`.
    """

    sizes: tuple[int, ...]
    values: int
    seen: AccumulatedMoments | None = None
    counts: Tensor | None = None

    def examples(self) -> int:
        """Examples in all groups."""
        return sum(self.sizes)

    def is_one_value(self) -> bool:
        """True where it gives one value per channel, which has no variance."""
        return self.examples() * self.values == 1

    def number(self) -> int | Tensor:
        """Values a channel behind the statistics of a single group, in this forward."""
        return self.examples() * self.values if self.counts is None else self.counts

    def unbiased(self, var: Tensor) -> Tensor:
        """Bessel's correction of a single group's variance; NaN where one value has none."""
        if self.seen is not None:
            return var * (self.seen.total / (self.seen.total - 1).clamp_(min=1))
        if self.counts is not None:
            return var * (self.counts / (self.counts - 1))
        count = self.examples() * self.values
        return var * backends.scalar(count / (count - 1)) if count > 1 else var


class _Updates(threading.local):
    """The setting by which forwards of this thread change the state of layers.

    The value is set on the object and not on its class: a compiled graph that reads it from the
    class has no guard that fails when the object gets a value of its own.
    """

    def __init__(self) -> None:
        self.enabled = True


updates = _Updates()
