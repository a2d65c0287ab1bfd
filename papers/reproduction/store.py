"""Results of finished runs, a line of JSON each, that several processes append to."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from anybatch.core.files import finite, write_text

Row = dict[str, Any]
SCHEMA = 1
_NEEDED = ("schema", "id", "settings", "seed", "command", "made_with", "finished", "result")


class Store:
    """A file of results, one per line, the latest of each identity valid.

    A line is appended in one write under a lock. One that a killed process left unfinished at the
    end is passed over by readers, and cut off by the next writer.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[str, Row]:
        """The rows by identity.

        Raises:
            ValueError: For a line, not the last, that is none.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        return {row["id"]: row for row in self._parsed(content)}

    def append(self, row: Row) -> bool:
        """Add a row, unless one that says as much is there.

        Args:
            row: As `read_row` checks it.

        Returns:
            Whether it was added.

        Raises:
            OSError: If it cannot be written.
        """
        line = (json.dumps(finite(row), sort_keys=True, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), self.path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            there = {one["id"]: one for one in self._parsed(content)}.get(row["id"])
            if there is not None and set(row["result"]) <= set(there["result"]):
                return False
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # torn by a process that was killed
                file.truncate(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return True

    def _parsed(self, content: bytes) -> Iterator[Row]:
        for number, line in enumerate(content.split(b"\n")[:-1], 1):  # the last is empty or torn
            try:
                yield read_row(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}: not a stored result ({error}); "
                    "take that line out, or give another store"
                ) from error


def read_row(row: Any) -> Row:
    """Check a row.

    Args:
        row: What a line holds.

    Returns:
        The row.

    Raises:
        ValueError: If it is none, or of another version.
    """
    if not isinstance(row, dict) or not set(_NEEDED) <= set(row):
        missing = set(_NEEDED) - set(row if isinstance(row, dict) else ())
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    if row["schema"] != SCHEMA:
        raise ValueError(f"schema={row['schema']!r}: this version reads {SCHEMA}")
    return row


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file of their own, in an order that does not depend on when they were made.

    Args:
        path: The file.
        rows: The rows.
    """
    ordered = sorted(rows, key=lambda row: str(row["id"]))
    lines = [json.dumps(finite(row), sort_keys=True, allow_nan=False) for row in ordered]
    write_text(path, "".join(f"{line}\n" for line in lines))
