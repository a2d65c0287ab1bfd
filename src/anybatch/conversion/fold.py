"""Merging norms into the layers before them, for inference."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from anybatch.conversion.frozen_norms import is_frozen_norm, thawed
from anybatch.conversion.module_swap import has_hooks, let_go, owners_of, paths, swap
from anybatch.conversion.norm_types import (
    channels_of,
    check_bare,
    has_plain_forward,
    is_batch_norm,
    listed,
    norm_kind,
    recomputed_parameter,
)
from anybatch.conversion.norm_with_activation import ends_in_activation
from anybatch.conversion.observe import observe, tensors_in, undone_on_failure
from anybatch.conversion.producers import Feeder, find_feeders
from anybatch.conversion.relu_fusion.fused_block import unfuse
from anybatch.core.norm_layer import NormLayer
from anybatch.core.notices import NoEffectWarning
from anybatch.layers.weight_centralization import decentralize, is_centralized

TOLERANCE = 1e-4


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Merge every norm into the convolution or linear layer before it, in place, for inference.

    With s = weight / sqrt(running_var + eps), the layer before gets weight s * w and bias
    s * (b - running_mean) + bias, and the norm becomes torch.nn.Identity. A norm is merged only if
    it alone uses the output of the layer before it, on every path that the forward's default
    arguments take, both are called once, and its inference is an affine map per channel. Other
    norms stay, and a warning names them. The dropout and activation of a norm that ends in an
    activation (timm's) stay. The output of a linear layer is taken to be (N, C); with
    `example_inputs` that and everything else is checked.

    Args:
        model: a network in eval mode.
        example_inputs: what the network takes (a tensor, a tuple of positional or a mapping of
            keyword arguments): the output before and after is compared, and networks that cannot
            be traced symbolically are followed on them.

    Returns:
        The model.

    Raises:
        ValueError: the model is in training mode, wrapped or compiled, or its output on
            `example_inputs` changed by more than 1e-4 of its largest value (more for half
            precision); it is then as it was.

    Warns:
        NoEffectWarning: norms that stayed, by name and with the reason.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> fold(model, torch.randn(1, 3, 8, 8))
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    check_bare(model)
    _check_eval(model)
    places = paths(model)
    feeders = find_feeders(model, example_inputs)
    by_name = {names[0]: module for module, names in places.items()}
    owners = owners_of(places)
    folds, stay = dict[nn.Module, nn.Module](), dict[str, str]()
    for norm, names in places.items():
        if not is_batch_norm(norm):
            continue
        reason = _obstacle(norm, feeders[names[0]], by_name, places, owners)
        if reason is None:
            folds[norm] = by_name[str(feeders[names[0]].name)]
        else:
            stay[names[0]] = reason
    before = None if example_inputs is None else _outputs(model, example_inputs)
    identities = {norm: _identity(norm) for norm in folds}
    with undone_on_failure(model, filter(is_centralized, folds.values())):
        for norm, layer in folds.items():
            _merge(norm, layer)
        folded = swap(model, identities)
        if before is not None:
            _check_same(before, _outputs(folded, example_inputs))
    let_go(folded, identities)
    unfuse(folded)
    _warn(len(folds), stay)
    return folded


def _check_eval(model: nn.Module) -> None:
    """Refuse training mode: what would be merged is not what the network computes there."""
    for name, module in model.named_modules():
        kind = norm_kind(module)
        uses_batch = kind is not None and kind.family == "batch"
        if module.training and (module is model or uses_batch):
            what = f"its layer {name!r}" if name else "the model"
            raise ValueError(
                f"{what} is in training mode, in which a norm uses the batch and cannot be "
                "merged: call model.eval() first"
            )


def _obstacle(
    norm: nn.Module,
    feeder: Feeder,
    by_name: Mapping[str, nn.Module],
    places: Mapping[nn.Module, tuple[str, ...]],
    owners: Mapping[int, list[nn.Module]],
) -> str | None:
    """The reason why a norm cannot be merged into its feeder, or None."""
    if (why := _norm_obstacle(norm)) is not None:
        return why
    if feeder.name is None:
        return feeder.reason
    if not feeder.sole:
        return f"the output of {feeder.name!r} is used elsewhere too"
    if feeder.may_feed:
        others = " and ".join(map(repr, feeder.may_feed))
        return f"{feeder.name!r} may feed {others} too, on a path that was not traced"
    layer = by_name[feeder.name]
    if has_hooks(norm) or has_hooks(layer):
        return f"hooks on it or on {feeder.name!r} would see other values: remove them first"
    if (why := recomputed_parameter(layer)) is not None:
        return f"{feeder.name!r}: {why}"
    if not (is_centralized(layer) or has_plain_forward(layer)):
        return f"{feeder.name!r} computes its weight or output in its own way"
    if not _same_channels(norm, layer):
        return f"its channels are not those of {feeder.name!r}"
    holders = {one for parameter in layer.parameters() for one in owners[id(parameter)]} - {layer}
    if holders:
        return f"{feeder.name!r} shares its weight with {min(places[one][0] for one in holders)!r}"
    return None


def _norm_obstacle(norm: nn.Module) -> str | None:
    """The reason why a norm's inference cannot be merged into anything, or None."""
    if is_frozen_norm(norm):
        try:
            thawed(norm)
        except ValueError as error:
            return str(error)
        return None
    if (why := recomputed_parameter(norm)) is not None:
        return why
    if isinstance(norm, NormLayer):
        return norm.inference_obstacle()
    kind = norm_kind(norm)
    if kind is not None and kind.refusal is not None:
        return f"{type(norm).__name__} is not torch's own 1d, 2d or 3d batch norm"
    if any(norm._buffers.get(name) is None for name in ("running_mean", "running_var")):
        return "track_running_stats=False: it normalizes by the batch at inference too"
    return None


