"""Training with a scaled loss (``torch.amp.GradScaler``)."""

from typing import Any

from torch import Tensor, nn

from anybatch.core.arguments import check_module, shown
from anybatch.core.gradient_accumulation import BACKWARD
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.control import end_steps


def update_scaler(scaler: Any, model: nn.Module, new_scale: float | Tensor | None = None) -> None:
    """Update a ``torch.amp.GradScaler``, and rescale what layers have averaged of gradients.

    `MovingAverageBatchNorm` and `CrossIterationBatchNorm` average ``mean(g * z)`` of recent steps,
    which has the unit of the loss: scaled by s it is s times as large. Here it is multiplied by
    what s is multiplied by, so that gradients do not depend on s. Call it in place of
    ``scaler.update()``. It also ends the step of layers that `accumulate`: when the scaler skips a
    step, the optimizer's hooks are not called.

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
    before = scaler.get_scale()
    scaler.update(new_scale)
    end_steps(model)
    rescale(model, scaler.get_scale() / before)


def rescale(model: nn.Module, factor: float) -> None:
    """Multiply what a network's layers have averaged of gradients by a factor.

    Args:
        model: The network.
        factor: New scale of the loss by the one before.

    Example:
        >>> from anybatch import MovingAverageBatchNorm1d
        >>> net = nn.Sequential(MovingAverageBatchNorm1d(3))
        >>> of_steps = net[0].method_state["backward_average"].fill_(1.0)
        >>> rescale(net, 0.5)
        >>> of_steps[0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    if factor == 1:
        return
    for layer in model.modules():
        if isinstance(layer, NormLayer):
            for one in (layer, *layer.further_memories):
                for name, tensor in one.method_state.items():
                    if name.startswith(BACKWARD) and tensor.is_floating_point():
                        tensor.mul_(factor)
