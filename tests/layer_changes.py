"""Changes that people make to a layer between two batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import anybatch
from anybatch.backends import use_fused
from anybatch.core.norm_layer import NormLayer


def _set(name: str, value: Any) -> Callable[[NormLayer], None]:
    return lambda layer: setattr(layer, name, value)


def _halve(layer: NormLayer) -> None:
    for p in layer.parameters():
        p.data = p.data.double()[:].float() * 0.5


def _strided(layer: NormLayer) -> None:
    layer.weight.data = torch.stack([layer.weight.data] * 2, 1)[:, 0]


def _without_scale(layer: NormLayer) -> None:
    del layer.weight
    layer.register_parameter("weight", None)


def _other(layer: NormLayer) -> None:
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})


CHANGES: dict[str, Callable[[NormLayer], Any]] = {
    "momentum": _set("momentum", 0.7),
    "mean of all": _set("momentum", None),
    "momentum warms up": _set("momentum_warmup", 3),
    "eps": _set("eps", 0.5),
    "small batches": _set("norm_batch_size", 2),
    "mask": _set("mask", torch.tensor([True, True, False, True])),
    "evaluation": lambda layer: layer.eval(),
    "frozen": lambda layer: anybatch.freeze(layer),
    "accumulated": lambda layer: layer.accumulate(2),
    "another scale": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((6,), 3.0))),
    "another scale's data": _halve,
    "a scale with gaps": _strided,
    "no scale": _without_scale,
    "reset": lambda layer: layer.reset_running_stats(),
    "another checkpoint": _other,
    "double": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "epoch": lambda layer: layer.set_progress(3, 3),
    "torch's operators": lambda layer: use_fused("never"),
}
