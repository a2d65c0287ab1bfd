"""Rules: plain functions of numbers, written once and run by every backend.

A rule calls the elementary functions below, other rules and numbers of its module, and nothing
else. `bind` gives it a backend's functions of the same names, so that its one source runs on rows
of torch, in Numba's loops and in Triton's kernels. Called as it is, a rule takes Python's numbers.
"""

import builtins
import dis
import hashlib
import math
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple


class Rule:
    """A function that `rule` marks.

    Attributes:
        function: The function.
        arguments: Names of its arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not isinstance(function, FunctionType) or function.__closure__:
            raise TypeError(
                f"rule {function!r}: give a function of a module or class that uses no variable "
                "of a function around it"
            )
        code = function.__code__
        self.function: Any = function
        self.arguments = code.co_varnames[: code.co_argcount]
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        self.__module__, self.__qualname__ = function.__module__, function.__qualname__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> str:
        return self.__qualname__

    def __repr__(self) -> str:
        return f"rule {self.__module__}.{self.__qualname__}({', '.join(self.arguments)})"


def rule(function: Callable[..., Any]) -> Rule:
    """Mark a function of numbers as a rule; see the module."""
    return Rule(function)


# Where a rule's arguments lie side by side: the batch's statistics (or, of a rule of the backward
# pass, mean(g) and mean(g z)), running statistics, and the layer's state and options.
ROWS, WINDOWS, COUNTERS, NUMBERS, OPTIONS = 4, 2, 2, 2, 6  # how many of each, at most
BACKWARD_OPTIONS = 2  # the same of a rule of the backward pass, which has one of each other kind
ROW = 4
WINDOW = ROW + ROWS
FULL = WINDOW + WINDOWS
COUNTER = FULL + WINDOWS
NUMBER = COUNTER + COUNTERS
OPTION = NUMBER + NUMBERS
EPS = OPTION + OPTIONS
UPDATE_WEIGHT = EPS + 1
PLACES = UPDATE_WEIGHT + 1

SETTLED = 20  # batches that running statistics have seen before a channel may be an outlier
PATIENCE = 10  # batches in a row after which it is not an accident

BATCH_MEAN, BATCH_VAR, APPLIED_MEAN, APPLIED_VAR, AVERAGE = range(5)  # what state takes in
# Rows of a table of statistics after mean and variance.
USES = ("r", "d", "center", "batch_weight", "use_batch_stats")


class Part(NamedTuple):
    """A rule of a method, forward or backward, and the state that it reads and moves.

    Attributes:
        rule: The rule; None where the batch's statistics are used as they are.
        places: Where each of its arguments lies.
        uses: Which of `USES` a forward rule gives; `center` goes with `batch_weight`.
        rows: What each row takes in, and the place of its weight; below 0 for all of it.
        windows: What each window takes in.
        counters: Whether a counter counts only steps in which every channel was finite.
    """

    rule: Rule | None = None
    places: tuple[int, ...] = ()
    uses: tuple[str, ...] = ()
    rows: tuple[tuple[int, int], ...] = ()
    windows: tuple[int, ...] = ()
    counters: tuple[bool, ...] = ()

    def row(self, name: str) -> int:
        """The row of a table of statistics that holds one of `USES`; below 0 for none."""
        return 2 + self.uses.index(name) if name in self.uses else -1


class RuleSet(NamedTuple):
    """The rules of a method.

    Attributes:
        forward: How it chooses statistics.
        backward: How it averages those of the backward pass.
        tracks_applied: Whether running statistics take in what was used, not the batch's own.
        name: Of all of it, see `RULE_SETS`.
    """

    forward: Part = Part()
    backward: Part = Part()
    tracks_applied: bool = False
    name: str = ""


# By name, which a traced graph holds: it may run in another process.
RULE_SETS: dict[str, RuleSet] = {"": RuleSet()}


def rule_set(forward: Part, backward: Part, tracks_applied: bool) -> RuleSet:
    """The rules of a method, known by a name."""
    if forward.rule is None and backward.rule is None:
        return RULE_SETS[""]
    rules = [part.rule for part in (forward, backward) if part.rule is not None]
    told = repr([(*part[1:], part.rule and fingerprint(part.rule)) for part in (forward, backward)])
    digest = hashlib.sha256(f"{told}{tracks_applied}".encode()).hexdigest()[:12]
    name = f"{rules[0].__module__}.{rules[0].__qualname__}-{digest}"
    return RULE_SETS.setdefault(name, RuleSet(forward, backward, tracks_applied, name))


class Chosen(NamedTuple):
    """The choice of a rule for a column: mean and variance to normalize by, and how.

    Attributes:
        mean: Mean to subtract.
        var: Variance, or second moment in the uncentered form.
        r: Factor on the normalized value; no gradient passes it.
        d: Constant added to it; no gradient passes it.
        batch_weight: Weight of the batch's own statistics in `mean` and `var`, to which gradients
            flow.
        use_batch_stats: Whether the backward pass uses the batch's own statistics, whatever
            averages it has.
    """

    mean: Any
    var: Any
    r: Any = None
    d: Any = None
    batch_weight: Any = None
    use_batch_stats: Any = None


# --- elementary functions ---------------------------------------------------------


def sqrt(x: Any) -> Any:
    """Square root."""
    return math.sqrt(x)


def minimum(a: Any, b: Any) -> Any:
    """The smaller number."""
    return min(a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger number."""
    return max(a, b)


