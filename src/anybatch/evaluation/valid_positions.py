"""The positions of a batch that a norm counts, where it has a mask."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from anybatch.core.masks import fit_mask
from anybatch.core.norm_layer import NormLayer


def valid_positions(
    norm: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor
) -> Tensor | None:
    """The mask of a call's valid positions, ``(N, 1, ...)``; None if all are valid.

    Args:
        norm: A norm, of this library or another.
        args: Positional arguments of the call.
        kwargs: Keyword arguments.
        x: Its input.
    """
    if not isinstance(norm, NormLayer):
        return None
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    mask = norm.mask if mask is None else mask
    return None if mask is None else fit_mask(mask, x, type(norm).__name__).valid
