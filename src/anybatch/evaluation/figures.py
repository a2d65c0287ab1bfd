"""The style of all figures, and their bytes."""

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anybatch.core.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; lines differ in marker and dash too.
BLACK, BLUE, RED, GREY = "#000000", "#0072B2", "#D55E00", "#7F7F7F"
COLOURS = (BLACK, "#E69F00", "#56B4E9", "#009E73", BLUE, RED, "#CC79A7", "#8C6D00", GREY, "#5B2C83")
MARKERS = "osD^vP*Xh<>"  # one more than colours: no two rows of a long table look the same
DASHES = ("-", "--", "-.", ":")


def blank(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches.

    Raises:
        ImportError: Without Matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # no window, no state: nothing is opened
    except ImportError as error:
        raise ImportError("a plot needs Matplotlib: pip install 'anybatch[tools]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: "Figure", dpi: int = 144) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save(figure: "Figure", path: Path) -> None:
    """Write a figure whole; the ending of its file tells the format."""
    write_whole(path, partial(figure.savefig, dpi=144))
