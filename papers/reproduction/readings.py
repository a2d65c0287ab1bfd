"""Numbers of rows that hold measurements: costs of methods, and noise of statistics."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from papers.reproduction.runs import CostRun, RecordedRun


class Cost(NamedTuple):
    """The question of a column in a table of costs.

    Attributes:
        question: Names in `anybatch.tools.bench.QUESTIONS`.
        speed: Whether it is told as a speed, of which more is better.
    """

    question: str
    speed: bool = False


COSTS: Mapping[str, Cost] = {
    "memory": Cost("memory"),
    "kept": Cost("kept"),
    "peak": Cost("peak"),
    "flops": Cost("flops"),
    "folded flops": Cost("folded flops"),
    "training speed": Cost("step", speed=True),
    "inference speed": Cost("inference", speed=True),
    "folded inference speed": Cost("folded", speed=True),
}
STATISTICS = ("mean", "variance", "second moment", "g", "Psi")
NOISE = ("error", "average's error", "spread", "values", "distance")


class MeasuredValue(NamedTuple):
    """A number that was measured, and how it is written.

    Attributes:
        value: The number.
        text: As a table has it.
    """

    value: float
    text: str


def of_costs(
    result: Mapping[str, Any], run: CostRun, label: str, measure: str
) -> MeasuredValue | None:
    """Return the cost of a method as a part of the first one's.

    Args:
        result: Of a row.
        run: What was measured.
        label: Of the method.
        measure: Of `COSTS`.

    Returns:
        The ratio, with its quartiles over the rounds where it was timed; of the first method the
        amount itself is told, too. None where it could not be measured.
    """
    asked = COSTS[measure]
    rows = [m for m in result["costs"] if (m["question"], m["name"]) == (asked.question, label)]
    if not rows:
        return None
    row = rows[0]
    middle, low, high = (row[key] for key in ("ratio", "ratio_low", "ratio_high"))
    if asked.speed:
        middle, low, high = 1 / middle, 1 / high, 1 / low
    if label == run.methods[0][0]:
        return MeasuredValue(1.0, f"1 = {_amount(row['value'], row['unit'], asked.speed)}")
    spread = f" ({low:.2f} to {high:.2f})" if asked.speed else ""
    return MeasuredValue(middle, f"{middle:.2f}{spread}" if asked.speed else f"{middle:.3f}")


def _amount(value: float, unit: str, speed: bool) -> str:
    """Megabytes, millions of operations, or calls a second.

    >>> _amount(123.4, "MB", False), _amount(50.0, "ms", True), _amount(12345.0, "MFLOP", False)
    ('123 MB', '20 /s', '12.3 GFLOP')
    """
    if speed:
        return f"{1e3 / value:.3g} /s"
    if value >= 1000:
        value, unit = value / 1000, unit.replace("M", "G")
    return f"{value:.3g} {unit}"


def of_noise(result: Mapping[str, Any], run: RecordedRun, measure: str) -> MeasuredValue:
    """A number of the statistics that a training recorded.

    ::

        error          = mean |s - w| / mean |w|     s of a normalization batch, w of the whole one
        average's ...  = mean |a - w| / mean |w|     a the moving average
        spread         = std((mu - m) / sigma), std(v / sigma^2)     of one channel, from its own
        values         = 1 / spread^2, 2 / spread^2                  as many are as noisy
        distance       = max |F - F_0|

    with ``|.|`` the Euclidean norm over the channels, F the distribution of what was recorded and
    F_0 the Gaussian, for the variance the scaled chi-square, of the same mean and variance.

    Args:
        result: Of a row.
        run: What was trained.
        measure: "QUANTITY of STATISTIC", of `NOISE` and `STATISTICS`.

    Returns:
        The number.

    Source: moving-average-bn, figures 2 to 4; momentum-bn, equation 2 and figure 1.
    """
    quantity, _, statistic = measure.partition(" of ")
    series = result["series"]
    if run.keeps == "norms":
        whole = statistics.fmean(series[f"{statistic}, whole"])
        which = "average" if quantity == "average's error" else "batch"
        error = statistics.fmean(series[f"{statistic}, error of {which}"]) / whole
        return MeasuredValue(error, f"{error:.2f}")
    means, variances = series["mean"], series["variance"]
    unit = statistics.fmean(variances)
    if statistic == "mean":
        spread, values = _spread(means, unit**0.5)
    else:
        spread, _ = _spread(variances, unit)
        values = 2 / spread**2 if spread else math.inf
    if quantity == "spread":
        return MeasuredValue(spread, f"{spread:.3f}")
    if quantity == "values":
        return MeasuredValue(values, f"{values:.0f}")
    found = distance(means if statistic == "mean" else variances, statistic == "variance")
    return MeasuredValue(found, f"{found:.3f} (random: {1.36 / len(means) ** 0.5:.3f})")


def _spread(values: Sequence[float], unit: float) -> tuple[float, float]:
    spread = statistics.stdev(values) / unit
    return spread, 1 / spread**2 if spread else math.inf


def distance(values: Sequence[float], squares: bool) -> float:
    """Distance of the distribution of values from the law of a batch's mean or variance.

    Args:
        values: The values.
        squares: Compare with a scaled chi-square; else with a Gaussian.

    Returns:
        The largest difference of the distribution functions (Kolmogorov and Smirnov's); of values
        that follow a given law 19 in 20 samples are below ``1.36 / sqrt(n)``, less where, as here,
        mean and variance are their own.

    Example:
        >>> distance([-1.0, 0.0, 1.0], squares=False) < 0.3
        True
    """
    import torch

    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    expected = law(ordered, ordered, squares)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum(expected - steps[:-1], steps[1:] - expected).max())


def law(at: Any, values: Any, squares: bool) -> Any:
    """The distribution function, with mean and variance of some values.

    Args:
        at: Where, a tensor.
        values: The values, a tensor.
        squares: Of the scaled chi-square, whose degrees of freedom are twice the squared mean over
            the variance; else of the Gaussian.

    Returns:
        Probabilities.
    """
    import torch

    mean, var = values.mean(), values.var(correction=0)
    if not squares:
        return torch.special.ndtr((at - mean) / var.sqrt())
    shape = mean.square() / var
    return torch.special.gammainc(shape, (at * mean / var).clamp(min=0))
