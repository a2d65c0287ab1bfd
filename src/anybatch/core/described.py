"""Signatures and docstrings of layers: what all have in common stands once, in their base."""

import inspect
import re
from collections.abc import Iterable
from typing import Any, ClassVar

_SECTIONS = ("Shape:\n", "Raises:\n")


class Described:
    """A class whose subclasses have its arguments in their signatures and docstrings.

    Attributes:
        dims: Spatial dimensions of the input; 0 for any.
    """

    dims: ClassVar[int] = 0

    def __init_subclass__(cls, dims: int | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = cls.__mro__[1]
        if dims is not None:  # the same layer for inputs of so many spatial dimensions
            cls.dims, cls.__doc__ = dims, base.__doc__
            return
        if "__init__" in vars(cls):
            cls.__signature__ = _with_options(cls, base)  # type: ignore[attr-defined]
        inherited = base.__doc__ or ""  # python -OO has none
        if cls.__doc__ and "Args:\n" in inherited:
            cls.__doc__ = completed(cls.__doc__, inherited, inspect.signature(cls).parameters)


def _with_options(cls: type, base: type) -> inspect.Signature:
    """A constructor's signature with the arguments of the base in the place of ``**common``."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    own = list(signature.parameters.values())[1:]
    if own and own[-1].name == "common":
        inherited = inspect.signature(base).parameters
        rest = [p for name, p in inherited.items() if name not in signature.parameters]
        own[-1:] = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in rest]
    return signature.replace(parameters=own)


def completed(doc: str, base: str, parameters: Iterable[str]) -> str:
    r"""A docstring with the arguments, and the sections Shape and Raises, that only its base has.

    Args:
        doc: The docstring of a class.
        base: That of the class it derives from, which has a section Args.
        parameters: Names of the constructor's arguments, in order.

    Example:
        >>> base = "Base.\n\nArgs:\n    a: One.\n    b: Two."
        >>> print(completed("Own.\n\nArgs:\n    b: Three.", base, ["a", "b"]))
        Own.
        <BLANKLINE>
        Args:
            a: One.
            b: Three.
    """
    own, shared = (inspect.cleandoc(text).split("\n\n") for text in (doc, base))
    before = ("Args:\n", "Source:", "Example:\n")  # of which one is where arguments go
    at = next((i for i, part in enumerate(own) if part.startswith(before)), len(own))
    if not own[at:] or not own[at].startswith("Args:\n"):
        own.insert(at, "Args:")
    given = _arguments(next(part for part in shared if part.startswith("Args:\n")))
    known = _arguments(own[at])
    order = [name for name in parameters if name in known or name in given]
    merged = {name: known.get(name, given.get(name, "")) for name in (*order, *known)}
    own[at] = "\n    ".join(["Args:", *merged.values()])
    missing = [name for name in _SECTIONS if not any(part.startswith(name) for part in own)]
    own[at + 1 : at + 1] = [part for part in shared if part.startswith(tuple(missing) or "\n")]
    return "\n\n".join(own)


def _arguments(section: str) -> dict[str, str]:
    """The entries of a section by name."""
    return {entry.partition(":")[0]: entry for entry in re.split(r"\n    (?=\S)", section)[1:]}
