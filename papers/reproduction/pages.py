"""The report of reproductions, and their pages in the documentation."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from anybatch.core.files import write_bytes, write_text
from anybatch.evaluation import figures
from anybatch.tools import report_files
from papers.reproduction import figures as reproduced_figures
from papers.reproduction.results import Grid, as_data, backing, checked, columns_of, grid
from papers.reproduction.spec import MEASURED, SIZES, Reproduction, reproductions
from papers.reproduction.store import Row, Store, write_rows

PAGE, RESULTS = "results/reproductions.md", "results"
IMAGES = f"{RESULTS}/images/reproductions"
_BLOCK = re.compile(
    r"(<!-- reproduced: (?P<name>\S+) (?P<size>\S+) -->\n).*?(<!-- reproduced: end -->)", re.DOTALL
)
_SIZE_NAMES = {"small": "Small size", "paper": "The paper's size"}


class Section(NamedTuple):
    """A reproduction in one size, ready to be shown.

    Attributes:
        one: The reproduction.
        size: Name of the size.
        grid: Its table.
        rows: The stored rows behind it.
    """

    one: Reproduction
    size: str
    grid: Grid
    rows: list[Row]

    @property
    def image(self) -> str:
        """Name of its image, without ending."""
        return f"{self.one.name}-{self.size}"

    @property
    def command(self) -> str:
        """The command that makes it."""
        return f"python -m papers {self.one.name} --size {self.size}"

    @property
    def columns(self) -> str:
        """What the columns stand for."""
        return columns_of(self.one)

    @property
    def origin(self) -> str:
        """Commits, versions and machines behind its numbers."""
        made = [row["made_with"] for row in self.rows]
        commits = sorted({str(m["commit"]) for m in made})
        versions = sorted({f"torch {m['torch']}" for m in made})
        devices = sorted({f"{m['processor']} ({m['device']})" for m in made})
        seconds = sum(row["seconds"] for row in self.rows)
        return (
            f"{len(self.rows)} runs, {seconds / 60:.0f} minutes; "
            f"commit {', '.join(commits)}; {', '.join(versions)}; {', '.join(devices)}"
        )


def section(one: Reproduction, size: str, rows: Mapping[str, Row]) -> Section:
    """A reproduction in one size.

    Args:
        one: The reproduction.
        size: "small" or "paper".
        rows: Of the store.

    Returns:
        The section.
    """
    scale = one.sizes[size]
    return Section(one, size, grid(one, scale, rows), backing(one, scale, rows))


# --- the report ----------------------------------------------------------------


def write_report(
    wanted: list[Reproduction], size: str, rows: Mapping[str, Row], folder: Path, command: str
) -> Path:
    """Write ``report.html``, ``report.json`` and a PNG per figure, each whole.

    Args:
        wanted: What is shown.
        size: "small" or "paper".
        rows: Of the store.
        folder: Where; it exists.
        command: What was typed.

    Returns:
        The path of the report.
    """
    images = {one.name: _image(one, size, rows) for one in wanted}
    return report_files.write_report(
        folder,
        "reproduction.html.j2",
        ("report.json", [as_data(one, size, rows) for one in wanted]),
        {f"{name}-{size}": image for name, image in images.items() if image is not None},
        package="papers",
        parts=[section(one, size, rows) for one in wanted],
        size=_SIZE_NAMES[size],
        command=command,
    )


def _image(one: Reproduction, size: str, rows: Mapping[str, Row]) -> bytes | None:
    figure = reproduced_figures.draw(one, one.sizes[size], rows)
    return None if figure is None else figures.png(figure, dpi=120)


# --- the documentation ------------------------------------------------------------


def write_docs(docs: Path, rows: Mapping[str, Row]) -> list[Path]:
    """Write rows, images and tables into the documentation.

    The rows behind its tables go to ``results``, where those of other machines stay; every number
    is then taken from there: the page ``results/reproductions.md``, and in all pages the text
    between ``<!-- reproduced: NAME SIZE -->`` and ``<!-- reproduced: end -->``.

    Args:
        docs: Folder of the documentation.
        rows: Of the store.

    Returns:
        The files that changed.
    """
    everything = {**stored(docs), **checked(rows.values())}
    (docs / RESULTS).mkdir(exist_ok=True)
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    for (paper, size), needed in _by_file(everything).items():
        write_rows(docs / RESULTS / f"{paper}-{size}.jsonl", needed)
    for one in reproductions().values():
        for size in SIZES:
            image = _image(one, size, everything)
            if image is not None:
                path = docs / IMAGES / f"{one.name}-{size}.png"
                write_bytes(path, image)
    changed = []
    for path, text in pages(docs).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            changed.append(path)
    return changed


def stored(docs: Path) -> dict[str, Row]:
    """The rows that the documentation's numbers are from.

    Args:
        docs: Its folder.

    Returns:
        Rows by identity.

    Raises:
        ValueError: If one's settings were changed.
    """
    files = sorted((docs / RESULTS).glob("*.jsonl"))
    return checked(row for file in files for row in Store(file).rows().values())


def _by_file(rows: Mapping[str, Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows that tables need, by paper and size; a file that would be empty is left out."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for one in reproductions().values():
        for size in SIZES:
            for row in backing(one, one.sizes[size], rows):
                found.setdefault((one.paper, size), {})[row["id"]] = row
    return {key: list(needed.values()) for key, needed in found.items()}


def pages(docs: Path) -> dict[Path, str]:
    """Every page that shows reproductions, as its rows would have it.

    Args:
        docs: Folder of the documentation.

    Returns:
        Texts by path; a page that differs from its text is not what the rows say.

    Raises:
        ValueError: If a page asks for a table that there is not.
    """
    rows = stored(docs)
    found = {docs / PAGE: _page(rows)}
    for path in sorted(docs.rglob("*.md")):
        if "_build" in path.parts or path == docs / PAGE:
            continue
        text = path.read_text(encoding="utf-8")
        if _BLOCK.search(text):
            found[path] = _BLOCK.sub(partial(_block, rows), text)
    return found


def _block(rows: Mapping[str, Row], match: "re.Match[str]") -> str:
    name, size = match["name"], match["size"]
    known = reproductions()
    if name not in known or size not in SIZES:
        raise ValueError(f"reproduced: {name} {size}: there is no such table")
    return f"{match[1]}\n{section(known[name], size, rows).grid.markdown()}\n\n{match[4]}"


_HEAD = """# Reproductions

