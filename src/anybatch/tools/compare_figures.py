"""Plots of a comparison, for files and for the report."""

import statistics
from typing import TYPE_CHECKING

from anybatch.evaluation.figures import COLOURS, DASHES, MARKERS, blank
from anybatch.tools.compare import Comparison, Line, as_number
from anybatch.tools.timing import StepTime
from anybatch.tools.training import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curves(
    comparison: Comparison, lines: list[Line], results: dict[str, Row], names: dict[str, str]
) -> "Figure":
    """Accuracy over the epochs: mean over the seeds, in the band from the worst to the best."""
    figure = blank(8, 5)
    axes = figure.subplots()
    groups = comparison.groups()
    for index, line in enumerate(lines):
        runs = [results[run.key]["epochs"] for run in groups[line.row]]
        epochs = [row["epoch"] for row in runs[0]]
        points = [[100 * as_number(run[k]["accuracy"]) for run in runs] for k in range(len(epochs))]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            epochs,
            [statistics.fmean(point) for point in points],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            label=names[line.row],
            color=colour,
            linestyle=DASHES[index % len(DASHES)],
        )
        low, high = [min(point) for point in points], [max(point) for point in points]
        axes.fill_between(epochs, low, high, color=colour, alpha=0.1, linewidth=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("held-out accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def accuracy_bars(lines: list[Line], names: dict[str, str]) -> "Figure":
    """Final accuracy of each row, a point a seed."""
    figure, axes = _bars(lines, names, {line.row: 100 * line.mean for line in lines}, ".1f")
    for index, line in enumerate(lines):
        place, seeds = len(lines) - 1 - index, [100 * value for value in line.accuracies]
        marker, colour = MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)]
        axes.plot(seeds, [place] * len(seeds), marker, color=colour, markersize=5, linestyle="")
    axes.set_xlabel("held-out accuracy after the last epoch (%); a mark is a seed")
    axes.set_xlim(0, 102)
    return figure


def cost_bars(lines: list[Line], times: dict[str, StepTime], names: dict[str, str]) -> "Figure":
    """Time of a training step relative to torch's batch norm, with quartiles."""
    timed = {line.row: times[line.row] for line in lines if line.row in times}
    figure, axes = _bars(lines, names, {row: time.ratio for row, time in timed.items()}, ".2f")
    for place, time in enumerate(reversed(timed.values())):
        spread = [[max(time.ratio - time.low, 0.0)], [max(time.high - time.ratio, 0.0)]]
        axes.errorbar([time.ratio], [place], xerr=spread, fmt="none", ecolor="black")
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("time of a training step, torch.nn.BatchNorm = 1 (bars: quartiles)")
    return figure


def _bars(
    lines: list[Line], names: dict[str, str], values: dict[str, float], form: str
) -> "tuple[Figure, Axes]":
    """A bar for each row that has a value, from the bottom up, with the value in it."""
    shown = [line for line in reversed(lines) if line.row in values]
    figure = blank(8, 0.42 * len(shown) + 1.2)
    axes = figure.subplots()
    for place, line in enumerate(shown):
        value, colour = values[line.row], COLOURS[lines.index(line) % len(COLOURS)]
        axes.barh(place, value, color=colour, alpha=0.35, height=0.65)
        text, inside = format(value, form), ((0, place), (6, 0))
        axes.annotate(text, *inside, textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [names[line.row] for line in shown])
    axes.grid(axis="x", alpha=0.3)
    return figure, axes
