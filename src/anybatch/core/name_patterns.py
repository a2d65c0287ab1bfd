"""The `where` argument: which modules of a network a call is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

Where = str | Callable[[str, nn.Module], bool]


def matches(where: Where | None, names: str | Iterable[str], module: nn.Module) -> bool:
    """True if `where` selects a module.

    Args:
        where: A name pattern such as ``"encoder.*"``, a predicate ``(name, module)``, or None for
            every module.
        names: The module's path in the network, or all its paths; one match is enough.
        module: The module.

    Returns:
        Whether it is selected.

    Raises:
        TypeError: If `where` is something else.

    Example:
        >>> matches("body.*", "body.1", nn.ReLU()), matches("body.*", ["head", "stem"], nn.ReLU())
        (True, False)
    """
    if where is None:
        return True
    names = (names,) if isinstance(names, str) else names
    if isinstance(where, str):
        return any(fnmatchcase(name, where) for name in names)
    if not callable(where):
        raise TypeError(
            f"where={where!r}: give a name pattern such as 'encoder.*' or a predicate "
            "(name, module)"
        )
    return any(where(name, module) for name in names)