What the papers report, made again with `python -m papers`, as [explained here](reproduce.md): our
numbers beside theirs. Each number is taken from the rows in `docs/results`, with the settings, the
versions, the machine and the command behind it; a test fails when page and rows part. A number is
the mean over the seeds and, behind ±, their standard deviation, in per cent. Costs are parts of
what the first row costs, measured in turn in one process: the median of the rounds and, in
brackets, their quartiles. The small sizes are not the papers' experiments: data, networks and
schedules are shrunk until two cores do with them, so that their numbers show directions and are not
to be compared with the papers' one by one.
"""


def _page(rows: Mapping[str, Row]) -> str:
    parts = [_HEAD]
    paper = None
    for one in reproductions().values():
        if one.paper != paper:
            paper = one.paper
            parts.append(f"## {paper}\n")
        parts.append(_described(one, rows))
    return "\n".join(parts)


def _described(one: Reproduction, rows: Mapping[str, Row]) -> str:
    lines = [f"### {one.source}: {one.title}", "", one.claim, ""]
    run = {size for size in SIZES if section(one, size, rows).rows}
    small = {(c.row, c.column) for c in one.sizes["small"].cells if "small" in run}
    cited = {(c.row, c.column) for c in one.sizes["paper"].cells if c.paper}
    shown = run | ({"paper"} if cited - small else set())  # no number of the paper is left out
    for size in SIZES:
        if size in shown:
            lines += _sized(section(one, size, rows))
    if not run:
        lines += [f"Not run yet: `python -m papers {one.name} --size small`, or `paper`.", ""]
    lines += [f"- {note}" for note in one.notes]
    return "\n".join([*lines, ""])


def _sized(part: Section) -> list[str]:
    one = part.one
    size = one.sizes[part.size]
    lines = [f"*{_SIZE_NAMES[part.size]}.* {size.text} {size.learning_rate}".rstrip(), ""]
    lines += [f"Rows: {one.down}. Columns: {part.columns}.", ""]
    lines += [part.grid.markdown(), ""]
    if part.rows:
        image = f"images/reproductions/{one.name}-{part.size}.png"
        lines += [f"![{one.source} of {one.paper}: the numbers of the table]({image})", ""]
        lines += [f"`{part.command}`: {part.origin}.", ""]
    return lines


def section_table(part: Section) -> Any:
    """Build the table of a section for the terminal."""
    one = part.one
    unit = "" if one.unit in MEASURED else f": {one.unit} (%)"
    return report_files.terminal_table(
        part.grid.head,
        part.grid.rows,
        title=f"{one.paper}, {one.source}, {_SIZE_NAMES[part.size].lower()}{unit}",
        caption=f"columns: {one.across}",
        wrapped=part.grid.head,
    )
