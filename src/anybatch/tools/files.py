"""Files that are there whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
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
    write_whole(path, lambda temporary: _write(temporary, text))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of bytes whole."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_whole(path, write)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON, whole; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def finite(data: Any) -> Any:
    """Data with None for every number that is not finite: JSON has no other word for it."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    if isinstance(data, float) and not -float("inf") < data < float("inf"):
        return None
    return data


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


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
