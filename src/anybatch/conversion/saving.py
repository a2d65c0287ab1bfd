"""Converted networks that save themselves: ``save_pretrained`` of transformers and the like."""

from __future__ import annotations

import warnings
from functools import partial
from inspect import signature
from typing import Any

from torch import nn

from anybatch.conversion.restore import for_plain_code, plain_state_dict
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.frozen_batch_norm import FrozenBatchNorm
from anybatch.layers.weight_centralization import is_centralized
from anybatch.registry import METHODS, Method

RECORD = "anybatch"  # the entry of the configuration that tells the methods


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of a converted network: it writes what plain code loads.

    The weights of centralized layers are written centred, so that ``from_pretrained`` without
    anybatch gives the same output. The state of the method, and the weights as they were, are
    beside them under keys that plain code passes over, and the configuration names the methods.
    """
    save = type(model).save_pretrained
    bound = signature(save).bind(model, *args, **kwargs)
    try:
        plain_state_dict(model)
    except ValueError as error:
        warnings.warn(
            "save_pretrained: plain code that loads this network gives other outputs; load it "
            "with anybatch.integrations.transformers.from_pretrained. No plain layer is:\n"
            + str(error).partition("\n")[2],
            stacklevel=2,
        )
    state = bound.arguments.get("state_dict")
    state = model.state_dict() if state is None else state
    bound.arguments["state_dict"] = for_plain_code(model, state, complete=True)
    setattr(model.config, RECORD, record_methods(model))
    try:
        return save(*bound.args, **bound.kwargs)
    finally:
        delattr(model.config, RECORD)


def save_for_plain_code(model: nn.Module) -> None:
    """Let a network that has a ``save_pretrained`` write what plain code loads.

    Example:
        >>> save_for_plain_code(nn.Linear(2, 2))  # has none
    """
    save = getattr(type(model), "save_pretrained", None)
    if save is not None and hasattr(model, "config") and "state_dict" in signature(save).parameters:
        model.__dict__["save_pretrained"] = partial(_save_pretrained, model)


def record_methods(model: nn.Module) -> dict[str, Any]:
    """The methods of a network's layers and their options, as plain data.

    Example:
        >>> import anybatch
        >>> record_methods(nn.Sequential(anybatch.GhostBatchNorm1d(4, ghost_size=2)))["layers"]
        [{'method': 'ghost', 'options': {'ghost_size': 2, ...}, 'names': ['0']}]
    """
    groups: list[dict[str, Any]] = []
    for name, layer in model.named_modules():
        known = _method_and_options(layer)
        if known is None:
            continue
        group = next((g for g in groups if {**g, "names": 0} == {**known, "names": 0}), None)
        if group is None:
            groups.append(group := {**known, "names": []})
        group["names"].append(name)
    centralized = [name for name, module in model.named_modules() if is_centralized(module)]
    return {"layers": groups, "centralized": centralized}


def _method_and_options(layer: nn.Module) -> dict[str, Any] | None:
    if isinstance(layer, FrozenBatchNorm):
        return {"method": "frozen", "options": {}}
    if isinstance(layer, nn.GroupNorm):  # of the network's own, or in place of a batch norm
        return {"method": "gn", "options": {"num_groups": layer.num_groups}}
    if not isinstance(layer, NormLayer) or (method := _method_of(layer)) is None:
        return None
    own = {n: getattr(layer, n) for n in method.accepted if hasattr(layer, n) and n != "seed"}
    options = {n: v for n, v in own.items() if v is None or type(v) in (int, float, str, bool)}
    return {"method": method.name, "options": options}


def _method_of(layer: NormLayer) -> Method | None:
    """The method of a layer; the first of those that its class and arguments stand for."""
    for method in METHODS.values():
        if type(layer) is method.layer(layer.dims) and all(
            getattr(layer, name, value) == value for name, value in method.fixed.items()
        ):
            return method
    return None
