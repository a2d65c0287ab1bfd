"""One norm's replacement: built for a method, with the norm's parameters, flags and hooks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from anybatch.backends import LOW_PRECISION
from anybatch.conversion.frozen_norms import TORCH_NORMS, is_frozen_norm, thawed
from anybatch.conversion.module_swap import move_hooks
from anybatch.conversion.norm_types import channels_of, dims_of
from anybatch.core.arguments import check_count
from anybatch.core.module_state import make_constant
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.frozen_batch_norm import FrozenBatchNorm
from anybatch.layers.group_norm import fitting_groups
from anybatch.registry import Method

_TORCH_MOMENTUM = 0.1
_KEPT = ("norm_batch_size", "memories", "example_weight", "process_group", "outlier_limit")


def replacement(norm: nn.Module, method: Method, options: Mapping[str, Any]) -> nn.Module:
    """Build a norm's replacement and let it take over the norm.

    It is in the norm's mode, with its Parameters and hooks. The option `num_groups` is an upper
    bound, cut to a divisor of the channels.

    Raises:
        ValueError: the method cannot take this norm over.

    Example:
        >>> from anybatch.registry import get_method
        >>> norm = nn.BatchNorm2d(12)
        >>> new = replacement(norm, get_method("gn"), {"num_groups": 8})
        >>> new.num_groups, new.weight is norm.weight
        (6, True)
    """
    is_frozen = is_frozen_norm(norm)
    norm = thawed(norm) if is_frozen else norm
    assert isinstance(norm, _NormBase)
    dims = dims_of(norm)
    assert dims is not None
    built = method.build(
        norm.num_features,
        dims,
        eps=norm.eps,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats or norm.running_var is not None,
        **_place(norm),
        **arguments(norm, method, options),
    )
    if isinstance(built, NormLayer):
        built.adopt_(norm)
    else:
        built._parameters["weight"], built._parameters["bias"] = norm.weight, norm.bias
        built.training = norm.training
        move_hooks(norm, built)
        if isinstance(built, FrozenBatchNorm):
            _freeze(built, norm)
    if is_frozen:
        built.requires_grad_()
    _keep_tags(norm, built)
    return built


def trial(norm: nn.Module, method: Method, options: Mapping[str, Any]) -> bool:
    """Replace a copy of a norm, to see whether it can be done and whether it changes parameters.

    True if taking over rewrites the norm's weight or bias.

    Raises:
        ValueError: the method cannot take this norm over.

    Example:
        >>> from anybatch.registry import get_method
        >>> trial(nn.BatchNorm2d(4), get_method("mabn"), {})
        False
    """
    new = replacement(_twin(norm), method, options)
    pairs = [(norm._parameters.get(name), value) for name, value in new.named_parameters()]
    return any(o is not None and not o.is_meta and not torch.equal(o, n) for o, n in pairs)


def arguments(norm: nn.Module, method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a method's layer for one norm: given, kept, and chosen by `convert`.

    Example:
        >>> from anybatch.registry import get_method
        >>> arguments(nn.BatchNorm2d(4), get_method("brn"), {"max_r": 2.0})
        {'momentum_warmup': 10, 'max_r': 2.0}
    """
    chosen = dict(options)
    if "num_groups" in method.options:
        at_most = chosen.get("num_groups", method.options["num_groups"].default)
        check_count("num_groups", at_most)
        chosen["num_groups"] = fitting_groups(channels_of(norm), at_most)
    if "momentum" not in chosen and _keeps_momentum(norm, method):
        chosen["momentum"] = norm.momentum
    if isinstance(norm, NormLayer):
        kept: tuple[str, ...] = _KEPT if norm.num_statistics == norm.num_features else ()
        if norm.momentum_warmup:
            kept += ("momentum_warmup",)
        for name in kept:
            if name in method.options:
                chosen.setdefault(name, getattr(norm, name))
        if "process_group" not in options and chosen.get("norm_batch_size") is not None:
            chosen.pop("process_group", None)  # of batches that are cut now
    return {**method.at_start, **method.of_cuts(chosen), **chosen}


