"""Results as plain text: tables and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from textwrap import wrap


def text_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int | None = None,
    wrapped: Sequence[int] = (),
) -> str:
    """A table of left-aligned columns under a line.

    Args:
        head: Titles of the columns.
        rows: Their cells.
        width: Characters that a line may have (default None: any number).
        wrapped: Numbers of the columns whose cells are wrapped to keep to it.

    Example:
        >>> print(text_table(("a", "bc"), [("1", "2")]))
        a  bc
        -  --
        1  2
    """
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    between = "  " if width is None else " "
    while width is not None and sum(widths) + len(widths) - 1 > width:
        widths[max(wrapped, key=widths.__getitem__)] -= 1
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        between.join(cell.ljust(width) for cell, width in zip(part, widths, strict=True)).rstrip()
        for line in lines
        for part in zip_longest(*map(_parts, line, widths), fillvalue="")
    )


def _parts(cell: str, width: int) -> list[str]:
    """A cell in lines of a width."""
    return [cell] if len(cell) <= width else wrap(cell, width)


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV under a line of names.

    Example:
        >>> print(csv_text(("a", "b"), [(1, "x, y")]), end="")
        a,b
        1,"x, y"
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([head, *rows])
    return buffer.getvalue()
