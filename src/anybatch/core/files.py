"""Files that are there whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name in its folder, then move it into place.

    Args:
        path: Where it shall be.
        write: Writes the file it is given.

    Raises:
        OSError: If it cannot be written; what was there before is as it was.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path}: cannot be written ({reason})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of bytes whole."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON, whole; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def finite(data: Any) -> Any:
    """Data with None for every number that is not finite: JSON has no other word for it."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    if isinstance(data, float) and not -float("inf") < data < float("inf"):
        return None
    return data
