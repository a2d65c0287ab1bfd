"""Checked addresses of tensors: the only ones that compiled kernels are given.

A kernel reads and writes at an address as many values as it was told. A tensor without memory of
that size (on the meta device, empty, of another type, with a freed storage) would make it write
elsewhere.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def address_of(tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    """The address of a dense CPU tensor.

    Args:
        tensor: The tensor.
        dtype: The type that the kernel reads or writes.
        numel: How many values it reads or writes.

    Returns:
        Its address; 0 for no values.

    Raises:
        RuntimeError: If there is no such memory.

    Example:
        >>> address_of(torch.ones(2), torch.float32, 2) != 0
        True
    """
    place = tensor.data_ptr()
    storage = tensor.untyped_storage()
    if (
        tensor.dtype is not dtype
        or not tensor.is_cpu
        or tensor.numel() < numel
        or (numel and not place)
        or place + numel * tensor.itemsize > storage.data_ptr() + storage.nbytes()
    ):
        _refuse(tensor, dtype, numel, "CPU")
    return place


def row_address(row: Tensor, dtype: torch.dtype, channels: int) -> int:
    """The address of a row of a value a channel, see `address_of`."""
    if row.numel() != channels or not row.is_contiguous() or row.is_neg():
        _refuse(row, dtype, channels, "CPU")
    return address_of(row, dtype, channels)


class CheckedMemory:
    """A value made from some tensors' addresses, valid while they and their memory are the same.

    A kernel takes as many values from an address as it was told when the tensors were checked. The
    storage is held, so that no other comes to lie where it was; while it has its size, the values
    are there.

    Example:
        >>> memory, rows = CheckedMemory(), (torch.ones(2),)
        >>> memory.find(rows)
        >>> memory.keep(rows, "known")
        'known'
        >>> memory.find(rows), memory.find((torch.ones(2),))
        ('known', None)
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: tuple[list[tuple[Tensor, int, Any, int]], Any] | None = None

    def find(self, tensors: Sequence[Tensor | None]) -> Any:
        """Return the value kept for these tensors; None for others, or other memory."""
        known = self._known  # which another thread may replace
        if known is None:
            return None
        for one, (same, place, storage, size) in zip(tensors, known[0], strict=True):
            if one is not same or one.data_ptr() != place or storage.nbytes() != size:
                return None
        return known[1]

    def keep(self, tensors: Sequence[Any], value: Any) -> Any:
        """Keep a value for these tensors, and return it."""
        held = [(one, one.data_ptr(), one.untyped_storage()) for one in tensors]
        self._known = [(*one, one[2].nbytes()) for one in held], value
        return value


def check_device_memory(device: torch.device, *tensors: Tensor | None) -> None:
    """Raise unless tensors are dense memory of a device, as kernels that get tensors need it.

    Raises:
        RuntimeError: For the first that is not.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        needed = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
        small = tensor.untyped_storage().nbytes() < needed
        if tensor.device != device or not tensor.is_contiguous() or small:
            _refuse(tensor, tensor.dtype, tensor.numel(), str(device))


def _refuse(tensor: Tensor, dtype: torch.dtype, numel: int, device: str) -> NoReturn:
    storage = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
    raise RuntimeError(
        f"a kernel needs {numel} values of {dtype} side by side in {device} memory, and was given "
        f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} on {tensor.device}, whose "
        f"storage has {storage} bytes: load or move the layer's parameters and state there first"
    )
