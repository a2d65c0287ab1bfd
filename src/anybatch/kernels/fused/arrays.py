"""Tensors as arrays, without a trace on the tensor."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]


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
