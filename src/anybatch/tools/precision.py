"""The precision that a run's network computes in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.core.nested import mapped
from anybatch.tools.run import Run

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(
    precision: str, device: str | torch.device, cache_enabled: bool = True
) -> AbstractContextManager[Any]:
    """Return a context in which a network computes in a precision on a device."""
    if precision == "float32":
        return nullcontext()
    kind = torch.device(device).type
    return torch.autocast(kind, _AUTOCAST[precision], cache_enabled=cache_enabled)


def forward(run: Run, model: nn.Module, x: Tensor) -> Any:
    """Return the network's output in float32, computed in the run's precision."""
    with autocast(run.precision, run.device):
        y = model(x)
    return mapped(_single, y)


def _single(y: Tensor) -> Tensor:
    return y.float() if y.is_floating_point() else y
