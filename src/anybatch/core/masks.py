"""Masks in the shape of activations, made once for all layers that share one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.backends import is_traced
from anybatch.core.tensor_subclasses import as_plain


class FittedMask(NamedTuple):
    """A mask in the shape of an activation.

    Attributes:
        valid: ``(N, 1, ...)``, contiguous.
        counted: See `ReductionScope`; None where layers do not share it.
    """

    valid: Tensor
    counted: dict[tuple[int, ...], tuple[int, ...]] | None = None


class _SharedMask:
    """A mask that layers share, in the shapes that they asked for."""

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.version = mask, mask._version
        self.fitted: dict[Any, FittedMask] = {}

    def fit(self, x: Tensor, name: str) -> FittedMask:
        if self.version != self.mask._version:  # somebody has written into it
            self.version = self.mask._version
            self.fitted.clear()
        key = x.shape[0], x.shape[2:], x.device
        found = self.fitted.get(key)
        if found is None:
            found = self.fitted[key] = FittedMask(_fit(self.mask, x, name), {})
        return found


class _Shared(threading.local):
    masks: tuple[_SharedMask, ...] = ()


_shared = _Shared()


@contextmanager
def shared_mask(mask: Tensor) -> Iterator[None]:
    """A context in which a mask is fitted once for each shape, whichever layer it is for.

    One on a device is fitted by each layer: a graph that is captured would hold an old copy.
    """
    own: tuple[_SharedMask, ...] = ()
    if mask.is_cpu and not (is_traced() or mask.is_inference()):
        own = (_SharedMask(mask),)
    _shared.masks = *own, *_shared.masks
    try:
        yield
    finally:
        _shared.masks = tuple(one for one in _shared.masks if one not in own)


def fit_mask(mask: Tensor, x: Tensor, name: str) -> FittedMask:
    """A mask as ``(N, 1, ...)`` of an activation's spatial shape.

    Args:
        mask: True, or not 0, where an example, or a position of it, is valid: ``(N,)``,
            ``(N, ...)`` or ``(N, 1, ...)``. Where an activation is smaller or larger than it along
            a dimension, the nearest position counts; where it has no such dimension at all, an
            example with any valid position is valid.
        x: The activation.
        name: Of the layer, for the error.

    Returns:
        The mask, on the activation's device.

    Raises:
        TypeError: For a mask of floating point.
        ValueError: For one that does not fit.
    """
    if not is_traced():
        for shared in _shared.masks:
            if shared.mask is mask:
                return shared.fit(x, name)
    return FittedMask(_fit(mask, x, name))


def _fit(mask: Tensor, x: Tensor, name: str) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask of type {what}: give a tensor of bool, true where input is valid")
    valid, spatial = as_plain(mask).to(x.device), x.shape[2:]
    # A tensor of its own: the caller may write into theirs before the backward pass.
    valid = valid.clone() if valid.dtype is torch.bool else valid != 0
    if valid.dim() == x.dim() and x.dim() > 2 and valid.shape[1] == 1:
        valid = valid.squeeze(1)
    if not spatial and valid.dim() > 1 and valid.shape[0] != x.shape[0] == valid.numel():
        valid = valid.flatten()  # tokens in rows
    fits = valid.dim() > 0 and valid.shape[0] == x.shape[0]
    if not fits or (spatial and valid.dim() not in (1, 1 + len(spatial))):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: {name} got an input of shape {tuple(x.shape)}; "
            f"give a mask of shape {(x.shape[0], *spatial)}, or {(x.shape[0],)} for whole examples"
        )
    if not spatial:
        return valid.flatten(1).any(1, keepdim=True) if valid.dim() > 1 else valid.unsqueeze(1)
    if valid.dim() == 1:
        return valid.view(-1, *(1,) * (x.dim() - 1)).expand(x.shape[0], 1, *spatial).contiguous()
    for dim, size in enumerate(spatial, 1):
        if valid.shape[dim] != size:
            nearest = torch.arange(size, device=x.device) * valid.shape[dim] // size
            valid = valid.index_select(dim, nearest)
    return valid.unsqueeze(1).contiguous()
