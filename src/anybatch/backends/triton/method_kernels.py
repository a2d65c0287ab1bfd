"""The kernels of a method: those of all, with its rules in them."""

from functools import cache
from typing import Any, NamedTuple

from anybatch.backends.protocol import MethodSpec
from anybatch.backends.rule import RULE_SETS
from anybatch.backends.triton.backward import backward_columns
from anybatch.backends.triton.bound_rules import Flags, with_rule
from anybatch.backends.triton.forward import forward_columns
from anybatch.backends.triton.rules import moves_of


class Kernels(NamedTuple):
    """The kernels of a method.

    Attributes:
        forward: Its `forward_columns`.
        backward: Its `backward_columns`.
        uses: What its rule gives: 1 for r, 2 for d, 4 for batch_weight, 8 for use_batch_stats.
        moves: What its state takes in, see `moves_of`.
        averages: What that of its backward averages does.
    """

    forward: Any
    backward: Any
    uses: int
    moves: int
    averages: int


def kernels_for(spec: MethodSpec) -> Kernels:
    """The kernels of a method."""
    fixed = _fixed(spec.kept.options), _fixed(spec.averages.options)
    return _kernels(spec.method.name, *fixed, len(spec.kept.numbers))


def _fixed(options: tuple[float, ...]) -> Flags:
    """Options that are no numbers; None for those that are."""
    return tuple(one if isinstance(one, bool) else None for one in options)


@cache
def _kernels(name: str, fixed: Flags, fixed_backward: Flags, numbers: int) -> Kernels:
    forward, backward, tracks_applied, _ = RULE_SETS[name]
    return Kernels(
        with_rule(forward_columns, "choose", forward, fixed),
        with_rule(backward_columns, "average", backward, fixed_backward),
        sum(bit for bit, name in _USES if name in forward.uses),
        moves_of(forward, numbers, tracks_applied),
        moves_of(backward, 0, False),
    )


_USES = ((1, "r"), (2, "d"), (4, "batch_weight"), (8, "use_batch_stats"))


def padded(values: tuple[Any, ...], number: int, blank: Any) -> tuple[Any, ...]:
    """So many values, blank ones where there are fewer."""
    return values if len(values) == number else (*values, *(blank,) * (number - len(values)))
