"""How the loops are compiled."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from anybatch.backends import rule

# Arrays are taken out of tuples before the loops: doing so counts references.
# Sums may be reordered, so that they run in vector registers; nan and inf keep their meaning.
OPTIONS: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


_COMPILES = b"import njit", b"numba.extending import", b"numba.compile import"


def fingerprint(folder: Path, *others: Path) -> str:
    """A number of the sources of compiled code in a folder and of others; any change changes it."""
    found = hashlib.sha256()
    for path in (*sorted(folder.glob("*.py")), *others):
        source = path.read_bytes()
        if path in others or any(mark in source for mark in _COMPILES):
            found.update(path.name.encode() + b"\0" + source)
    return found.hexdigest()[:12]


SOURCES = fingerprint(Path(__file__).parent, Path(rule.__file__))


def jit(function: Callable[..., Any]) -> Any:
    """Compile what Python calls, and keep it on disk.

    Numba looks at the file of a function to see whether what is kept is still its own, not at the
    files of what it calls. So the name under which it is kept has a number of all of them.
    """
    function.__qualname__ += f"_{SOURCES}"
    return njit(cache=True, **OPTIONS)(function)


# What compiled code calls is inlined, always. A copy of it on disk would be a weak symbol: the
# process that compiles would run the callee that it made first, all later ones the copy in the
# file, whose sums are rounded in another order. Python does not call it: it needs no wrappers, of
# which there are none for arrays of bfloat16.
_UNWRAPPED: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inlined = njit(forceinline=True, **_UNWRAPPED, **OPTIONS)
