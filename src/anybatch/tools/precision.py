"""The precision that a run's network computes in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from anybatch.tools.run import Run

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def precision(run: Run) -> AbstractContextManager[None]:
    """Return a context in which a network computes in the run's precision."""
    if run.precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, _AUTOCAST[run.precision])


def forward(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    """Return the network's output as float32, computed in the run's precision."""
    with precision(run):
        y: Tensor = model(x)
    return y.float()
