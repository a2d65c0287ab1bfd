"""Training with a scaled loss (``torch.amp.GradScaler``)."""

import math
from typing import Any

from torch import Tensor, nn

from anybatch.core.arguments import check_module, shown
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.control import end_steps


def update_scaler(scaler: Any, model: nn.Module, new_scale: float | Tensor | None = None) -> None:
    """Update a ``torch.amp.GradScaler``, and rescale what layers have averaged of gradients.

    `MovingAverageBatchNorm` and `CrossIterationBatchNorm` average ``mean(g * z)`` of recent steps,
    which has the unit of the loss: scaled by s it is s times as large. Here it is multiplied by
    what s is multiplied by, so that gradients do not depend on s. Call it in place of
    ``scaler.update()``. It also ends the step of layers that `accumulate`: when the scaler skips a
    step, the optimizer's hooks are not called. Where a trained network gets a scaler, call
    `set_loss_scale` first.

    Args:
        scaler: The scaler, after ``scaler.step(optimizer)``.
        model: The network; it may have no layer of this library.
        new_scale: What ``scaler.update`` takes (default None: the scale that the scaler finds).

    Raises:
        TypeError: If ``scaler`` cannot be updated, or ``model`` is no network.

    Example:
        >>> import torch, anybatch
        >>> net = torch.nn.Sequential(anybatch.MovingAverageBatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        >>> scaler.scale(net(torch.randn(4, 3)).sum()).backward()
        >>> scaler.step(optimizer)
        >>> update_scaler(scaler, net)
    """
    if not (hasattr(scaler, "update") and hasattr(scaler, "get_scale")):
        raise TypeError(f"scaler={shown(scaler)}: give a torch.amp.GradScaler")
    check_module("model", model)
    before = scaler.get_scale()  # on a GPU it waits for the device
    for layer in _layers(model):
        if layer.loss_scale != before:
            layer.loss_scale = before
    scaler.update(new_scale)
    end_steps(model)
    set_loss_scale(model, scaler.get_scale())


def set_loss_scale(model: nn.Module, scale: float) -> None:
    """Bring what layers have averaged of gradients to a scale of the loss, before training goes on.

    Checkpoints hold these averages as of a loss that is not scaled. After loading one, or where a
    trained network gets a scaler or goes on without, call this before the first step;
    `update_scaler` follows the scale from there. A fresh network needs no call.

    Args:
        model: The network; it may have no layer of this library.
        scale: ``scaler.get_scale()``; 1.0 for a loss that is not scaled.

    Raises:
        ValueError: If ``scale`` is no finite number above 0.
        TypeError: If ``model`` is no network.

    Example:
        >>> import torch, anybatch
        >>> net = torch.nn.Sequential(anybatch.MovingAverageBatchNorm1d(3))
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        >>> set_loss_scale(net, scaler.get_scale())
    """
    check_module("model", model)
    known = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not (known and 0 < scale < math.inf):
        raise ValueError(f"scale={shown(scale)}: give scaler.get_scale(), or 1.0 without a scaler")
    for layer in _layers(model):
        if layer.loss_scale != scale:
            layer.rescale(scale / layer.loss_scale)
            layer.loss_scale = float(scale)


def _layers(model: nn.Module) -> list[NormLayer]:
    found = [module for module in model.modules() if isinstance(module, NormLayer)]
    return [one for layer in found for one in (layer, *layer.further_memories)]
