"""Images of the statistics that a training recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anybatch.evaluation.figures import COLOURS, blank
from papers.reproduction.readings import law
from papers.reproduction.results import rows_of
from papers.reproduction.runs import RecordedRun
from papers.reproduction.spec import Cell, Reproduction, Size
from papers.reproduction.store import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 30
_POINTS = 200  # of a curve


def series(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> Figure:
    """Norms of statistics along the steps: a panel per row, lines of few examples and of all.

    Args:
        one: The reproduction.
        size: What was trained.
        rows: Of the store; of several seeds the first is drawn.

    Returns:
        The figure.
    """
    figure = blank(10, 2.6 * (len(size.rows) + 1) // 2 + 0.6)
    panels = figure.subplots((len(size.rows) + 1) // 2, 2, squeeze=False)
    for panel, name in zip(panels.flat, size.rows, strict=False):
        cells = [cell for cell in size.cells if cell.row == name]
        _panel(panel, name, cells, rows)
    for panel in list(panels.flat)[len(size.rows) :]:
        panel.set_axis_off()
    panels.flat[0].legend(frameon=False, fontsize=9)
    return figure


def _panel(panel: Axes, name: str, cells: list[Cell], rows: Mapping[str, Row]) -> None:
    for cell in cells:
        quantity, _, statistic = cell.measure.partition(" of ")
        run, found = cell.run, rows_of(cell, rows)
        if not found:
            continue
        assert isinstance(run, RecordedRun)
        noted = found[0]["result"]["series"]
        few = run.norm_batch_size or run.batch_size
        averaged = quantity == "average's error"
        label = f"average over {run.window} batches of {few}" if averaged else f"batch of {few}"
        which, colour = ("average", COLOURS[3]) if averaged else ("batch", COLOURS[2])
        _line(panel, noted, f"{statistic}, {which}", label, colour)
        if cell is cells[-1]:
            whole = f"batch of {run.reference or run.batch_size}"
            _line(panel, noted, f"{statistic}, whole", whole, COLOURS[1])
    panel.set(title=name, xlabel="step", ylabel="norm over the channels")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def _line(panel: Axes, noted: Mapping[str, Any], name: str, label: str, colour: str) -> None:
    panel.plot(noted["step"], noted[name], label=label, color=colour, linewidth=0.9)


def noise(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> Figure:
    """Mean and variance of one channel step by step, and their distributions with the laws.

    Args:
        one: The reproduction.
        size: What was trained.
        rows: Of the store; of several seeds the first is drawn.

    Returns:
        The figure.
    """
    import torch

    figure = blank(10, 2.8 * len(size.rows))
    panels = figure.subplots(
        len(size.rows), 2, squeeze=False, sharey="row", gridspec_kw={"width_ratios": (3, 1)}
    )
    for (points, bars), name in zip(panels, size.rows, strict=True):
        cell = next(cell for cell in size.cells if cell.row == name)
        found = rows_of(cell, rows)
        if not found:
            continue
        statistic = cell.measure.partition(" of ")[2]
        noted = found[0]["result"]["series"]
        squares, colour = statistic == "variance", COLOURS[4 if statistic == "variance" else 3]
        points.plot(noted["step"], noted[statistic], ".", color=colour, markersize=3)
        points.set(title=name, xlabel="step", ylabel=f"{statistic} of a batch")
        bars.hist(
            noted[statistic], _BINS, density=True, orientation="horizontal", color=colour, alpha=0.4
        )
        values = torch.tensor(noted[statistic], dtype=torch.float64)
        at = torch.linspace(float(values.min()), float(values.max()), _POINTS + 1).double()
        density = law(at, values, squares).diff() / at.diff()
        middles = (at[1:] + at[:-1]) / 2
        law_name = "chi-square" if squares else "Gaussian"
        bars.plot(density.tolist(), middles.tolist(), color="black", linewidth=1.2, label=law_name)
        bars.set(xlabel="density")
        bars.legend(frameon=False, fontsize=9)
        for axes in (points, bars):
            axes.grid(alpha=0.3)
    return figure
