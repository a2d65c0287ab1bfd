"""Tables for the terminal, and reports: data, images and one HTML page, each file written whole."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybatch.core.files import write_bytes, write_json, write_text
from anybatch.evaluation.html_pages import encoded, render

if TYPE_CHECKING:
    from rich.table import Table


def terminal_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    caption: str | None = None,
    styles: Iterable[str | None] = (),
    left: Collection[str] = (),
    wrapped: Collection[str] = (),
    ruled: bool = False,
) -> Table:
    """Build a table for the terminal; its text is shown as it is, without markup.

    Args:
        columns: Titles of the columns.
        rows: Cells, row by row.
        title: Title of the table.
        caption: Text below the table.
        styles: Style of each row, None for a plain one.
        left: Columns to align left, beside the first.
        wrapped: Columns whose text may be wrapped.
        ruled: Whether to draw a line between rows.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(title),
        caption=None if caption is None else Text(caption),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_lines=ruled,
    )
    for index, column in enumerate(columns):
        table.add_column(
            Text(column),
            justify="left" if index == 0 or column in left else "right",
            no_wrap=column not in wrapped,
            overflow="fold",
            min_width=10 if column in wrapped else None,
        )
    given = list(styles)
    for index, row in enumerate(rows):
        table.add_row(*map(Text, row), style=given[index] if index < len(given) else None)
    return table


def output_folder(path: Path) -> Path:
    """Make a folder, or say why nothing can be written there.

    Raises:
        ValueError: If it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"output={str(path)!r}: cannot write there ({error.strerror}); "
            "give a folder that you may write, with --output"
        ) from error
    return path


def write_report(
    folder: Path,
    template: str,
    data: tuple[str, Any],
    images: Mapping[str, bytes],
    *,
    package: str = "anybatch.tools",
    page: str = "report.html",
    texts: Mapping[str, str] | None = None,
    **values: Any,
) -> Path:
    """Write a result as JSON, its images as PNG, and an HTML page that needs no other file.

    Args:
        folder: Folder to write to; it exists.
        template: Template of the page. It gets the values, the data as ``data``, and the images
            by name, encoded for an HTML page, as ``images``.
        data: Name of the JSON file and its content.
        images: Bytes of each PNG file, by name without ending.
        package: Package of the template.
        page: Name of the page's file.
        texts: Further text files by name.
        **values: Further values of the template.
    """
    name, content = data
    for stem, image in images.items():
        write_bytes(folder / f"{stem}.png", image)
    write_json(folder / name, content)
    for file, text in (texts or {}).items():
        write_text(folder / file, text)
    inside = {stem: encoded(image) for stem, image in images.items()}
    path = folder / page
    write_text(path, render(package, template, data=content, images=inside, **values))
    return path
