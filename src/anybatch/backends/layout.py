"""Whether kernels that read and write memory by its address can take a tensor."""

import torch
from torch import Tensor

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether a gradient is memory to read: not traced, not one of a batch of gradients."""
    if type(x) is not Tensor or x._is_zerotensor():
        return False
    return not torch._C._functorch.is_legacy_batchedtensor(x)


def rows(x: Tensor, examples: tuple[slice, ...]) -> Tensor:
    """Some examples of a batch: a view of successive ones, else a copy."""
    return x[examples[0]] if len(examples) == 1 else torch.cat([x[one] for one in examples])


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a batch are innermost in memory, without gaps."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether a tensor is without gaps, its last dimension innermost or, of a map, its channels."""
    return x.is_contiguous() or (x.dim() > 3 and is_channels_last(x))


def dense(x: Tensor, last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor without gaps in memory, channels last or first, of a type if given."""
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    if x.is_neg():
        x = x.resolve_neg()
    if not last:
        return x.contiguous()
    return x if is_channels_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)