def clamp(x: Any, low: Any, high: Any) -> Any:
    """A number, or the limit that it is beyond."""
    return min(max(x, low), high)


def where(condition: Any, one: Any, other: Any) -> Any:
    """The one number where a condition holds, else the other."""
    return one if condition else other


def lerp(start: Any, end: Any, weight: Any) -> Any:
    """``start + weight * (end - start)``."""
    return start + weight * (end - start)


def chosen(
    mean: Any,
    var: Any,
    *,
    r: Any = None,
    d: Any = None,
    batch_weight: Any = None,
    use_batch_stats: Any = None,
) -> Any:
    """The value that a rule returns, see `Chosen`."""
    return Chosen(mean, var, r, d, batch_weight, use_batch_stats)


ELEMENTARY: dict[Any, str] = {
    one: one.__name__ for one in (sqrt, minimum, maximum, clamp, where, lerp, chosen)
}


# --- binding ----------------------------------------------------------------------


def bind(
    rule: Rule,
    functions: Mapping[str, Any],
    made: Callable[[Any], Any] = lambda function: function,
    number: Callable[[Any], Any] = lambda value: value,
    **scope: Any,
) -> Any:
    """A rule with a backend's functions in place of the elementary ones.

    Args:
        rule: The rule.
        functions: The backend's, by name.
        made: Makes of a function what the backend calls, such as a compiled one.
        number: Makes of a number of the rule's module what the backend reads.
        **scope: Other globals that the backend needs.

    Raises:
        TypeError: If the rule uses what no backend has.
    """
    function, names = rule.function, {"__builtins__": builtins, **scope}
    for name, value in _globals(rule):
        if isinstance(value, Rule):
            names[name] = bind(value, functions, made, number, **scope)
        elif _is_elementary(value):
            names[name] = functions[ELEMENTARY[value]]
        else:
            names[name] = number(value)
    bound = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    bound.__module__, bound.__qualname__ = function.__module__, function.__qualname__
    return made(bound)


def _globals(rule: Rule) -> list[tuple[str, Any]]:
    """Globals that a rule reads: elementary functions, rules and numbers."""
    names = (i.argval for i in dis.get_instructions(rule.function.__code__) if "GLOBAL" in i.opname)
    found = []
    for name in dict.fromkeys(names):
        value = rule.function.__globals__.get(name, ...)
        if not (isinstance(value, (Rule, int, float)) or _is_elementary(value)):
            raise TypeError(
                f"{rule!r} uses {name!r}: it may use the functions "
                f"{', '.join(ELEMENTARY.values())} of anybatch.core.rule, other rules, and "
                "numbers of its module"
            )
        found.append((name, value))
    return found


def _is_elementary(value: Any) -> bool:
    return isinstance(value, FunctionType) and value in ELEMENTARY


def fingerprint(rule: Rule) -> str:
    """A number of all that a rule computes, which changes with it."""
    found = hashlib.sha256()

    def add(one: Rule) -> None:
        found.update(_parts(one.function.__code__) + repr(one.function.__defaults__).encode())
        for name, value in _globals(one):
            found.update(name.encode())
            if isinstance(value, Rule):
                add(value)
            else:
                found.update(repr(ELEMENTARY.get(value, value)).encode())

    add(rule)
    return found.hexdigest()[:12]


def _parts(code: CodeType) -> bytes:
    return code.co_code + repr((code.co_consts, code.co_names, code.co_varnames)).encode()
