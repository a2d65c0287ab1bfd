"""Checks of arguments: each error names the argument, its value and what would work."""

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

_LONGEST = 80  # characters of a value that a message shows


def shown(value: object) -> str:
    """A value as an error message shows it: short, and never the contents of tensors.

    Example:
        >>> shown("mabm"), shown({"weight": 1}), shown(nn.ReLU)
        ("'mabm'", 'a dict of 1 entry', 'the class ReLU')
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (Mapping, list, tuple, set)) and value:
        entries = "1 entry" if len(value) == 1 else f"{len(value)} entries"
        return f"a {type(value).__name__} of {entries}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else f"a {type(value).__name__}"


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a forward, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint of an error about an unknown name; empty if no known name is close.

    Example:
        >>> closest("mabm", ["bn", "mabn"])
        "did you mean 'mabn'? "
    """
    found = get_close_matches(name, list(known), 1, cutoff)
    return f"did you mean {found[0]!r}? " if found else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is one.

    Example:
        >>> counted(1, "norm"), counted(2, "norm")
        ('1 norm', '2 norms')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def check_module(name: str, value: object) -> None:
    """Raise unless ``value`` is a network; the error names the remedy for a state_dict."""
    if isinstance(value, nn.Module):
        return
    if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
        raise TypeError(
            f"{name}: a state_dict ({shown(value)}) is no network; build the network, load the "
            "state_dict into it and give that"
        )
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise TypeError(f"{name}: {shown(value)} is no network; give an instance of it")
    raise TypeError(f"{name}={shown(value)}: give a torch.nn.Module")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless ``value`` is a whole number from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: give a whole number from {least} on")
    if value < least:
        raise ValueError(f"{name}={value!r}: give a whole number from {least} on")


def check_from(name: str, value: Any, low: float) -> None:
    """Raise unless ``value`` is a finite number from ``low`` on."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: give a number from {low} on")
    if not low <= value < math.inf:
        raise ValueError(f"{name}={value!r}: give a number from {low} on")


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless ``value`` is a number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: give a number from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: give a number from {low} to {high}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: give True or False")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in (known := tuple(choices)):
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, known))}")
