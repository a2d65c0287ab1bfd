"""Put the output of `make bench` into docs/results/speed.md: tables and images.

python benchmarks/page.py [runs/bench]
"""

import csv
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import SHAPES
from measurement_files import mean_ratio, read_csv
from roofline import MUST, issued

from anybatch.core.files import write_text
from anybatch.tools.measurements import Measurement, cases

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results"
IMAGES = ("layers", "roofline")
Lines = Iterable[Sequence[str]]


def markdown(head: Sequence[str], lines: Lines) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def column(case: str, form: str) -> str:
    """What to call a case."""
    return case if form == "contiguous" else f"{case}, last"


def ratios(rows: Sequence[Measurement], question: str) -> str:
    """Ratios of a question: a line per name, a column per case, then their mean and the worst."""
    rows = [row for row in rows if row.question == question]
    columns, lines = cases(rows), []
    several = question in ("layer", "way", "step")
    for name in dict.fromkeys(row.name for row in rows):
        own = {(row.case, row.format): row.ratio for row in rows if row.name == name}
        cells = ["" if key not in own else f"{own[key]:.2f}" for key in columns]
        mean = mean_ratio(row for row in rows if row.name == name)
        lines.append([name, *cells, *([f"{mean:.2f}", f"{max(own.values()):.2f}"] * several)])
    head = ["", *(column(*key) for key in columns), *(["mean", "worst"] * several)]
    return markdown(head, lines)


def made_on(source: Path) -> str:
    """What a file was measured on, as a sentence."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    first, types = rows[0], " and ".join(dict.fromkeys(row["precision"] for row in rows))
    device = first["processor"] if first["device"] == "cpu" else first["device"]
    return (
        f"{device}, {first['threads']} threads, {types}, torch {first['torch']}, "
        f"medians of {first['rounds']} rounds, commit {first['commit']}."
    )


def copies(source: Path) -> str:
    """The size of a unit and the speed of a copy on each shape."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = {(row["case"], row["format"]): row for row in csv.DictReader(file)}
    lines = []
    for (case, form), row in rows.items():
        unit = float(row["must_mb"]) / MUST[row["question"]]
        lines.append([column(case, form), f"{unit:.1f}", f"{float(row['copy_gb_per_s']):.0f}"])
    return markdown(["shape", "a unit, MB", "a copy, GB/s"], lines)


def units(rows: Sequence[Measurement]) -> str:
    """What the code of each pass loads and stores."""
    names = dict.fromkeys(row.name for row in rows)
    lines = [[name, *(f"{issued(name, passing):.2f}" for passing in MUST)] for name in names]
    return markdown(
        ["", *(f"{passing}, must be {must:g}" for passing, must in MUST.items())], lines
    )


def low_tables(rows: Sequence[Measurement]) -> str:
    """A table for each type."""
    types = dict.fromkeys(row.precision for row in rows)
    return "\n\n".join(
        f"{one}:\n\n{ratios([row for row in rows if row.precision == one], 'layer')}"
        for one in types
    )


def tables(folder: Path) -> dict[str, str]:
    """The tables by the name of their mark."""
    rows = {path.stem: read_csv(path) for path in folder.glob("*.csv")}
    line = rows["roofline"]
    shares = (
        f"The {passing} pass:\n\n{ratios(line, passing)}" for passing in ("forward", "backward")
    )
    source = folder / "roofline.csv"
    one = [
        row for row in rows["memory-layers"] if (row.case, row.format) == (SHAPES[0], "contiguous")
    ]
    both = [("keeps", "kept"), ("at most", "peak")]
    memory = markdown(
        ["", *(word for word, _ in both)],
        [
            [
                name,
                *(
                    f"{r.ratio:.2f}"
                    for _, q in both
                    for r in one
                    if (r.name, r.question) == (name, q)
                ),
            ]
            for name in dict.fromkeys(row.name for row in one)
        ],
    )
    networks = rows["memory-networks"]
    return {
        "layers": f"{made_on(folder / 'layers.csv')}\n\n{ratios(rows['layers'], 'layer')}",
        "modes": f"{made_on(folder / 'modes.csv')}\n\n{ratios(rows['modes'], 'way')}",
        "low": f"{made_on(folder / 'layers-16-bit.csv')}\n\n{low_tables(rows['layers-16-bit'])}",
        "steps": f"{made_on(folder / 'steps.csv')}\n\n{ratios(rows['steps'], 'step')}",
        "parts": f"{made_on(folder / 'steps-parts.csv')}\n\n{ratios(rows['steps-parts'], 'step')}",
        "inference": ratios(rows["inference"], "inference"),
        "memory": memory,
        "networks": f"{ratios(networks, 'kept')}\n\nAt most:\n\n{ratios(networks, 'peak')}",
        "roofline": "\n\n".join([made_on(source), copies(source), *shares, units(line)]),
    }


def filled(text: str, found: dict[str, str]) -> str:
    """A page with the tables between their marks."""
    for name, table in found.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, after = text.index(start) + len(start), text.index(end)
        text = f"{text[:before]}\n\n{table}\n\n{text[after:]}"
    return text


def main(typed: Sequence[str] | None = None) -> int:
    """Fill the page, copy the images."""
    given = sys.argv[1:] if typed is None else typed
    folder, page = Path(given[0] if given else "runs/bench"), DOCS / "speed.md"
    write_text(page, filled(page.read_text(encoding="utf-8"), tables(folder)))
    for name in IMAGES:
        shutil.copyfile(folder / f"{name}.png", DOCS / "images" / f"speed-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
