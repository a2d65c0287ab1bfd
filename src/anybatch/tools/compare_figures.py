"""Plots of a comparison, for files and for the report."""

import statistics
from typing import TYPE_CHECKING

from anybatch.tools.compare import Comparison, Line
from anybatch.tools.figures import COLOURS, DASHES, MARKERS, blank
from anybatch.tools.timing import StepTime
from anybatch.tools.training import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(
    comparison: Comparison, lines: list[Line], results: dict[str, Row], names: dict[str, str]
) -> "Figure":
    """Accuracy over the epochs: mean over the seeds, and the band between the worst and the best.

    Args:
        comparison: What was compared.
        lines: The table.
        results: Results by key.
        names: What to call each row.
    """
    figure = blank(8, 5)
    axes = figure.subplots()
    groups = comparison.groups()
    for index, line in enumerate(lines):
        runs = [results[run.key]["epochs"] for run in groups[line.row]]
        epochs = [row["epoch"] for row in runs[0]]
        points = [[100 * run[k]["accuracy"] for run in runs] for k in range(len(epochs))]
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
    """Final accuracy of each row, a point a seed.

    Args:
        lines: The table.
        names: What to call each row.
    """
    figure = blank(8, 0.42 * len(lines) + 1.2)
    axes = figure.subplots()
    for place, line in enumerate(reversed(lines)):
        index = len(lines) - 1 - place
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(place, 100 * line.mean, color=colour, alpha=0.35, height=0.65)
        seeds = [100 * accuracy for accuracy in line.accuracies]
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(seeds, [place] * len(seeds), marker, color=colour, markersize=5, linestyle="")
        axes.annotate(
            f"{100 * line.mean:.1f}",
            (0, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(lines)), [names[line.row] for line in reversed(lines)])
    axes.set_xlabel("held-out accuracy after the last epoch (%); a mark is a seed")
    axes.set_xlim(0, 102)
    axes.grid(axis="x", alpha=0.3)
    return figure


def cost_bars(lines: list[Line], times: dict[str, StepTime], names: dict[str, str]) -> "Figure":
    """Time of a training step relative to torch's batch norm, with quartiles.

    Args:
        lines: The table.
        times: Time of each method.
        names: What to call each row.
    """
    timed = [line for line in lines if line.row in times]
    figure = blank(8, 0.42 * len(timed) + 1.2)
    axes = figure.subplots()
    for place, line in enumerate(reversed(timed)):
        time = times[line.row]
        colour = COLOURS[(lines.index(line)) % len(COLOURS)]
        spread = [[max(time.ratio - time.low, 0.0)], [max(time.high - time.ratio, 0.0)]]
        axes.barh(place, time.ratio, color=colour, alpha=0.5, height=0.65, xerr=spread)
        label = f"{time.ratio:.2f}"
        axes.annotate(label, (0, place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(timed)), [names[line.row] for line in reversed(timed)])
    axes.set_xlabel("time of a training step, torch.nn.BatchNorm = 1 (bars: quartiles)")
    axes.grid(axis="x", alpha=0.3)
    return figure
