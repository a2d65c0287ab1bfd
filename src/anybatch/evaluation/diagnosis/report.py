"""A diagnosis as a figure and as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from anybatch import theory
from anybatch.evaluation.diagnosis.layer_noise import Histogram, LayerNoise, Spread
from anybatch.evaluation.diagnosis.probe import second_moment_noise
from anybatch.evaluation.figures import BLACK, BLUE, RED, blank, png
from anybatch.evaluation.html_pages import encoded, render
from anybatch.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 24  # norms, up to which their names stand below a plot


def figure(layers: tuple[LayerNoise, ...]) -> Figure:
    """Noise of the four statistics of each norm, and the distributions of the noisiest."""
    if not layers:
        raise ValueError("no batch norm was measured: there is no noise to plot")
    backward = any(layer.psi is not None for layer in layers)
    rows = 3 if backward else 2
    tall = 0.6 if len(layers) <= NAMED else 0.0
    drawn = blank(11, (3.2 + tall) * rows)
    axes = drawn.subplots(rows, 2, squeeze=False)
    panels = [("mean (xi_mu)", "mean"), ("variance (xi_sigma)", "var"), ("g", "g"), ("Psi", "psi")]
    for place, (title, name) in enumerate(panels[: 2 * rows - 2]):
        _noise(axes[place // 2][place % 2], layers, f"noise of {title}", name)
    worst = min(layers, key=lambda layer: layer.forward_values)
    _distributions(axes[-1], worst)
    return drawn


def _noise(axes: Axes, layers: tuple[LayerNoise, ...], title: str, name: str) -> None:
    """One statistic, norm by norm."""
    spreads: list[Spread | None] = [getattr(layer, name) for layer in layers]
    there = [place for place, spread in enumerate(spreads) if spread is not None]
    kept = [spread for spread in spreads if spread is not None]
    if not kept:
        axes.set_title(title, fontsize=11)
        _say_empty(axes)
        return
    axes.plot(there, [s.expected for s in kept], "-", color=BLUE, label="from the examples")
    axes.plot(there, [s.independent for s in kept], "--", color=BLACK, label="independent values")
    axes.plot(there, [s.measured for s in kept], "o", color=RED, markersize=5, label="measured")
    limit = (2 / 8) ** 0.5 if name == "var" else 8**-0.5  # fewer than 8 values
    axes.axhspan(limit, 100, color=RED, alpha=0.08, linewidth=0)
    highest = max([*(max(s.measured, s.expected, s.independent) for s in kept), limit])
    axes.set_ylim(0, 1.15 * highest)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    if len(layers) <= NAMED:
        names = [layer.name or "(the model)" for layer in layers]
        axes.set_xticks(range(len(layers)), names, rotation=90, fontsize=8)
    else:
        axes.set_xlabel("norm, from the input on")


def _distributions(axes: Any, layer: LayerNoise) -> None:
    """xi_mu and xi_sigma of one norm, and their densities for independent Gaussian values."""
    centered = layer.mean is not None
    source = theory.noise(layer.values) if centered else second_moment_noise(layer.values)
    name = layer.name or "(the model)"
    if layer.mean_histogram is not None:
        _histogram(axes[0], layer.mean_histogram, source.mean_density)
    else:
        _say_empty(axes[0])
    axes[0].set_title(f"xi_mu of {_plain(name)}", fontsize=11)
    _histogram(axes[1], layer.var_histogram, source.var_density if source.var_std else None)
    axes[1].set_title(f"xi_sigma of {_plain(name)}", fontsize=11)


def _histogram(axes: Axes, histogram: Histogram, density: Any) -> None:
    bins = len(histogram.counts)
    width = (histogram.high - histogram.low) / bins
    middles = [histogram.low + (k + 0.5) * width for k in range(bins)]
    heights = [count / (max(histogram.total, 1) * width) for count in histogram.counts]
    axes.bar(middles, heights, width, color=RED, alpha=0.45, label="measured")
    if density is not None:
        grid = torch.linspace(histogram.low + width / 2, histogram.high, 400, dtype=torch.float64)
        axes.plot(grid, density(grid), color=BLACK, label="independent Gaussian values")
    axes.set_ylim(0, 1.2 * max([*heights, 1e-9]))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8, frameon=False)


def _say_empty(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no mean is subtracted", ha="center", transform=axes.transAxes)


def _plain(name: str) -> str:
    """A name that matplotlib does not take for mathematics."""
    return name.replace("$", r"\$")


def page(diagnosis: Any, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The diagnosis as one HTML page; rows are the reading of each norm and its cells' texts."""
    return render(
        "anybatch.evaluation",
        "diagnosis.html.j2",
        diagnosis=diagnosis,
        head=head,
        rows=rows,
        picture=encoded(png(figure(layers), dpi=120)) if (layers := diagnosis.layers) else "",
        versions=f"anybatch {__version__}, torch {torch.__version__}",
    )