def _same_channels(norm: nn.Module, layer: nn.Module) -> bool:
    """True if the channels a norm counts are those that the layer before it puts out."""
    channels, kind = channels_of(norm), norm_kind(norm)
    if isinstance(layer, nn.Linear):
        return kind is not None and kind.dims == 1 and layer.out_features == channels
    return isinstance(layer, _ConvNd) and layer.out_channels == channels


@torch.no_grad()
def _merge(norm: nn.Module, layer: nn.Module) -> None:
    """Write a norm's scale and shift into the layer before it, by arithmetic in float64."""
    norm = thawed(norm) if is_frozen_norm(norm) else norm
    assert isinstance(norm, _NormBase)
    if is_centralized(layer):
        decentralize(layer)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None and norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale) if bias is None else bias.double()
    shift = (shift - norm.running_mean) * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight
    if norm.bias is not None:
        shift = shift + norm.bias
    weight.data = (weight.double() * _per_output(scale, layer)).to(weight.dtype)
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    else:
        bias.data = shift.to(bias.dtype)


def _per_output(scale: Tensor, layer: nn.Module) -> Tensor:
    """A factor per output channel (C,), in the shape of the layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    ones = (1,) * (weight.dim() - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return scale.view(-1, 1, *ones)
    # A transposed convolution's weight is (C_in, C_out / groups, ...), groups along C_in.
    grouped = scale.view(layer.groups, 1, -1)
    rows = grouped.expand(-1, layer.in_channels // layer.groups, -1)
    return rows.reshape(layer.in_channels, -1, *ones)


def _identity(norm: nn.Module) -> nn.Module:
    """The module left in place of a merged norm: an identity, or the norm's activation."""
    if ends_in_activation(norm):
        return nn.Sequential(norm.drop, norm.act)  # type: ignore[arg-type]
    return nn.Identity().train(norm.training)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Copies of the floating-point tensors of a network's output in evaluation mode."""
    output = observe(model, example_inputs)
    return [t.detach().clone() for t in tensors_in(output) if t.is_floating_point()]


def _check_same(before: list[Tensor], after: list[Tensor]) -> None:
    """Raise where outputs differ by more than rounding explains."""
    coarsest = max((torch.finfo(tensor.dtype).eps for tensor in before), default=0.0)
    allowed = max(TOLERANCE, 8 * coarsest)
    error = max((_relative(old, new) for old, new in zip(before, after, strict=True)), default=0.0)
    if not error <= allowed:
        raise ValueError(
            f"folding changed the output on example_inputs by {error:.1e} of its largest value, "
            f"where {allowed:.0e} is allowed; the model is as it was. A linear layer whose output "
            "is (N, L, C), before a batch norm over L, does that."
        )


def _relative(old: Tensor, new: Tensor) -> float:
    """Largest difference over the largest value; nan counts as infinitely far off."""
    if old.numel() == 0:
        return 0.0
    largest = old.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float((old.double() - new.double()).abs().max() / largest)
    return error if error == error else float("inf")


def _warn(folded: int, stay: Mapping[str, str]) -> None:
    """Name the norms that were not merged."""
    if not folded and not stay:
        warnings.warn("fold: the model has no batch norm", NoEffectWarning, stacklevel=3)
    elif stay:
        message = f"fold left {len(stay)} of {len(stay) + folded} norms:\n{listed(stay.items())}"
        warnings.warn(message, NoEffectWarning, stacklevel=3)
