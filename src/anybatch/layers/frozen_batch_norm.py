"""Frozen batch normalization: statistics, scale and shift are constants."""

from typing import Any, ClassVar, NoReturn

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from anybatch.core.graphs import as_leaf, refuse_script


class FrozenBatchNorm(_NormBase):
    """Batch normalization by constants over ``(N, C, ...)``, in training and in evaluation.

    ::

        y = weight * (x - running_mean) / sqrt(running_var + eps) + bias

    The layers of ``anybatch.convert(model, "frozen")``. Weight and bias are parameters that require
    no gradient, so that an optimizer stays valid and `anybatch.convert` can turn the layer into any
    method again. Keys and shapes of its ``state_dict`` are those of ``torch.nn.BatchNorm``. To
    freeze a layer and keep its method, use `anybatch.freeze`.

    Args:
        num_features: Channels C.
        eps: Added to the variance (default 1e-5).
        momentum: Not used; for code that builds batch norms (default 0.1).
        affine: Have weight and bias (default True).
        track_running_stats: Must be True.
        device: Of parameters and statistics.
        dtype: Of parameters and statistics.

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d.

    Raises:
        ValueError: For ``track_running_stats=False`` or an input of another shape.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.FrozenBatchNorm2d(8)
        >>> norm(torch.randn(1, 8, 4, 4)).requires_grad
        False
    """

    dims: ClassVar[int] = 0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not track_running_stats:
            raise ValueError(
                f"track_running_stats=False: {type(self).__name__} normalizes by running "
                "statistics; leave it True"
            )
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the constants."""
        if not isinstance(input, Tensor):
            return as_leaf(self, input)
        if input.dim() not in ((2, 3) if self.dims == 1 else (self.dims + 2,)):
            raise ValueError(
                f"input of shape {tuple(input.shape)}: {type(self).__name__} takes a channel "
                f"dimension and {self.dims} spatial ones"
            )
        statistics = self.running_mean, self.running_var
        return F.batch_norm(input, *statistics, self.weight, self.bias, False, 0.0, self.eps)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def extra_repr(self) -> str:
        """Channels and eps."""
        return f"{self.num_features}, eps={self.eps}"


class FrozenBatchNorm1d(FrozenBatchNorm):
    __doc__ = FrozenBatchNorm.__doc__
    dims = 1


class FrozenBatchNorm2d(FrozenBatchNorm):
    __doc__ = FrozenBatchNorm.__doc__
    dims = 2


class FrozenBatchNorm3d(FrozenBatchNorm):
    __doc__ = FrozenBatchNorm.__doc__
    dims = 3
