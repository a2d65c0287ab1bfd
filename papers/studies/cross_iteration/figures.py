"""Figures of the compensation's errors and of the gradients' decay."""

from typing import TYPE_CHECKING

from anybatch.evaluation.figures import COLOURS, DASHES, MARKERS, blank
from papers.studies.cross_iteration.compensation import Errors
from papers.studies.cross_iteration.decay import Decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def error_figure(errors: Errors) -> "Figure":
    """Errors by age, for both truths."""
    figure = blank(10, 4.2)
    titles = {"layer": "today's weights of this layer", "network": "today's whole network"}
    for place, (name, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        for index, (kind, values) in enumerate(getattr(errors, name).items()):
            axes.plot(
                range(1, len(values) + 1),
                values,
                label=kind,
                color=COLOURS[index],
                marker=MARKERS[index],
                linestyle=DASHES[index],
            )
        axes.set(title=f"truth: {title}", xlabel="age of the batch, steps", ylabel="error")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


def decay_figure(decays: dict[str, Decay]) -> "Figure":
    """Ratios of gradient norms by layers back, a line per stage of training."""
    figure = blank(10, 4.2)
    for place, (name, title) in enumerate((("mean", "of the mean"), ("square", "of the square"))):
        axes = figure.add_subplot(1, 2, place + 1)
        for index, (stage, decay) in enumerate(decays.items()):
            values = getattr(decay, name)
            axes.plot(
                range(len(values)),
                values,
                label=stage,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle=DASHES[index % len(DASHES)],
            )
        axes.set(title=f"gradient {title}", xlabel="layers back", ylabel="norm, own layer = 1")
        axes.set_xticks(range(len(values)))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend()
    return figure
