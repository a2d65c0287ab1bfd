"""Frozen batch norms of any library, known by their structure."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from anybatch.conversion.module_swap import move_hooks
from anybatch.conversion.norm_with_activation import ends_in_activation, thaw_activation
from anybatch.layers.frozen_batch_norm import FrozenBatchNorm

_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")
TORCH_NORMS: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_PROBED = 1e-8  # the variance at which a forward shows its eps
_SMALLEST_EPS = 1e-12  # for a frozen norm that adds none


def is_frozen_norm(module: nn.Module) -> bool:
    """Check if a module is a batch norm whose statistics, scale and shift are constants.

    These are the `FrozenBatchNorm` layers and, in other libraries, classes named so and modules
    without parameters that have torch's four tensors of a batch norm as buffers.

    Example:
        >>> import anybatch
        >>> is_frozen_norm(anybatch.FrozenBatchNorm2d(3)), is_frozen_norm(nn.BatchNorm2d(3))
        (True, False)
    """
    if "FrozenBatchNorm" in type(module).__name__:
        return True
    return not isinstance(module, _NormBase) and _has_constants(module)


def frozen_dims(norm: nn.Module) -> int:
    """The number of spatial dimensions of a frozen norm, by its class; 2 if that does not say."""
    if isinstance(norm, FrozenBatchNorm):
        return norm.dims
    return next((dims for dims in (1, 3) if f"{dims}d" in type(norm).__name__), 2)


def thawed(norm: nn.Module) -> _BatchNorm:
    """The torch batch norm with a frozen norm's tensors, hooks and output in evaluation mode.

    Scale and shift that are buffers become Parameters of the same memory.

    Raises:
        ValueError: If the norm does not compute what a batch norm computes.

    Example:
        >>> import anybatch
        >>> thawed(anybatch.FrozenBatchNorm2d(3, eps=1e-3))
        BatchNorm2d(3, eps=0.001, momentum=0.1, affine=True, ...track_running_stats=True)
    """
    known = isinstance(norm, FrozenBatchNorm) or _has_constants(norm)
    if not known or (norm._modules and not ends_in_activation(norm)):
        path = f"{type(norm).__module__}.{type(norm).__qualname__}"
        raise ValueError(
            f"{path} holds something else than the four buffers of a frozen batch norm"
        )
    eps = norm.eps if isinstance(norm, FrozenBatchNorm) else _measured_eps(norm)
    mean = norm._buffers["running_mean"]
    assert isinstance(mean, Tensor)
    new = TORCH_NORMS[frozen_dims(norm)](len(mean), eps, device=mean.device, dtype=mean.dtype)
    for name in _AFFINE:
        value = norm._parameters.get(name)
        if value is None and (constant := norm._buffers.get(name)) is not None:
            value = nn.Parameter(constant)
        new._parameters[name] = value
    new.affine = new.weight is not None
    for name in _STATISTICS:
        new._buffers[name] = norm._buffers[name]
    new.training = norm.training
    move_hooks(norm, new)
    if ends_in_activation(norm):
        thaw_activation(norm, new)
    return new


def _has_constants(module: nn.Module) -> bool:
    """Check if a module has the four tensors of a batch norm as buffers, and no parameters."""
    found = [module._buffers.get(name) for name in (*_AFFINE, *_STATISTICS)]
    return (
        not any(value is not None for value in module._parameters.values())
        and all(value is not None and value.dim() == 1 for value in found)
        and len({value.shape for value in found if value is not None}) == 1
    )


@torch.no_grad()
def _measured_eps(norm: nn.Module) -> float:
    """Measure what a frozen norm's forward adds to the variance, wherever it is written."""
    constants = {n: t for n in (*_AFFINE, *_STATISTICS) if (t := norm._buffers[n]) is not None}
    if constants["weight"].is_meta:
        return float(getattr(norm, "eps", 1e-5))
    constants = {name: tensor.double().cpu() for name, tensor in constants.items()}
    channels = len(constants["weight"])
    x = torch.linspace(1, 2, 2 * channels, dtype=torch.float64)
    x = x.view(2, channels, *(1,) * frozen_dims(norm))
    plain = (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", _PROBED))
    try:
        ones = {name: torch.full_like(constants[name], value) for name, value in plain}
        scale = float(_run(norm, ones, x).flatten()[0])
        eps = max(float(f"{scale**-2 - _PROBED:.6g}"), _SMALLEST_EPS)
        same = torch.allclose(_run(norm, constants, x), _norm(x, eps, constants))
    except Exception as error:
        raise ValueError(f"its forward fails on {tuple(x.shape)}: {error}") from error
    if not same or "forward" in norm.__dict__:
        raise ValueError("its forward computes something else than its constants say")
    return eps


def _norm(x: Tensor, eps: float, constants: Mapping[str, Tensor]) -> Tensor:
    weight, bias, mean, var = (constants[name] for name in (*_AFFINE, *_STATISTICS))
    return F.batch_norm(x, mean, var, weight, bias, eps=eps)


def _run(norm: nn.Module, constants: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A norm's forward with other constants, past its hooks."""
    twin = copy.copy(norm)
    twin.__dict__ = {**norm.__dict__, "_buffers": {**norm._buffers, **constants}}
    twin.__dict__["_modules"] = {name: nn.Identity() for name in norm._modules}  # its activation
    y: Tensor = twin.forward(x)
    return y
