"""How the loops are compiled."""

from typing import Any

from numba import njit

# Arrays are taken out of tuples before the loops: doing so counts references.
# Sums may be reordered, so that they run in vector registers; nan and inf keep their meaning.
_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# What Python calls is kept on disk; what compiled code calls is inlined, always. A copy of it there
# would be a weak symbol: the process that compiles would run the callee that it made first, all
# later ones the copy in the file, whose sums are rounded in another order.
jit = njit(cache=True, **_OPTIONS)
inlined = njit(forceinline=True, **_OPTIONS)
