"""Checks of arguments: each error names the argument, its value and what would do."""

from collections.abc import Iterable
from typing import Any


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: give a whole number from 1 on")
    if value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number from 1 on")


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless ``value`` is a number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: give a number from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: give a number from {low} to {high}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in (known := tuple(choices)):
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, known))}")
