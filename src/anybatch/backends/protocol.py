"""What a method tells kernels that are a whole layer: its rule, its numbers, its memory."""

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

PLAIN, RENORM, MOMENTUM, WINDOW = 0, 1, 2, 3  # how statistics are chosen
BATCH, SMA, EMA = 0, 1, 2  # which averages of Psi the backward pass takes
AVERAGES = {"batch": BATCH, "sma": SMA, "ema": EMA}

# How a batch is cut: examples of each group, groups and examples of each normalization batch.
Cut = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=256)
def walk(cut: Cut) -> tuple[tuple[int, int, int, tuple[int, ...]], ...]:
    """First example, first group, examples and sizes of the groups of each normalization batch."""
    sizes, numbers, batches = cut
    found, first, group = [], 0, 0
    for examples, number in zip(batches, numbers, strict=True):
        found.append((first, group, examples, sizes[group : group + number]))
        first, group = first + examples, group + number
    return tuple(found)


class Recipe(NamedTuple):
    """How a method chooses its statistics, and where it remembers them.

    Statistics that a forward used are rows of one table: mean, variance, then RENORM's r and d,
    MOMENTUM's own mean and own share, or WINDOW's r and whether Psi is the batch's own.

    Attributes:
        kind: The rule.
        numbers: RENORM's largest r and d; WINDOW's largest r, or 0 for no renormalization.
        steps: RENORM's warm-up steps; WINDOW's length, warm-up steps and renorm warm-up steps.
        smooth: Whether RENORM's limits open evenly.
        mean: MOMENTUM's average of means.
        var: MOMENTUM's average of variances.
        window: WINDOW's recent second moments, ``(length, C)``; None for none.
        counter: Steps of the memory.
        keep: MOMENTUM's weight of the old averages.
        averages: BATCH, SMA or EMA.
        psi: A window of Psi, ``(length, C)``, or its exponential average.
        psi_counter: Steps in it.
    """

    kind: int = PLAIN
    numbers: tuple[float, float] = (0.0, 0.0)
    steps: tuple[int, int, int] = (0, 0, 0)
    smooth: bool = False
    mean: Tensor | None = None
    var: Tensor | None = None
    window: Tensor | None = None
    counter: Tensor | None = None
    keep: Tensor | None = None
    averages: int = BATCH
    psi: Tensor | None = None
    psi_counter: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the table of statistics."""
        return 2 if self.kind == PLAIN else 4


class Course(NamedTuple):
    """How a layer goes through a batch, forward and backward.

    Attributes:
        recipe: The method.
        cut: How the batch is cut.
        columns: Statistics that a group of examples has.
        last: Whether channels are last in memory.
        pace: Weight of the newest batch; below 0 for the mean of all.
        eps: Added to the variance.
        update: Whether state may change.
    """

    recipe: Recipe
    cut: Cut
    columns: int
    last: bool
    pace: float
    eps: float
    update: bool
