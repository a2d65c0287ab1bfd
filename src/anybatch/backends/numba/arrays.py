# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Tensors in compiled code: by their addresses.

To have numpy look at a tensor takes most of a microsecond, to hand an array to a compiled function
some tenths; a small batch has twenty of them, and is done in two. An address takes hundredths. The
caller holds the tensors, and knows that they are dense.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from anybatch.backends.numba.compile import inlined
from anybatch.backends.numba.low_precision import as_numbers

# An empty array, which tells compiled code a type.
LIKE: dict[torch.dtype, NDArray[Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),  # as `low_precision` tells them
    torch.float16: np.empty(0, np.int16),
}
# The type of parameters and statistics beside such an activation.
KEPT = {torch.float32: torch.float32, torch.float64: torch.float64}
KEPT |= {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Told(NamedTuple):
    """Numbers that compiled code reads at an address."""

    address: int
    numbers: NDArray[Any]


def told(numbers: Iterable[float], kind: type = np.int64) -> Told:
    """Lay numbers of a kind side by side."""
    array: NDArray[Any] = np.array(list(numbers), kind)
    return Told(array.ctypes.data, array)


@intrinsic
def _as_pointer(typingctx, address):
    """An address as a pointer."""

    def codegen(context, builder, signature, values):
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


_pointer: Any = _as_pointer  # its signature is that of compiled code


@inlined
def array_at(address, shape, like):
    """The dense array of a shape at an address, of the type of `like`."""
    return as_numbers(carray(_pointer(address), shape, like.dtype))


@inlined
def numbers_at(address, length):
    """So many whole numbers at an address."""
    return carray(_pointer(address), length, np.int64)


@inlined
def cut_at(address):
    """Shape of a normalization batch, whether channels are last, and where its groups begin."""
    told = numbers_at(address, 5)
    starts = numbers_at(address + 5 * told.itemsize, told[4] + 1)
    return (told[0], told[1], told[2]), told[3] != 0, starts


@inlined
def settings_at(address, length):
    """So many numbers at an address."""
    return carray(_pointer(address), length, np.float64)


@inlined
def counter_at(address):
    """The whole number at an address."""
    return carray(_pointer(address), (), np.int64)


@inlined
def activation_at(address, shape, like):
    """An activation; an empty one where there is none, at address 0."""
    if address == 0:
        shape = (0, shape[1], shape[2])
    return array_at(address, shape, like)


@inlined
def row_or_none(address, channels, like):
    """A row; an empty one where there is none, at address 0."""
    return array_at(address, channels if address != 0 else 0, like)


@inlined
def valid_at(address, x, last):
    """The mask of an activation, ``(N, L)``; an empty one where there is none, at address 0."""
    examples = x.shape[0] if address != 0 else 0
    return carray(_pointer(address), (examples, x.shape[1] if last else x.shape[2]), np.bool_)


@inlined
def counts_at(address, starts, values):
    """Values per channel of each group: given, or all, so many of an example."""
    counts = np.empty(starts.shape[0] - 1)
    given = carray(_pointer(address), counts.shape[0] if address != 0 else 0, np.float64)
    for g in range(counts.shape[0]):  # a slice's assignment compiles what it would say of shapes
        counts[g] = given[g] if address != 0 else (starts[g + 1] - starts[g]) * values
    return counts


@inlined
def running_at(addresses, channels, like):
    """Running mean, running variance and batches tracked."""
    mean, var, tracked = addresses
    return array_at(mean, channels, like), array_at(var, channels, like), counter_at(tracked)


class _Lent:
    """A tensor as numpy asks for one."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # CPU


def read(parameter: Tensor) -> NDArray[Any]:
    """The values of a parameter, to be read.

    ``Tensor.numpy`` would forbid for good to resize the tensor's memory, which is how sharding
    (``torch.distributed.fsdp``) gives it back between two uses.
    """
    array: NDArray[Any] = np.from_dlpack(_Lent(parameter.detach()))
    return array
