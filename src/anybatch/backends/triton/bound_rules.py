# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Rules as the GPU kernels call them: kernels of their own, with the rule in a global's place.

Triton reads a function's source, and knows a kernel by its source and those of what it calls. So
each method has kernels whose `choose` and `average` are its rules.
"""

import linecache
from functools import cache
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from anybatch.backends.rule import OPTION, PLACES, ROWS, Part, Rule, bind, fingerprint
from anybatch.backends.triton.constants import LOOSE


@triton.jit
def _sqrt(x):
    return tl.sqrt(x)


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _where(condition, one, other):
    return tl.where(condition, one, other)


@triton.jit
def _lerp(start, end, weight):
    return start + weight * (end - start)


@triton.jit
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

Flags = tuple[bool | None, ...]  # values of options that are no numbers, else None


@cache
def with_rule(kernel: Any, name: str, part: Part, flags: Flags) -> Any:
    """A kernel that calls a rule.

    Args:
        kernel: The kernel.
        name: The global that it calls.
        part: The rule and its state.
        flags: Which options are fixed.
    """
    if part.rule is None:
        return kernel
    function = kernel.fn
    scope = {**function.__globals__, name: _adapted(name, part.rule, part, flags)}
    bound = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    bound.__annotations__, bound.__qualname__ = function.__annotations__, function.__qualname__
    bound.__module__ = function.__module__
    return triton.jit(bound, do_not_specialize=LOOSE)


def _adapted(name: str, rule: Rule, part: Part, flags: Flags) -> Any:
    """A rule that takes its arguments from a list of all that there may be."""
    places = ", ".join(f"v{place}" for place in range(PLACES))
    fixed = {OPTION + i: repr(flag) for i, flag in enumerate(flags) if flag is not None}
    arguments = ", ".join(fixed.get(place, f"v{place}") for place in part.places)
    text = f"def {name}({places}):\n"
    if name == "choose":
        weights = [weight for _, weight in part.rows] + [-1] * (ROWS - len(part.rows))
        given = ", ".join("1.0" if weight < 0 else f"v{weight}" for weight in weights)
        text += f"    mean, var, r, d, batch_weight, use_batch_stats = rule({arguments})\n"
        text += f"    return mean, var, r, d, batch_weight, use_batch_stats, {given}\n"
    else:
        text += f"    return rule({arguments})\n"
    file = f"<{name} {rule.__qualname__} {fingerprint(rule)} {hash((part, flags))}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope = {"tl": tl, "rule": bind(rule, FUNCTIONS, triton.jit, tl.constexpr, tl=tl)}
    exec(compile(text, file, "exec"), scope)
    made: Any = scope[name]
    made.__module__ = rule.__module__
    return triton.jit(made)
