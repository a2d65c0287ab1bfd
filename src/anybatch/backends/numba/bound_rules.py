# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Rules as the loops call them: compiled apart, by their address.

So one loop serves every method, and a method of a user costs the compilation of its rule alone,
which is kept on disk beside what Numba keeps of the rule's file.
"""

import math
from functools import cache
from types import CodeType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types  # type: ignore[attr-defined]
from numba.core.errors import NumbaError
from numba.extending import intrinsic

from anybatch.backends.numba.compile import OPTIONS, SOURCES, inlined
from anybatch.backends.rule import (
    COUNTERS,
    PLACES,
    ROWS,
    USES,
    WINDOWS,
    Part,
    Rule,
    bind,
    fingerprint,
)

RESULTS = 6  # mean, variance, r, d, batch_weight, use_batch_stats


@inlined
def _minimum(a, b):
    return min(a, b)


@inlined
def _maximum(a, b):
    return max(a, b)


@inlined
def _clamp(x, low, high):
    return min(max(x, low), high)


@inlined
def _sqrt(x):
    return math.sqrt(x)


@inlined
def _where(condition, one, other):
    return one if condition else other


@inlined
def _lerp(start, end, weight):
    return start + weight * (end - start)


@inlined
def _chosen(mean, var, r=1.0, d=0.0, batch_weight=1.0, use_batch_stats=1.0):
    return mean, var, r, d, batch_weight, use_batch_stats


FUNCTIONS = {
    "sqrt": _sqrt,
    "minimum": _minimum,
    "maximum": _maximum,
    "clamp": _clamp,
    "where": _where,
    "lerp": _lerp,
    "chosen": _chosen,
}
_DOUBLES = types.CPointer(types.float64)


def _compiled(rule: Rule, places: tuple[int, ...], forward: bool) -> Any:
    """The rule as C calls it, with arguments from some places of a table of numbers."""
    arguments = ", ".join(f"values[{place}]" for place in places)
    found = ", ".join(f"results[{i}]" for i in range(RESULTS if forward else 1))
    text = (
        f"def entry(values_, results_):\n"
        f"    values, results = carray(values_, ({PLACES},)), carray(results_, ({RESULTS},))\n"
        f"    {found} = rule({arguments})\n"
    )
    code: CodeType = rule.function.__code__
    # Numba keeps what it compiles beside the file that it believes this to be from.
    scope = {"rule": bind(rule, FUNCTIONS, inlined), "carray": carray, "__name__": rule.__module__}
    exec(compile(text, code.co_filename, "exec"), scope)
    entry: Any = scope["entry"]
    entry.__qualname__ = f"{rule.__name__}_{fingerprint(rule)}_{hash_of(places)}_{SOURCES}"
    try:
        make = cfunc(types.void(_DOUBLES, _DOUBLES), cache=True, **_OPTIONS)
        return make(entry)
    except RuntimeError:  # no file: of a notebook or a command line
        return cfunc(types.void(_DOUBLES, _DOUBLES), **_OPTIONS)(entry)
    except NumbaError as error:
        raise TypeError(f"{rule!r}: Numba cannot compile it ({error})") from error


def hash_of(places: tuple[int, ...]) -> str:
    """Places as a part of a name."""
    return "_".join(map(str, places))


_OPTIONS = {name: value for name, value in OPTIONS.items() if name != "nogil"}


@intrinsic
def _call_at(typingctx, address, values, results):
    """Call the compiled rule at an address."""

    def codegen(context, builder, signature, arguments):
        numbers = ir.DoubleType().as_pointer()
        called = ir.FunctionType(ir.VoidType(), [numbers, numbers]).as_pointer()
        function, *tables = arguments
        tables = [builder.inttoptr(table, numbers) for table in tables]
        builder.call(builder.inttoptr(function, called), tables)
        return context.get_dummy_value()

    return types.void(address, values, results), codegen


_call: Any = _call_at  # its signature is that of compiled code


@inlined
def run_rule(address, values, results):
    """Run a rule on a table of its arguments."""
    _call(address, values.ctypes.data, results.ctypes.data)


# --- a method in numbers ----------------------------------------------------------

# Where a method's description has what: the address of its rule; whether there is a mean; whether
# running statistics take in what was used; rows of the table of statistics; what state takes in.
RULE, CENTERED, TRACKS_APPLIED, R, D, CENTER, BATCH_WEIGHT, USE_BATCH_STATS = range(8)
HAS_ROWS = 8
TAKES = HAS_ROWS + 1
WEIGHTS = TAKES + ROWS
HAS_WINDOWS = WEIGHTS + ROWS
WINDOW_TAKES = HAS_WINDOWS + 1
HAS_COUNTERS = WINDOW_TAKES + WINDOWS
COMPLETE = HAS_COUNTERS + 1
LENGTH = COMPLETE + COUNTERS


_kept: list[Any] = []  # what has an address that is in use


@cache
def described(part: Part, table: Part, centered: bool, tracks_applied: bool) -> int:
    """A part of a method as the loops read it, by its address.

    Args:
        part: The rule and its state.
        table: The forward part, which says what a table of statistics holds.
        centered: Whether there is a mean.
        tracks_applied: Whether running statistics take in what was used.
    """
    found = np.zeros(LENGTH, np.int64)
    if part.rule is not None:
        entry = _compiled(part.rule, part.places, part is table)
        found[RULE] = entry.address
        _kept.append(entry)
    found[CENTERED], found[TRACKS_APPLIED] = centered, tracks_applied
    found[R : USE_BATCH_STATS + 1] = [table.row(name) for name in USES]
    found[HAS_ROWS], found[HAS_WINDOWS] = len(part.rows), len(part.windows)
    found[HAS_COUNTERS] = len(part.counters)
    for i, (take, weight) in enumerate(part.rows):
        found[TAKES + i], found[WEIGHTS + i] = take, weight
    for i, take in enumerate(part.windows):
        found[WINDOW_TAKES + i] = take
    for i, complete in enumerate(part.counters):
        found[COMPLETE + i] = complete
    _kept.append(found)
    address: int = found.ctypes.data
    return address
