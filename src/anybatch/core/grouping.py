"""Parts of a batch: steps along which memory runs, and groups within a step."""

from functools import lru_cache
from operator import index
from typing import NamedTuple

from anybatch.backends import is_traced


class Partition(NamedTuple):
    """A cut of a batch of examples.

    Attributes:
        sizes: Examples in each group, in order; they sum to the batch.
        steps: Number of groups in each normalization batch, in order.
        batches: Examples in each normalization batch, in order.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    batches: tuple[int, ...]


def successive(examples: int, size: int) -> tuple[int, ...]:
    """Cut off ``size`` examples at a time; the last group may be smaller.

    >>> successive(7, 3)
    (3, 3, 1)
    """
    whole, rest = divmod(examples, size)
    return (size,) * whole + ((rest,) if rest else ())


def even(examples: int, size: int) -> tuple[int, ...]:
    """Cut into ``ceil(examples / size)`` groups as equal as can be, larger ones first.

    >>> even(9, 4)
    (3, 3, 3)
    """
    groups = -(-examples // size)
    small, large = divmod(examples, groups)
    return (small + 1,) * large + (small,) * (groups - large)


def partition(
    examples: int, norm_batch_size: int | None = None, group_size: int | None = None
) -> Partition:
    """Cut a batch into normalization batches, and these into groups.

    Args:
        examples: Size of the batch.
        norm_batch_size: Examples in a normalization batch; None is all of them.
        group_size: Examples in a group at most; None is all of a normalization batch.
    """
    if norm_batch_size is not None or group_size is not None:
        examples = index(examples)  # not a compiler's symbol, which has no number of groups
    cut = _cut if is_traced() else _kept_cut
    return cut(examples, norm_batch_size, group_size)


def _cut(examples: int, norm_batch_size: int | None, group_size: int | None) -> Partition:
    batches = (examples,) if norm_batch_size is None else successive(examples, norm_batch_size)
    groups = [(batch,) if group_size is None else even(batch, group_size) for batch in batches]
    return Partition(
        tuple(size for step in groups for size in step),
        tuple(len(step) for step in groups),
        batches,
    )


_kept_cut = lru_cache(maxsize=256)(_cut)
