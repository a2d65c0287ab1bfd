"""Back to plain torch: batch norms and weights that need no anybatch any more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anybatch.conversion.module_swap import let_go, owners_of, paths, swap
from anybatch.conversion.norm_types import check_bare, listed, recomputed_parameter
from anybatch.conversion.norm_with_activation import ends_in_activation, give_back_activation
from anybatch.conversion.relu_fusion.fused_block import unfuse
from anybatch.conversion.replacement import torch_norm
from anybatch.core.arguments import check_module
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from anybatch.layers.frozen_batch_norm import FrozenBatchNorm
from anybatch.layers.norm_copies import NormCopies
from anybatch.layers.weight_centralization import (
    CENTRALIZED,
    CENTRED,
    UNCENTRED,
    centralized_weight,
    decentralize,
)

_TORCHS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def to_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every anybatch layer into the plain torch batch norm with the same eval output.

    Parameters and buffers stay the same objects, with their flags and hooks; centralized layers
    become plain ones with centred weights. Afterwards the model holds nothing of anybatch and
    its checkpoint is a plain batch-norm one. Training continues as with plain batch norm: the state
    of the method is dropped, frozen layers are left in evaluation mode.

    Args:
        model: a network with anybatch layers, changed in place.

    Returns:
        The model; a torch batch norm where the model is itself a layer.

    Raises:
        ValueError: layers whose inference is no per-channel affine map (all are named, nothing is
            changed), or a wrapped or compiled model.

    Example:
        >>> import anybatch
        >>> model = anybatch.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "brn")
        >>> to_batchnorm(model)[1]
        BatchNorm1d(4, eps=1e-05, momentum=0.01, affine=True, ...track_running_stats=True)
    """
    check_bare(model)
    layers, centralized = _check_plain(model)
    replacements: dict[nn.Module, nn.Module] = {layer: torch_norm(layer) for layer in layers}
    for module in centralized:
        decentralize(module)
    for layer, norm in replacements.items():
        if ends_in_activation(layer):
            give_back_activation(layer, norm)
    let_go(model, layers)
    unfuse(model)
    model.__dict__.pop("save_pretrained", None)  # of `anybatch.conversion.saving`
    return swap(model, replacements)


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of a converted network for plain torch, where there is no anybatch.

    It is that of `to_batchnorm`, and leaves the model alone: torch's keys, centred weights, no
    state of a method. The network as it was before `convert` loads it strictly, and gives the same
    output in evaluation.

    Args:
        model: A network with anybatch layers.

    Returns:
        The tensors by key; all but centred weights share the model's memory.

    Raises:
        ValueError: For layers whose inference is no affine map per channel; all are named.

    Example:
        >>> import anybatch
        >>> model = anybatch.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "brn")
        >>> plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> plain.load_state_dict(plain_state_dict(model))
        <All keys matched successfully>
    """
    check_module("model", model)
    _check_plain(model)
    return for_plain_code(model, model.state_dict())


@torch.no_grad()
def for_plain_code(
    model: nn.Module, state: Mapping[str, Tensor], complete: bool = False
) -> dict[str, Tensor]:
    """A ``state_dict`` of a converted network with the weights that plain code needs.

    If `complete`, the state of methods, and weights before they were centred, stay beside them, so
    that the network itself loads all.
    """
    plain = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, NormLayer) and not complete:
            parts = (*_TORCHS, *(f"{child}." for child, _ in module.named_children()))
            known = tuple(prefix + part for part in parts)
            for key in state:
                if key.startswith(prefix) and not key.startswith(known):
                    del plain[key]
        weight = state.get(f"{prefix}weight")
        if isinstance(module, CENTRALIZED) and weight is not None:
            plain.pop(prefix + CENTRED, None)  # the weight before it was centred says so as well
            plain[f"{prefix}weight"] = centralized_weight(module, weight).detach()
            if complete:
                plain[prefix + UNCENTRED] = weight
    return plain


def _check_plain(model: nn.Module) -> tuple[list[NormLayer | FrozenBatchNorm], list[nn.Module]]:
    """Layers and centralized modules of a network; ValueError if plain ones cannot be the same."""
    places = paths(model)
    layers = [module for module in places if isinstance(module, (NormLayer, FrozenBatchNorm))]
    centralized = [module for module in places if isinstance(module, CENTRALIZED)]
    ours = (*layers, *centralized, *(m for m in places if isinstance(m, NormCopies)))
    owners = owners_of(places)
    obstacles = [(places[module][0], why) for module in ours if (why := _obstacle(module))]
    obstacles += [
        (
            places[one][0],
            f"its weight is centralized, and not in {places[other][0]!r}, which has it too",
        )
        for one in centralized
        for other in owners.get(id(one._parameters.get("weight")), ())
        if other not in centralized
    ]
    if obstacles:
        raise ValueError(
            f"nothing was changed, as no plain layer is the same as\n{listed(obstacles)}"
        )
    return layers, centralized


def _obstacle(layer: nn.Module) -> str | None:
    """The reason why no plain layer computes the same in evaluation, or None."""
    if isinstance(layer, NormCopies):
        return "several copies of a norm: choose one with anybatch.keep_copy(model, number)"
    if (why := recomputed_parameter(layer)) is not None:
        return why
    if isinstance(layer, CENTRALIZED) and type(layer) not in CENTRALIZED:
        return f"another tool has made {type(layer).__name__} of a layer with centred weights"
    if not isinstance(layer, NormLayer):
        return None
    plain = isinstance(layer, (BatchNorm1d, BatchNorm2d, BatchNorm3d))
    if plain and not layer.track_running_stats and not layer.example_weight:
        return None
    return layer.inference_obstacle()
