"""Options of the command line: from files, and as typed."""

import json
import sys
from pathlib import Path
from typing import Any

from anybatch.registry import get_method
from anybatch.tools.run import Option


def read_config(path: Path) -> dict[str, Any]:
    """Read options from a TOML file (Python 3.11 on) or a JSON file.

    Raises:
        ValueError: If it is neither, is not there or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r}: cannot be read ({error})") from error
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"config={str(path)!r}: give a file that ends in .toml or .json")
    try:
        data = json.loads(text) if path.suffix == ".json" else _read_toml(text)
    except ValueError as error:  # both formats' errors are ValueErrors
        raise ValueError(f"config={str(path)!r}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"config={str(path)!r}: give a table of options, not {type(data).__name__}"
        )
    return data


def _read_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    raise ValueError("TOML needs Python 3.11; give the options as JSON")


def parse_options(pairs: list[str]) -> dict[str, tuple[Option, ...]]:
    """Read ``METHOD.NAME=VALUE`` arguments.

    Raises:
        ValueError: For another form, or a method that does not exist.

    Example:
        >>> parse_options(["mabn.window=8"])
        {'mabn': (('window', 8),)}
    """
    found: dict[str, tuple[Option, ...]] = {}
    for pair in pairs:
        target, equals, text = pair.partition("=")
        method, dot, name = target.partition(".")
        if not (equals and dot and method and name):
            raise ValueError(f"option={pair!r}: give METHOD.NAME=VALUE, such as mabn.window=8")
        method = method.lower()
        get_method(method)
        try:
            value = json.loads(text)
        except ValueError:
            value = {"True": True, "False": False, "None": None}.get(text, text)
        found[method] = (*found.get(method, ()), (name, value))
    return found
