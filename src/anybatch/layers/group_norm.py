"""Group norms as torch has them: group, layer and instance normalization."""

from typing import Any

from torch import nn

from anybatch.core.arguments import check_count


def fitting_groups(num_features: int, num_groups: int) -> int:
    """The largest divisor of the channels up to ``num_groups`` that leaves two channels a group.

    >>> fitting_groups(16, 32), fitting_groups(48, 32), fitting_groups(1, 32)
    (8, 24, 1)
    """
    most = min(num_groups, max(num_features // 2, 1))
    return next(k for k in range(most, 0, -1) if num_features % k == 0)


def group_norm(
    num_features: int,
    eps: float = 1e-5,
    affine: bool = True,
    device: Any = None,
    dtype: Any = None,
    *,
    num_groups: int = 32,
) -> nn.Module:
    """Torch's group norm, its groups cut to fit the channels."""
    check_count("num_groups", num_groups)
    groups = fitting_groups(num_features, num_groups)
    return nn.GroupNorm(groups, num_features, eps, affine, device, dtype)


def layer_norm(
    num_features: int, eps: float = 1e-5, affine: bool = True, device: Any = None, dtype: Any = None
) -> nn.Module:
    """Torch's group norm with one group."""
    return nn.GroupNorm(1, num_features, eps, affine, device, dtype)


def instance_norm(
    num_features: int, eps: float = 1e-5, affine: bool = True, device: Any = None, dtype: Any = None
) -> nn.Module:
    """Torch's group norm with one group per channel."""
    return nn.GroupNorm(num_features, num_features, eps, affine, device, dtype)
