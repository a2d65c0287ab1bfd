"""Draw the image of the landing page from the first table of the README.

python docs/results/draw.py
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
IMAGE = Path(__file__).with_name("images") / "batch-2.png"
BARS = {
    "batch norm, batch **32**": ("batch norm, batch 32", "#7F7F7F"),
    "batch norm": ("batch norm, batch 2", "#56B4E9"),
    "**`mabn`**": ("mabn, batch 2", "#D55E00"),
}
DATA = ("digits\nMLP", "CIFAR-100, last epochs\nResNet-20")


def accuracies() -> dict[str, list[tuple[float, float]]]:
    """Read mean and spread of the rows to draw; of several in a cell the first, of the defaults."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- results:start -->")[2].partition("<!-- results:end -->")[0]
    found = {}
    for line in table.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        if name in BARS:
            pairs = [re.findall(r"([\d.]+) ± ([\d.]+) %", cell)[0] for cell in cells]
            found[name] = [(float(mean), float(spread)) for mean, spread in pairs]
    return found


def draw() -> Figure:
    """Draw one group of bars per data set."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(accuracies().items()):
        label, color = BARS[name]
        places = [group + 0.27 * (index - 1) for group in range(len(DATA))]
        means, spreads = zip(*values, strict=True)
        bars = axes.bar(places, means, 0.25, color=color, label=label, yerr=spreads, capsize=3)
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=2)
    axes.set_xticks(range(len(DATA)), DATA)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 110)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=3, fontsize=9, loc="outside upper center")
    return figure


if __name__ == "__main__":
    draw().savefig(IMAGE, dpi=120)
    print(IMAGE)
