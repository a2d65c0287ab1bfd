"""Images of measurements: ratios to the baseline, a mark per case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anybatch.evaluation.figures import COLOURS, MARKERS, blank
from anybatch.tools.measurements import SHARES, Measurement, cases, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACROSS = 3  # panels side by side
_WORDS = {
    "layer": "a layer, forward and backward",
    "way": "a layer in other ways, forward and backward",
    "step": "a training step",
    "inference": "inference",
    "kept": "memory kept for backward",
    "peak": "most memory at a time",
    "memory": "memory of training",
    "flops": "operations of a training step",
    "folded": "inference, folded",
    "folded flops": "operations of inference, folded",
    "forward": "forward: bandwidth",
    "backward": "backward: bandwidth",
    "import": "import",
}
_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0, 100.0)


def ratios(rows: Sequence[Measurement]) -> Figure:
    """The ratio of each row to its baseline: a panel per question, precision and mode.

    Returns:
        The figure; a line of a panel is a name, a mark per case, filled where channels come first,
        with its quartiles.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows=[]: give one or more")
    parts = list(tables(rows).values())
    names = list(dict.fromkeys(row.name for row in rows))
    across = min(len(parts), 2 if len(parts) == 4 else _ACROSS)
    down = math.ceil(len(parts) / across)
    looks = _looks(rows)
    height = (0.3 * len(names) + 1.0) * down + 0.28 * math.ceil(len(looks) / (2 * across)) + 0.3
    figure = blank(2.2 + 4.2 * across, height)
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for panel, part in zip(panels.flat, parts, strict=False):
        _panel(panel, part, names, looks)
    for panel in list(panels.flat)[len(parts) :]:
        panel.set_axis_off()
    handles = [_mark(panels[0][0], [], [], look, label) for label, look in looks.items()]
    figure.legend(
        handles,
        list(looks),
        loc="outside lower center",
        ncols=2 * across,
        frameon=False,
        fontsize=8,
    )
    return figure


def _looks(rows: Sequence[Measurement]) -> dict[str, tuple[str, str, bool]]:
    """Colour and marker of each case, and whether it is filled."""
    known = list(dict.fromkeys(row.case for row in rows))
    found = {}
    for case, form in cases(rows):
        index = known.index(case)
        look = (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], form == "contiguous")
        found[_label(case, form)] = look
    return found


def _label(case: str, form: str) -> str:
    return case if form == "contiguous" else f"{case}, {form.replace('_', ' ')}"


def _mark(panel: Any, x: Any, y: Any, look: tuple[str, str, bool], label: str) -> Any:
    colour, marker, filled = look
    face = colour if filled else "white"
    return panel.plot(
        x, y, marker, color=colour, markerfacecolor=face, markersize=5, linestyle="", label=label
    )[0]


def _panel(
    panel: Any, rows: Sequence[Measurement], names: list[str], looks: dict[str, Any]
) -> None:
    labels = list(looks)
    for row in rows:
        label = _label(row.case, row.format)
        place = len(labels) / 2 - labels.index(label) - 0.5
        y = len(names) - 1 - names.index(row.name) + 0.7 * place / len(labels)
        panel.plot([row.ratio_low, row.ratio_high], [y, y], color=looks[label][0], linewidth=1)
        _mark(panel, [row.ratio], [y], looks[label], label)
    first = rows[0]
    panel.set_title(_WORDS.get(first.question, first.question), fontsize=10)
    panel.axvline(1.0, color="black", linewidth=1, linestyle="--")
    panel.set_yticks(range(len(names)), list(reversed(names)))
    panel.set_ylim(-0.6, len(names) - 0.4)
    panel.tick_params(labelsize=9)
    for line in range(1, len(names)):
        panel.axhline(line - 0.5, color="#dddddd", linewidth=0.6)
    _scale(panel, [row.ratio for row in rows])
    one = "a copy = 1, more is better" if first.question in SHARES else f"{names[0]} = 1"
    panel.set_xlabel(f"{first.precision}, {first.mode}; {one}", fontsize=9)
    panel.grid(axis="x", alpha=0.3)


def _scale(panel: Any, values: list[float]) -> None:
    """Logarithmic where ratios differ much, with ticks that can be read."""
    good = [value for value in values if value > 0 and math.isfinite(value)] + [1.0]
    low, high = min(good) / 1.2, max(good) * 1.2
    if max(good) / min(good) <= 3:
        panel.set_xlim(min(low, 0.9), max(high, 1.1))
        return
    panel.set_xscale("log")
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlim(low, high)
