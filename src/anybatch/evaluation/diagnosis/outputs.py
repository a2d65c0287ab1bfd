"""Changes of a norm's output between training and evaluation, and between tiles of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from anybatch.core.arguments import first_input
from anybatch.core.norm_layer import NormLayer
from anybatch.core.tensor_subclasses import as_plain
from anybatch.evaluation.restore_model import kept_modes

_KEPT_VALUES = 2**16  # of an output


@dataclass(frozen=True)
class ExampleNorm:
    """Name, class and seam (see `LayerNoise`) of a norm with statistics of each example alone."""

    name: str
    kind: str
    seam: float | None


class OutputProbe:
    """Collects how a norm's output differs between modes, and between whole images and halves."""

    def __init__(self, name: str, norm: nn.Module) -> None:
        self.name, self.norm = name, norm
        self.trained: list[Tensor] | None = None  # outputs of a forward in training mode
        self.squares: dict[str, list[Tensor]] = {"disparity": [], "seam": []}

    def root_mean_square(self, name: str) -> float | None:
        """The ``"disparity"`` or ``"seam"``; None where none was measured."""
        found = self.squares[name]
        return math.sqrt(float(torch.stack(found).mean())) if found else None

    def of_examples(self) -> ExampleNorm:
        """The seam of a norm with statistics of each example alone."""
        return ExampleNorm(self.name, type(self.norm).__name__, self.root_mean_square("seam"))

    def note(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """The forward hook: note an output of training, or compare one of evaluation."""
        x, y = as_plain(first_input(args, kwargs)), as_plain(output)
        # An odd stride meets all channels.
        sample = y.detach().flatten()[:: y.numel() // _KEPT_VALUES | 1]
        if module.training and self.trained is not None:
            self.trained.append(sample)
            return
        if self.trained:
            self._add("disparity", self.trained.pop(0), sample)
        if x.dim() > 2 and x.shape[-1] > 1:
            apart = [module.forward(half) for half in x.chunk(2, -1)]
            self._add("seam", torch.cat(apart, -1), y)

    def _add(self, name: str, other: Tensor, y: Tensor) -> None:
        ratio = (other - y).float().square().mean() / y.float().var(correction=0)
        self.squares[name] += [ratio.cpu()] if torch.isfinite(ratio) else []


@torch.no_grad()
def compare_outputs(
    model: nn.Module, probes: Sequence[OutputProbe], forward: Callable[[], Any], trained: bool
) -> None:
    """Run a batch in evaluation mode, and if ``trained`` before that with the norms in training."""
    handles = [probe.norm.register_forward_hook(probe.note, with_kwargs=True) for probe in probes]
    before = [probe.norm.training for probe in probes]
    try:
        for probe in probes if trained else ():
            probe.trained = []
        with kept_modes(model):
            for training in (True, False)[not trained :]:
                model.eval()
                for probe, mode in zip(probes, before, strict=True):
                    probe.norm.training = training and mode
                forward()
    finally:
        for handle in handles:
            handle.remove()
        for probe in probes:
            probe.trained = None


def example_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Group and instance norms of torch, and layers whose channels share statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.GroupNorm, _InstanceNorm))
        or (isinstance(module, NormLayer) and module.num_statistics != module.num_features)
    }
