"""A method: the state that it declares, its rules, and what kernels are told of them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from anybatch.backends.protocol import BACKWARD, MethodSpec, RuleState
from anybatch.backends.rule import (
    APPLIED_MEAN,
    APPLIED_VAR,
    AVERAGE,
    BACKWARD_OPTIONS,
    BATCH_MEAN,
    BATCH_VAR,
    COUNTER,
    COUNTERS,
    EPS,
    FULL,
    NUMBER,
    NUMBERS,
    OPTION,
    OPTIONS,
    ROW,
    ROWS,
    UPDATE_WEIGHT,
    USES,
    WINDOW,
    WINDOWS,
    Part,
    Rule,
    RuleSet,
    rule_set,
)
from anybatch.core.bound_rule import in_torch

_TAKES = {
    "mean": BATCH_MEAN,
    "var": BATCH_VAR,
    "applied_mean": APPLIED_MEAN,
    "applied_var": APPLIED_VAR,
    "psi": AVERAGE,
}


class Stateful(Protocol):
    """A layer, as far as rules see it."""

    method_state: dict[str, Tensor]
    centered: bool
    num_features: int
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None


# --- state ------------------------------------------------------------------------


class Counter(NamedTuple):
    """A number of steps.

    Attributes:
        complete: Count only those in which every channel was finite.
    """

    complete: bool = False

    @property
    def whole(self) -> bool:
        """True for a whole number."""
        return True

    def shape(self, layer: Stateful) -> tuple[int, ...]:
        """Its shape in a layer."""
        return ()


class Number(NamedTuple):
    """A number that no step moves, kept on the layer's device so that reading it costs nothing.

    Attributes:
        whole: Whether it is a whole number.
    """

    whole: bool = False

    def shape(self, layer: Stateful) -> tuple[int, ...]:
        """Its shape in a layer."""
        return ()


class Row(NamedTuple):
    """The value of the newest step, per channel.

    Attributes:
        of: What it takes in: "mean" or "var" of the batch, "applied_mean" or "applied_var" that a
            rule gave; in the backward pass "psi", as averaged. Several lie side by side.
    """

    of: tuple[str, ...]

    def shape(self, layer: Stateful) -> tuple[int, ...]:
        """Its shape in a layer."""
        return (_width(layer, self.of),)


class Average(NamedTuple):
    """An exponential average per channel; the first step counts whole.

    Attributes:
        of: What it takes in, as of a `Row`.
        weight: Attribute of the layer that is the weight of the newest step.
    """

    of: tuple[str]
    weight: str

    def shape(self, layer: Stateful) -> tuple[int, ...]:
        """Its shape in a layer."""
        return (layer.num_features,)


class Window(NamedTuple):
    """The newest steps, per channel.

    Attributes:
        of: What it takes in, as of a `Row`; its average is over the steps of the first counter.
        length: Attribute of the layer that is the number of steps.
    """

    of: tuple[str, ...]
    length: str

    def shape(self, layer: Stateful) -> tuple[int, ...]:
        """Its shape in a layer."""
        return (getattr(layer, self.length), _width(layer, self.of))


def _width(layer: Stateful, of: tuple[str, ...]) -> int:
    """Numbers of a step: in the centered form ``mean(g)`` lies beside ``mean(g * z)``."""
    twice = layer.centered and "psi" in of
    return (2 if twice else len(of)) * layer.num_features


Kept = Counter | Number | Row | Average | Window


class State:
    """The state that a method keeps beside running statistics.

    Args:
        running: What running statistics take in: "batch", its mean and unbiased variance; or
            "applied", what a rule gave.
        **kept: Each by its name in the layer's ``state_dict``.
    """

    def __init__(self, running: str = "batch", **kept: Kept) -> None:
        self.running, self.kept = running, tuple(kept.items())


# --- a method ---------------------------------------------------------------------


class Side(NamedTuple):
    """The forward or backward half of a method.

    Attributes:
        part: As kernels take it.
        names: Of its rule's arguments.
        rows: Names of its rows and averages.
        windows: Names of its windows, and the components of each.
        counters: Names of its counters.
        numbers: Names of its numbers.
        options: Names of attributes of the layer that it reads.
        bound: The rule on torch's tensors of float32, and of float64; () without one.
    """

    part: Part
    names: tuple[str, ...]
    rows: tuple[tuple[str, Row | Average], ...]
    windows: tuple[tuple[str, Window], ...]
    counters: tuple[tuple[str, Counter], ...]
    numbers: tuple[str, ...]
    options: tuple[str, ...]
    bound: tuple[Callable[..., Any], ...]


class Method(NamedTuple):
    """A method, of layers with one setting of what is no number.

    Attributes:
        forward: How it chooses statistics.
        backward: How it averages those of the backward pass.
        state: What it keeps.
        rules: As kernels take it.
    """

    forward: Side
    backward: Side
    state: State
    rules: RuleSet


def method_of(choose: Rule | None, average: Rule | None, state: State) -> Method:
    """The method of rules and a state.

    Raises:
        TypeError: For a rule or state that no backend can serve.
    """
    ahead = tuple(pair for pair in state.kept if not pair[0].startswith(BACKWARD))
    behind = tuple(pair for pair in state.kept if pair[0].startswith(BACKWARD))
    forward, backward = _side(choose, ahead, True), _side(average, behind, False)
    rules = rule_set(forward.part, backward.part, state.running == "applied")
    return Method(forward, backward, state, rules)


def _side(rule: Rule | None, kept: tuple[tuple[str, Kept], ...], forward: bool) -> Side:
    """A half of a method: where each argument of its rule lies, and what its state takes in."""
    rows = tuple((name, one) for name, one in kept if isinstance(one, (Row, Average)))
    windows = tuple((name, one) for name, one in kept if isinstance(one, Window))
    counters = tuple((name, one) for name, one in kept if isinstance(one, Counter))
    names = () if rule is None else rule.arguments
    numbers = tuple(name for name, one in kept if isinstance(one, Number) and name in names)
    places = {"mean": 0, "var": 1, "running_mean": 2, "running_var": 3} if forward else {"psi": 1}
    places["eps"] = EPS
    if not forward:
        places["update_weight"] = UPDATE_WEIGHT
    at = WINDOW
    for name, one in windows:
        for component in one.of:
            places[f"{name}_{component}"], places[f"{name}_full"] = at, FULL + at - WINDOW
            at += 1
    if windows and not counters:
        raise TypeError(f"{windows[0][0]}: a window needs a Counter beside it")
    if rows and not counters and any(isinstance(one, Average) for _, one in rows):
        raise TypeError(f"{rows[0][0]}: an average needs a Counter beside it")
    places |= {f"old_{name}": ROW + i for i, (name, _) in enumerate(rows)}
    places |= {name: COUNTER + i for i, (name, _) in enumerate(counters)}
    places |= {name: NUMBER + i for i, name in enumerate(numbers)}
    weights = [one.weight for _, one in rows if isinstance(one, Average)]
    options = tuple(dict.fromkeys(n for n in (*names, *weights) if n not in places))
    places |= {name: OPTION + i for i, name in enumerate(options)}
    room = (
        (ROWS, WINDOWS, COUNTERS, NUMBERS, OPTIONS) if forward else (1, 1, 1, 0, BACKWARD_OPTIONS)
    )
    numbered = (len(rows), at - WINDOW, len(counters), len(numbers), len(options))
    kinds = ("rows", "windowed values", "counters", "numbers", "options")
    for what, number, most in zip(kinds, numbered, room, strict=True):
        if number > most:
            raise TypeError(f"{rule!r}: {number} {what}; kernels have room for {most}")
    uses: tuple[str, ...] = ()
    if forward and rule is not None:
        given = rule(*(1.0,) * len(names))
        present = {name for name in given._fields[2:] if getattr(given, name) is not None}
        present |= {"center"} if "batch_weight" in present else set()
        uses = tuple(name for name in USES if name in present)
    part = Part(
        rule,
        tuple(places[name] for name in names),
        uses,
        tuple(
            (_TAKES[one.of[0]], places[one.weight] if isinstance(one, Average) else -1)
            for _, one in rows
        ),
        tuple(_TAKES[component] for _, one in windows for component in one.of),
        tuple(one.complete for _, one in counters),
    )
    bound: tuple[Callable[..., Any], ...] = ()
    if rule is not None:
        bound = in_torch(rule, torch.float32), in_torch(rule, torch.float64)
    return Side(part, names, rows, windows, counters, numbers, options, bound)


def spec_of(layer: Stateful, method: Method) -> MethodSpec | str:
    """A method as kernels take it for a layer, or why they do not."""
    forward, backward = method.forward, method.backward
    if any(len(one.of) > 1 for _, one in forward.windows):
        return "a window of two values: kernels take one of each"
    if backward.names and layer.centered:
        return "an average of the backward pass in the centered form, where it is two"
    return MethodSpec(
        method.rules, _state_of(layer, forward), _state_of(layer, backward), layer.centered
    )


def _state_of(layer: Stateful, side: Side) -> RuleState:
    """State and options of a layer for one half of its method."""
    method_state = layer.method_state
    return RuleState(
        tuple(method_state[name] for name, _ in side.rows),
        tuple(method_state[name] for name, _ in side.windows),
        tuple(method_state[name] for name, _ in side.counters),
        tuple(method_state[name] for name in side.numbers),
        tuple(getattr(layer, name) for name in side.options),
    )
