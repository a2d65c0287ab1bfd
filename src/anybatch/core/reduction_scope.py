"""The elements that contribute to batch statistics when a mask or process group is used."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from anybatch import backends

WORLD = "world"


class ReductionScope(NamedTuple):
    """The values behind statistics.

    Attributes:
        mask: Valid positions ``(N, 1, ...)``; None for all.
        group: Processes whose batches are one; None for this one alone.
        name: Of the layer, for errors.
        counted: Valid values of groups of so many examples, where layers share the mask; they are
            entered as they are counted.
    """

    mask: Tensor | None = None
    group: Any = None
    name: str = ""
    counted: dict[tuple[int, ...], tuple[int, ...]] | None = None

    def at(self, *examples: slice) -> "ReductionScope":
        """The scope of some examples of the batch."""
        if self.mask is None:
            return self
        return ReductionScope(backends.rows(self.mask, examples), self.group, self.name)

    def counts(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Values per channel of each group, of which a device waits.

        Args:
            x: The batch.
            sizes: Examples in each group.
        """
        if self.mask is None:
            length = x.shape[2:].numel()
            return tuple(size * length for size in sizes)
        found = None if self.counted is None else self.counted.get(sizes)
        if found is None:
            parts = self.mask.split(sizes) if len(sizes) > 1 else (self.mask,)
            found = tuple([int(part.count_nonzero()) for part in parts])
            if self.counted is not None:
                self.counted[sizes] = found
        return found

    def moments(
        self, x: Tensor, sizes: tuple[int, ...], centered: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Mean (None in the uncentred form), variance or second moment, and values behind them."""
        mean, var, counts = self._own(x, sizes, centered)
        if self.group is None:
            return mean, var, counts
        if torch.compiler.is_compiling():
            return pool_processes(mean, var, counts, self.group)
        with answering(self.name):
            return pool_processes(mean, var, counts, self.group)

    def _own(
        self, x: Tensor, sizes: tuple[int, ...], centered: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if self.mask is None and x.numel():
            counts = backends.all_counts(x, sizes)
            if centered:
                return *backends.moments(x, sizes), counts
            return None, backends.second_moment(x, sizes), counts
        mask = x.new_zeros(0, 1, dtype=torch.bool) if self.mask is None else self.mask
        if centered:
            return backends.masked_moments(x, sizes, mask)
        return None, *backends.masked_second_moment(x, sizes, mask)

    def gradient(self, full: Tensor, plain: Tensor) -> Tensor:
        """The gradient that passes the statistics where values stand behind them, else the other.

        Args:
            full: With what passes the statistics.
            plain: As if they were constants.
        """
        return full if self.mask is None else torch.where(self.mask, full, plain)

    def sum(self, *tables: Tensor | None) -> list[Tensor | None]:
        """Sums over all processes."""
        if self.group is None:
            return list(tables)
        if torch.compiler.is_compiling():
            return sum_processes(self.group, *tables)
        with answering(self.name):
            return sum_processes(self.group, *tables)

    def largest(self, table: Tensor) -> Tensor:
        """Largest values over all processes."""
        if self.group is not None:
            dist.all_reduce(table, op=dist.ReduceOp.MAX, group=self.group)
        return table


class HeldGroup:
    """A process group that copies of its layer share, and that no file takes.

    Attributes:
        group: The process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeldGroup":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "process_group: a process group cannot be pickled; save the state_dict, or give "
            "process_group='world', which stands for all processes wherever it is loaded"
        )


def check_group(process_group: Any) -> None:
    """Raise for what is no process group."""
    if process_group is None or process_group == WORLD:
        return
    if process_group is getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", ()):
        raise ValueError(
            "process_group: this process is not one of the group; give each process a group that "
            "it is in, or None"
        )
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group={process_group!r}: give a torch.distributed.ProcessGroup, 'world' for "
            "all processes, or None for this one alone"
        )


def active_group(process_group: Any) -> Any:
    """The process group to synchronize with; None where there is but one process."""
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group == WORLD else process_group
    return group if dist.get_world_size(group) > 1 else None


@contextmanager
def answering(name: str) -> Iterator[None]:
    """A context in which a process that does not answer is an error that says which layer asked."""
    try:
        yield
    except RuntimeError as error:
        what = str(error).strip().splitlines()
        raise RuntimeError(
            f"{name}: a process of its group did not answer, or ran other layers than this one "
            f"({what[-1] if what else type(error).__name__})"
        ) from error


def check_same(group: Any, description: str, device: torch.device | None) -> None:
    """Raise on every process if they do not describe a layer alike.

    Args:
        group: The processes.
        description: Of the layer.
        device: Where a collective takes its numbers from.

    Raises:
        ValueError: If another process describes it otherwise.
    """
    own = zlib.crc32(description.encode())
    ends = torch.tensor([own, -own], dtype=torch.float64, device=device)
    with answering(description):
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    if ends.tolist() != [own, -own]:
        raise ValueError(
            f"process_group: the processes disagree on a layer; here it is {description}: give all "
            "of them the same network, method and options"
        )


def rank_in(group: Any) -> int:
    """This process's place in a group."""
    return dist.get_rank(group)


def size_of(group: Any) -> int:
    """Processes in a group."""
    return dist.get_world_size(group)


def first_of(group: Any, value: Tensor) -> Tensor:
    """The value that the first process of a group has."""
    shared = value.clone()
    dist.broadcast(shared, dist.get_global_rank(group, 0), group=group)
    return shared


def sum_processes(group: Any, *tables: Tensor | None) -> list[Tensor | None]:
    """Sums of tables over all processes, in one collective; None stays None."""
    there = [table for table in tables if table is not None]
    flat = torch.cat([table.reshape(-1) for table in there])
    dist.all_reduce(flat, group=group)
    sums = iter(flat.split([table.numel() for table in there]))
    return [None if table is None else next(sums).view(table.shape) for table in tables]


def pool_processes(
    mean: Tensor | None, var: Tensor, counts: Tensor, group: Any
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Statistics of all processes' values together, the same to the bit on each.

    One collective carries ``n``, ``n * mean`` and ``n * (var + mean**2)`` in float64, where the
    difference of two large numbers costs what float32 does not hold anyway.

    Args:
        mean: Row ``(C,)`` of this process; None in the uncentred form.
        var: Biased variance, or second moment.
        counts: Values a channel behind them.
        group: The processes.

    Returns:
        Mean, variance or second moment, and values of all.
    """
    n = counts.double()
    first = None if mean is None else mean.double()
    second = var.double() if first is None else var.double() + first.square()
    # A process without values has no part, whatever its tables hold.
    own = [None if table is None else torch.where(n > 0, table * n, 0) for table in (first, second)]
    total_first, total_second, total = sum_processes(group, *own, n)
    assert total_second is not None and total is not None
    some = total.clamp(min=1)
    pooled = total_second / some
    if total_first is None:
        return None, pooled.to(var.dtype), total.to(counts.dtype)
    center = total_first / some
    spread = (pooled - center.square()).clamp_(min=0)
    return center.to(var.dtype), spread.to(var.dtype), total.to(counts.dtype)
