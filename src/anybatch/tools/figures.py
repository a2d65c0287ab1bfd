"""The style of all figures, and their bytes."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; lines differ in marker and dash too.
COLOURS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#8C6D00",
    "#7F7F7F",
    "#5B2C83",
)
MARKERS = "osD^vP*Xh<>"  # one more than colours: no two rows of a long table look the same
DASHES = ("-", "--", "-.", ":")


def png(figure: "Figure", dpi: int = 144) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def blank(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure  # no window, no state: nothing is opened

    return Figure(figsize=(width, height), layout="constrained")
