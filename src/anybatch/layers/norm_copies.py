"""Several sets of statistics for one norm: one for each domain, level or kind of batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from anybatch.core.arguments import check_count, check_module


class NormCopies(nn.Module):
    """Copies of a norm, of which one normalizes at a time.

    Each copy has running statistics and a state of its own. `anybatch.convert` with ``copies=``
    makes them, `use_copy` chooses, `keep_copy` goes back to a single norm.

    Args:
        norm: The norm; it is the first copy.
        copies: How many.
        share_affine: Whether all copies use the Parameters of the first (default True).

    Attributes:
        active: Number of the copy that normalizes where none is given, from 0.

    Raises:
        ValueError: If `copies` is below 1; in a forward, for a copy that there is not.

    Example:
        >>> import torch, anybatch
        >>> norm = NormCopies(anybatch.BatchNorm1d(3), 2)
        >>> y = norm(torch.randn(4, 3), copy=1)
        >>> [layer.num_batches_tracked.item() for layer in norm.copies]
        [0, 1]
    """

    def __init__(self, norm: nn.Module, copies: int, share_affine: bool = True) -> None:
        check_count("copies", copies)
        super().__init__()
        before = getattr(norm, "feeder", None)  # which is the same for all copies
        others = (copy.deepcopy(norm, {id(before): before}) for _ in range(copies - 1))
        self.copies = nn.ModuleList([norm, *others])
        if share_affine:
            for layer in self.copies:
                layer._parameters.update(norm._parameters)
        self.active = 0
        self.train(norm.training)

    def forward(self, input: Tensor, *args: Any, copy: int | None = None, **kwargs: Any) -> Tensor:
        """Normalize by one of the copies.

        Args:
            input: What the norm takes.
            *args: To the norm.
            copy: Number of the copy (default None: the active one).
            **kwargs: To the norm.
        """
        number = self.active if copy is None else copy
        _check_number(number, len(self.copies))
        y: Tensor = self.copies[number](input, *args, **kwargs)
        return y

    def extra_repr(self) -> str:
        """The active copy."""
        return f"active={self.active}"


@contextmanager
def use_copy(model: nn.Module, number: int) -> Iterator[None]:
    """A context in which a copy of each norm normalizes, such as that of a domain.

    With activation checkpointing, call ``backward()`` inside it, too.

    Args:
        model: A network converted with ``copies=``.
        number: Of the copy, from 0.

    Raises:
        ValueError: If a norm has no such copy, or there are no copies.

    Example:
        >>> import torch, anybatch
        >>> net = anybatch.convert(nn.Sequential(nn.BatchNorm1d(3)), "bn", copies=2)
        >>> with use_copy(net, 1):
        ...     _ = net(torch.randn(4, 3))
        >>> net[0].copies[1].num_batches_tracked.item()
        1
    """
    check_module("model", model)
    found = [module for module in model.modules() if isinstance(module, NormCopies)]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no copies of norms: convert it with copies=2"
        )
    for module in found:
        _check_number(number, len(module.copies))
    before = [module.active for module in found]
    for module in found:
        module.active = number
    try:
        yield
    finally:
        for module, old in zip(found, before, strict=True):
            module.active = old


def _check_number(number: int, copies: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < copies:
        raise ValueError(f"copy={number!r}: give a whole number from 0 to {copies - 1}")
