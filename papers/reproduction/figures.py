"""Plots of what was reproduced, with the papers' numbers where they give them."""

import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from anybatch.evaluation.figures import COLOURS, DASHES, MARKERS, blank
from anybatch.tools.measurement_figures import ratios
from anybatch.tools.measurements import Measurement
from anybatch.tools.objective import objective
from papers.reproduction import noise_figures
from papers.reproduction.results import Value, rows_of, value
from papers.reproduction.runs import trained
from papers.reproduction.spec import Cell, Reproduction, Size
from papers.reproduction.store import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAPER = "the paper"


def draw(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> "Figure | None":
    """The figure of a reproduction.

    Args:
        one: The reproduction.
        size: What was trained.
        rows: Of the store.

    Returns:
        The figure; None where nothing was run.
    """
    if not any(rows_of(cell, rows) for cell in size.cells):
        return None
    figure = _DRAWN[one.figure](one, size, rows)
    figure.suptitle(f"{one.paper}, {one.source.lower()}", fontsize=10)
    return figure


def _ours(one: Reproduction, size: Size, cell: Cell | None, rows: Mapping[str, Row]) -> Any:
    return None if cell is None else value(cell, one.unit, size.seeds, rows)


def _lines(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> "Figure":
    """A line per row over the columns; the paper's are dotted, with hollow marks."""
    figure = blank(8, 4.6)
    axes = figure.subplots()
    theirs = False
    for index, name in enumerate(size.rows):
        cells = [size.cell(name, column) for column in size.columns]
        style = _style(index)
        found = [(x, _ours(one, size, cell, rows)) for x, cell in enumerate(cells)]
        there: list[tuple[int, Value]] = [(x, ours) for x, ours in found if ours is not None]
        axes.errorbar(
            [x for x, _ in there],
            [ours.mean for _, ours in there],
            [ours.spread for _, ours in there],
            label=name,
            capsize=3,
            **style,
        )
        cited = [(x, c.paper[0]) for x, c in enumerate(cells) if c is not None and c.paper]
        if cited:
            hollow = {**style, "linestyle": ":", "markerfacecolor": "none", "alpha": 0.7}
            axes.plot([x for x, _ in cited], [y for _, y in cited], **hollow)
            theirs = True
    if theirs:
        axes.plot([], [], "k:o", markerfacecolor="none", label=_PAPER)
    wide = max(map(len, size.columns)) > 8
    axes.set_xticks(
        range(len(size.columns)),
        size.columns,
        rotation=20 if wide else 0,
        ha="right" if wide else "center",
    )
    axes.set_xlabel(one.across)
    _finish(axes, one)
    return figure


def _bars(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> "Figure":
    """Draw a bar per row and column, a mark per seed, and a stroke for the paper's number."""
    figure = blank(4 + 4 * len(size.columns), 0.42 * len(size.rows) + 1.4)
    panels = figure.subplots(1, len(size.columns), squeeze=False, sharey=True)[0]
    places = range(len(size.rows))
    for axes, column in zip(panels, size.columns, strict=True):
        theirs = False
        for place, name in zip(places, reversed(size.rows), strict=True):
            index = len(size.rows) - 1 - place
            cell = size.cell(name, column)
            ours = _ours(one, size, cell, rows)
            colour = COLOURS[index % len(COLOURS)]
            if ours is not None:
                axes.barh(place, ours.mean, color=colour, alpha=0.35, height=0.65)
                marks = MARKERS[index % len(MARKERS)]
                axes.plot(
                    ours.values,
                    [place] * len(ours.values),
                    marks,
                    color=colour,
                    markersize=5,
                    linestyle="",
                )
                _inside(axes, place, f"{ours.mean:.1f}")
            else:
                _inside(axes, place, "not run")
            if cell is not None and cell.paper is not None:
                axes.plot([cell.paper[0]] * 2, [place - 0.38, place + 0.38], "k-", linewidth=2)
                theirs = True
        axes.set_xlabel(f"{one.unit} (%), {column}" + ("; stroke: the paper" if theirs else ""))
        axes.set_yticks(places, list(reversed(size.rows)))
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlim(left=0)
    return figure


def _inside(axes: "Axes", place: int, text: str) -> None:
    axes.annotate(
        text, (0, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
    )


def _curves(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> "Figure":
    """The number over the epochs: mean over the seeds, and the band from the worst to the best."""
    figure = blank(2 + 5 * len(size.columns), 4.4)
    panels = figure.subplots(1, len(size.columns), squeeze=False)[0]
    for axes, column in zip(panels, size.columns, strict=True):
        for index, name in enumerate(size.rows):
            cell = size.cell(name, column)
            found = [] if cell is None else rows_of(cell, rows)
            if cell is None or not found:
                continue
            curves = [row["result"][objective(trained(cell.run)).curve] for row in found]
            points = [[100 * a for a in epoch] for epoch in zip(*curves, strict=True)]
            if one.unit == "error":
                points = [[100 - a for a in epoch] for epoch in points]
            epochs = range(1, len(points) + 1)
            style = {**_style(index), "markersize": 3 if len(points) < 30 else 0}
            axes.plot(epochs, [statistics.fmean(p) for p in points], label=name, **style)
            low, high = [min(p) for p in points], [max(p) for p in points]
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.1, linewidth=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(f"epoch ({column})")
        _finish(axes, one)
    return figure


def _weights(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> "Figure":
    """Accuracy and loss over the example weight, mean over halves and seeds."""
    figure = blank(10, 4)
    panels = figure.subplots(1, 2)
    tuned = [cell for cell in size.cells if cell.measure == "tuned"]
    for index, cell in enumerate(tuned):
        weighings = [row["result"]["weighing"] for row in rows_of(cell, rows)]
        if not weighings:
            continue
        alphas = weighings[0]["alphas"]
        for axes, metric, scale in zip(panels, ("top1", "loss"), (100, 1), strict=True):
            halves = [half[metric] for weighing in weighings for half in weighing["halves"]]
            means = [scale * statistics.fmean(point) for point in zip(*halves, strict=True)]
            axes.plot(alphas, means, label=cell.row, **_style(index))
            axes.axvline(weighings[0]["plain"], color="#7F7F7F", linestyle=":", linewidth=1)
    for axes, label in zip(panels, ("held-out accuracy (%)", "held-out loss"), strict=True):
        axes.set_xlabel("example weight; dotted: the network as it is")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _ratios(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> "Figure":
    """Draw the cost of each method with quartiles, one panel per question."""
    row = rows_of(size.cells[0], rows)[0]
    return ratios([Measurement(**costs) for costs in row["result"]["costs"]])


_DRAWN: dict[str, Callable[[Reproduction, Size, Mapping[str, Row]], "Figure"]] = {
    "lines": _lines,
    "bars": _bars,
    "curves": _curves,
    "weights": _weights,
    "ratios": _ratios,
    "series": noise_figures.series,
    "noise": noise_figures.noise,
}


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.6,
        "markersize": 5,
    }


def _finish(axes: "Axes", one: Reproduction) -> None:
    axes.set_ylabel(f"held-out {one.unit} (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