def _keeps_momentum(norm: nn.Module, method: Method) -> bool:
    """True if a norm's momentum means the same to the method.

    It does where both keep torch's running average. The values 0, statistics that stay, and None,
    the average over all batches, mean the same to every method that keeps running statistics.
    """
    if "momentum" not in method.accepted:
        return False
    if not norm.momentum:
        return True
    return _momentum_is_torchs(type(norm)) and _momentum_is_torchs(method.layer(2))


def _momentum_is_torchs(cls: type) -> bool:
    if issubclass(cls, nn.modules.batchnorm._BatchNorm):
        return True
    argument = signature(cls).parameters.get("momentum")
    return argument is not None and argument.default == _TORCH_MOMENTUM


def _place(norm: nn.Module) -> dict[str, Any]:
    """Device and type of a norm's tensors."""
    for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False)):
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {"device": None, "dtype": None}


def _freeze(new: FrozenBatchNorm, norm: _NormBase) -> None:
    """Let a frozen norm take over a batch norm's statistics, scale and shift as constants."""
    why = norm.inference_obstacle() if isinstance(norm, NormLayer) else None
    if norm.running_mean is None or norm.running_var is None or why is not None:
        why = why or "track_running_stats=False: it has no running statistics"
        raise ValueError(f"{why}, so that no constants give its output in evaluation")
    new.affine = norm.affine
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        new._buffers[name] = norm._buffers[name]
    make_constant(new)


def _keep_tags(norm: nn.Module, new: nn.Module) -> None:
    """Copy attributes that others hung on a torch norm, as libraries do to mark modules."""
    known = nn.BatchNorm1d(1).__dict__
    tags = norm.tags if isinstance(norm, NormLayer) else tuple(norm.__dict__.keys() - known)
    new.__dict__.update((name, norm.__dict__[name]) for name in tags if name in norm.__dict__)
    if isinstance(new, NormLayer) and tags:
        new.tags = tags


def _twin(norm: nn.Module) -> nn.Module:
    """A norm with copies of the tensors and without hooks; the attributes are the same."""
    twin = copy.copy(norm)
    twin.__dict__ = dict(norm.__dict__)
    move_hooks(nn.Identity(), twin)
    twin._parameters = {
        name: None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
        for name, value in norm._parameters.items()
    }
    twin._buffers = {
        name: None if value is None else value.clone() for name, value in norm._buffers.items()
    }
    return twin


def _in_one_type(norm: nn.Module, dtype: torch.dtype) -> None:
    """Bring a torch norm to one type: that of its scale, float32 where statistics exceed it."""
    statistics = {name: norm._buffers[name] for name in ("running_mean", "running_var")}
    low = {name: None if t is None else t.to(dtype) for name, t in statistics.items()}
    if all(t is None or bool(t.isfinite().all()) for t in low.values()):
        norm._buffers.update(low)
        return
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            trains = parameter.requires_grad
            norm._parameters[name] = nn.Parameter(parameter.detach().float(), trains)


def torch_norm(layer: NormLayer | FrozenBatchNorm) -> nn.Module:
    """The plain torch batch norm of an anybatch layer, with its Parameters, buffers and hooks.

    It is in evaluation mode where the layer is frozen.

    Example:
        >>> import anybatch
        >>> torch_norm(anybatch.BatchNorm2d(4, momentum=0.3))
        BatchNorm2d(4, eps=1e-05, momentum=0.3, affine=True, ...track_running_stats=True)
    """
    norm = TORCH_NORMS[layer.dims](
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        **_place(layer),
    )
    norm._parameters["weight"], norm._parameters["bias"] = layer.weight, layer.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm._buffers[name] = layer._buffers[name]
    if layer.weight is not None and layer.weight.dtype in LOW_PRECISION:
        _in_one_type(norm, layer.weight.dtype)
    frozen = isinstance(layer, FrozenBatchNorm) or layer.frozen
    norm.training = layer.training and not frozen
    move_hooks(layer, norm)
    if isinstance(layer, NormLayer):
        _keep_tags(layer, norm)
    return norm
