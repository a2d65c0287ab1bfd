"""Layers under the transforms of ``torch.func``, which must own the state that a call moves."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# Of a transform at work, or of one that a tensor outlived.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


class WithState(Protocol):
    """A layer, as `check_state` needs it."""

    method_state: dict[str, Tensor]
    running_mean: Any
    running_var: Any
    weight: Any
    bias: Any


def check_state(layer: WithState, x: Tensor) -> None:
    """Raise if a transform would see a layer move state that is not among its arguments.

    Args:
        layer: The layer, about to train on a batch.
        x: The batch.

    Raises:
        RuntimeError: With the names of the tensors.
    """
    running = (layer.running_mean, layer.running_var)
    used = [t for t in (x, layer.weight, layer.bias, *running) if t is not None]
    if not any(map(is_wrapped, used)):
        return
    kind = type(layer).__name__
    held = [name for name, tensor in layer.method_state.items() if not is_wrapped(tensor)]
    if held:
        raise RuntimeError(
            f"torch.func: {kind} moves {', '.join(held)} in training, which are no buffers, so "
            'that functional_call cannot pass them; convert to "bn", "ghost" or "bgn", or call it '
            "in anybatch.no_update() or in evaluation mode"
        )
    if any(row is not None and not is_wrapped(row) for row in running):
        raise RuntimeError(
            f"torch.func: {kind} moves its running statistics in training; pass the buffers as "
            "arguments of the transformed function (torch.func.functional_call, "
            "torch.func.stack_module_state), or call it in anybatch.no_update() or in evaluation "
            "mode"
        )
