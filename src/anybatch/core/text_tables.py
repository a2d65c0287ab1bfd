"""Results as plain text: tables and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of left-aligned columns under a line.

    Example:
        >>> print(text_table(("a", "bc"), [("1", "2")]))
        a  bc
        -  --
        1  2
    """
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


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
