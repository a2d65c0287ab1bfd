"""Files and tables of measurements."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from anybatch.core.files import write_text
from anybatch.core.text_tables import text_table
from anybatch.tools.measurements import SHARES, Measurement, as_csv, cases, tables


def write_csv(path: Path, rows: Sequence[Measurement], device: str = "cpu") -> None:
    """Write rows to a CSV file, whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_csv(rows, Measurement._fields, device))


def read_csv(path: Path) -> list[Measurement]:
    """Read the rows of a CSV file.

    Args:
        path: What `write_csv` wrote.

    Raises:
        ValueError: If it cannot be read or is none of these files.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path={str(path)!r}: cannot be read ({error})") from error
    missing = [name for name in Measurement._fields if not rows or name not in rows[0]]
    if missing:
        raise ValueError(
            f"path={str(path)!r}: there is no column {missing[0]!r}; give a CSV file of "
            "measurements"
        )
    try:
        return [_measurement(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r}: {error}") from error


def _measurement(row: Mapping[str, str]) -> Measurement:
    kinds = Measurement.__annotations__
    return Measurement(**{name: kinds[name](row[name]) for name in Measurement._fields})


def as_table(rows: Sequence[Measurement]) -> str:
    """Tables as text: a line per name, a column per case, the geometric mean and the worst.

    Args:
        rows: Of any questions; each question, precision and mode has a table.
    """
    return "\n\n".join(_one_table(part) for part in tables(rows).values())


def mean_ratio(rows: Iterable[Measurement]) -> float:
    """Geometric mean of ratios; NaN where one is none."""
    ratios = [row.ratio for row in rows]
    if not ratios or not all(ratio > 0 for ratio in ratios):
        return math.nan
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _one_table(rows: Sequence[Measurement]) -> str:
    first, columns = rows[0], cases(rows)
    short = {"contiguous": "", "channels_last": ", last"}
    share = first.question in SHARES
    base, worst_of = ("share of a copy", min) if share else ("of the first", max)
    head = [f"{first.question}, {first.unit}, {base}", "mean", "worst"]
    head += [f"{case}{short.get(form, form)}" for case, form in columns]
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        own = {(row.case, row.format): row for row in rows if row.name == name}
        cells = (own.get(column) for column in columns)
        shown = ["" if row is None else f"{row.value:g} {row.ratio:.2f}" for row in cells]
        worst = worst_of(row.ratio for row in own.values())
        lines.append((name, f"{mean_ratio(own.values()):.2f}", f"{worst:.2f}", *shown))
    title = f"{first.precision}, {first.mode}"
    return f"{title}\n{text_table(head, lines)}"
