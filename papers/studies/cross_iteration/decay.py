"""Gradients of a layer's statistics over the layers before it (cross-iteration-bn, figure 6)."""

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anybatch.conversion.producers import find_feeders

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Decay:
    """Norms of the gradients of layers' statistics, relative to those for the layer's own weights.

    Attributes:
        mean: Of the means, by layers back from 0 on, averaged over the layers that have so many.
        square: Of the means of squares.
    """

    mean: list[float]
    square: list[float]


def gradient_decay(model: nn.Module, x: Tensor, *, back: int = 2, probes: int = 8) -> Decay:
    """Measure how fast the gradients of a layer's statistics fade over earlier layers.

    ``||d mu^l / d w^r||_F / ||d mu^l / d w^l||_F`` for r = l, l - 1, ..., and the same for nu, the
    mean of squares, averaged over the pairs l of a convolution and the norm that it feeds. Norms
    are estimated by Hutchinson's method: the mean, over random signs s of the channels, of the
    squared norm of the gradient of ``sum(s * mu)`` is the squared norm of the Jacobian.

    Args:
        model: A network, left as it was but for the running statistics of norms in training mode.
        x: A batch for it.
        back: Layers back, at most (default 2).
        probes: Random signs (default 8), from torch's generator.

    Returns:
        The ratios; the first is 1.

    Raises:
        ValueError: If the network has fewer than two pairs.

    Source: cross-iteration-bn, appendix C and figure 6.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        ...                     nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        >>> gradient_decay(net, torch.randn(2, 1, 8, 8), back=1).mean[0]
        1.0
    """
    modules = dict(model.named_modules())
    found = find_feeders(model, x)
    pairs = [modules[feeder.name] for feeder in found.values() if feeder.name is not None]
    if len(pairs) < 2:
        raise ValueError(f"model: {len(pairs)} of its norms are fed by a convolution, give two")
    outputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[module] = output

    handles = [module.register_forward_hook(note) for module in pairs]
    try:
        with torch.enable_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    norms: dict[tuple[str, int], list[float]] = {}
    for index, layer in enumerate(pairs):
        out = outputs[layer].transpose(0, 1).flatten(1)
        reach = range(min(back, index) + 1)
        weights = [pairs[index - k].weight for k in reach]
        for name, statistic in (("mean", out.mean(1)), ("square", out.square().mean(1))):
            squares = [0.0] * len(weights)
            for _ in range(probes):
                signs = torch.randint_like(statistic, 2) * 2 - 1
                slopes = torch.autograd.grad(
                    statistic @ signs, weights, retain_graph=True, allow_unused=True
                )
                for k, slope in enumerate(slopes):
                    squares[k] += 0.0 if slope is None else float(slope.square().sum())
            for k in reach:
                norms.setdefault((name, k), []).append((squares[k] / squares[0]) ** 0.5)
    ratios = [[fmean(norms[name, k]) for k in range(back + 1)] for name in ("mean", "square")]
    return Decay(*ratios)
