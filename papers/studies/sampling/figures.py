"""Plots of what batch normalization sampling estimates and costs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anybatch.evaluation.figures import COLOURS, DASHES, MARKERS, blank
from anybatch.tools.run import BASELINE
from papers.studies.sampling.averages import Averages
from papers.studies.sampling.errors import STATISTICS, SampleErrors
from papers.studies.sampling.times import NormShare, PassTime

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def error_figure(errors: Sequence[SampleErrors]) -> "Figure":
    """Errors layer by layer, a line a sample: median and quartiles over the draws."""
    figure = blank(10, 4.2)
    titles = ("error of the mean, in standard deviations", "error of the variance, relative")
    for panel, (statistic, title) in enumerate(zip(STATISTICS, titles, strict=True)):
        axes = figure.add_subplot(1, 2, panel + 1)
        for index, one in enumerate(errors):
            spread = one.spread(statistic)
            layers = range(1, len(spread) + 1)
            style = _style(index + 1)  # black is torch's in the other plots
            axes.plot(layers, [s.middle for s in spread], label=one.sample, markersize=4, **style)
            low, high = [s.low for s in spread], [s.high for s in spread]
            axes.fill_between(layers, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="norm, in the order in which they run", yscale="log")
        axes.set_xticks(range(1, len(errors[0].layers) + 1, 2))
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


def correlation_figure(errors: Sequence[SampleErrors]) -> "Figure":
    """Correlation of the errors of each two layers, a matrix a sample and statistic."""
    figure = blank(2.2 * len(errors) + 1, 5)
    axes = figure.subplots(2, len(errors), squeeze=False)
    for row, statistic in enumerate(STATISTICS):
        for column, one in enumerate(errors):
            drawn = axes[row, column].imshow(
                one.correlation(statistic).numpy(),
                cmap="PuOr_r",
                vmin=-1,
                vmax=1,
                interpolation="nearest",
            )
            name = "mean" if statistic == "mean" else "variance"
            title = f"{one.sample}, {name}\non average {one.between(statistic):.2f}"
            axes[row, column].set_title(title, fontsize=9)
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    figure.supxlabel("norm, in the order in which they run", fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="correlation")
    return figure


def average_figure(averages: Sequence[Averages]) -> "Figure":
    """Errors of running statistics and held-out loss over the newest batch's weight."""
    figure = blank(10, 4.8)
    left, right = figure.subplots(1, 2)
    for index, one in enumerate(averages):
        style = _style(index)
        momenta = [row.momentum for row in one.rows]
        left.plot(momenta, [row.var_error for row in one.rows], label=one.method, **style)
        right.plot(momenta, [row.loss for row in one.rows], **style)
        right.axhline(one.loss, color=style["color"], linewidth=1, linestyle=":")
    left.set(title="error of the running variance", ylabel="relative error", yscale="log")
    right.set(title="with them, at inference", ylabel="held-out loss (dotted: population)")
    lowest = min(one.best.loss for one in averages)
    right.set_ylim(0.9 * lowest, 3 * lowest)  # one that is far off must not flatten the others
    for axes in (left, right):
        axes.set(xlabel="weight of the newest batch (momentum)", xscale="log")
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(averages))
    return figure


def regularity_figure(rows: Sequence[PassTime]) -> "Figure":
    """Time relative to torch's, a bar a pass."""
    shown = [row for row in rows if row.sample != "torch"]
    figure = blank(8, 0.36 * len(shown) + 1.2)
    axes = figure.subplots()
    for height, row in enumerate(reversed(shown)):
        colour = COLOURS[1 + ("batch", "feature", "points").index(row.sample)]
        low, middle, high = row.ratio
        spread = [[middle - low], [high - middle]]
        hatch = "//" if row.index == "redrawn" else ""
        axes.barh(height, middle, color=colour, alpha=0.6, height=0.7, xerr=spread, hatch=hatch)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    names = [f"{row.what}: {row.sample}, {row.index}" for row in reversed(shown)]
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlabel("time, torch.nn.BatchNorm2d = 1 (bars: quartiles)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def share_figure(shares: Mapping[str, Sequence[NormShare]]) -> "Figure":
    """Time of a step by phase, relative to that with torch's norms; a panel a network."""
    most = max(len(rows) for rows in shares.values())
    figure = blank(10, 0.36 * most + 1.4)
    panels = figure.subplots(1, len(shares), squeeze=False)[0]
    for axes, (network, rows) in zip(panels, shares.items(), strict=True):
        base = next((r for r in rows if r.method == BASELINE), rows[-1]).milliseconds["step"]
        for height, row in enumerate(reversed(rows)):
            forward = row.milliseconds["forward"] / base
            backward = row.milliseconds["backward"] / base
            rest = max(row.milliseconds["step"] / base - forward - backward, 0.0)
            left = 0.0
            for index, width in enumerate((forward, backward, rest)):
                colour = COLOURS[(2, 4, 1)[index]]
                label = ("forward", "backward", "optimizer")[index] if not height else None
                axes.barh(height, width, left=left, color=colour, height=0.7, label=label)
                left += width
        axes.set_yticks(range(len(rows)), [row.method for row in reversed(rows)])
        axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set(title=network, xlabel="time of a training step, torch = 1")
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }
