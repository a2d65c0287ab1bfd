"""Errors of sampled statistics, and how they go together in the layers of a network.

Source: bn-sampling, figures 6 and 7. Samples are those of the library's layers, from the same
draws.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybatch import backends
from anybatch.conversion import convert
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.core.arguments import check_choice
from anybatch.layers import (
    SampledBatchNorm1d,
    SampledBatchNorm2d,
    SampledBatchNorm3d,
    VirtualDataset,
)
from anybatch.layers.sample_positions import Part, nearest, part_moments, place, virtual
from anybatch.registry import get_method
from anybatch.tools.timing import Quartiles, quartiles

METHODS = {"naive": "ns", "batch": "bs", "feature": "fs", "points": "points", "virtual": "vdn"}
STATISTICS = ("mean", "var")
_SAMPLED = (SampledBatchNorm1d, SampledBatchNorm2d, SampledBatchNorm3d)
_Sampled = SampledBatchNorm1d | SampledBatchNorm2d | SampledBatchNorm3d


@dataclass(frozen=True)
class SampleErrors:
    """Errors of a sample's statistics against the batch's, in every layer of a network.

    Attributes:
        sample: As in `METHODS`.
        layers: Names of the norms, in the order in which they run.
        values: Values per channel in the sample of each.
        mean: ``||mu_S - mu|| / ||sigma||`` over the channels, ``(draws, layers)``.
        var: ``||var_S - var|| / ||var||``, the same.
    """

    sample: str
    layers: tuple[str, ...]
    values: tuple[int, ...]
    mean: Tensor
    var: Tensor

    def spread(self, statistic: str) -> list[Quartiles]:
        """Median and quartiles over the draws, a layer each."""
        return [quartiles(column.tolist()) for column in getattr(self, statistic).t()]

    def typical(self, statistic: str) -> float:
        """Root mean square over draws and layers."""
        errors: Tensor = getattr(self, statistic)
        return float(errors.square().mean().sqrt())

    def correlation(self, statistic: str) -> Tensor:
        """Correlation over the draws of the errors in each two layers, ``(layers, layers)``.

        A layer without error, or always with the same, has none: its row is not a number.
        """
        errors: Tensor = getattr(self, statistic)
        return torch.corrcoef(errors.t()).view(len(self.layers), len(self.layers))

    def between(self, statistic: str) -> float:
        """Mean correlation of two different layers."""
        apart = ~torch.eye(len(self.layers), dtype=torch.bool)
        return float(self.correlation(statistic)[apart].mean())


@torch.no_grad()
def estimation_errors(
    model: nn.Module,
    inputs: Iterable[Tensor],
    sample: str,
    *,
    ratio: float = 1 / 32,
    moments: tuple[Any, Any] = (0.0, 1.0),
    normalize_by: str = "sample",
    seed: int = 0,
) -> SampleErrors:
    """Errors of sampled statistics in every norm of a network, over many batches and draws.

    A copy of the network runs in training mode with its weights as they are; each batch has its
    own draw of the samples' places. The truth is the layer's statistics of the whole batch, without
    virtual examples.

    Args:
        model: A network with batch norms, left as it was.
        inputs: Batches, all of the same shape; one draw each.
        sample: One of `METHODS`.
        ratio: Part of the values; for "virtual" the virtual examples by the batch's, 1 at least.
        moments: Mean and standard deviation of the data, for "virtual".
        normalize_by: "sample" where the norms are converted, as in training with the method, so
            that errors reach the layers above; "batch" where the network keeps batch normalization
            and samples are only looked at, which "virtual" has no meaning in.
        seed: Of the samples.

    Returns:
        The errors.

    Raises:
        ValueError: For another sample or way to normalize, a network without batch norms, or fewer
            than two batches.

    Source: bn-sampling, section 5.1, figures 6 and 7.

    Example:
        >>> errors = estimation_errors(nn.Sequential(nn.BatchNorm2d(2)),
        ...                            torch.randn(3, 8, 2, 4, 4), "batch", ratio=1.0)
        >>> errors.typical("mean"), errors.values
        (0.0, (128,))
    """
    check_choice("sample", sample, tuple(METHODS))
    check_choice("normalize_by", normalize_by, ("sample", "batch"))
    if sample == "virtual" and normalize_by == "batch":
        raise ValueError("normalize_by='batch': give 'sample' with sample='virtual'")
    some = list(inputs)
    if len(some) < 2:
        raise ValueError(f"inputs: {len(some)} batches, give two or more")
    if not any(is_batch_norm(module) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no batch norm: give one that has")
    known = get_method(METHODS[sample]).options
    given: dict[str, Any] = {"ratio": ratio, "seed": seed}
    options = {name: value for name, value in given.items() if name in known}
    converted = convert(nn.Sequential(copy.deepcopy(model)), METHODS[sample], **options).train()
    layers = {n: m for n, m in converted.named_modules() if isinstance(m, _SAMPLED)}
    network: nn.Module = converted
    virtual_rows = 0
    if sample == "virtual":
        virtual_rows = nearest(ratio * len(some[0]), 1, len(some[0]))
        network = VirtualDataset(converted, *moments, virtual_rows, seed=seed).train()
    elif normalize_by == "batch":
        network = nn.Sequential(copy.deepcopy(model)).train()
    watched = network.model if isinstance(network, VirtualDataset) else network
    found: dict[str, tuple[int, float, float]] = {}

    def watch(name: str, layer: _Sampled) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = _errors(args[0], sampled_part(layer, args[0], virtual_rows), virtual_rows)

        return look

    for name, layer in layers.items():
        watched.get_submodule(name).register_forward_pre_hook(watch(name, layer))
    rows = []
    for x in some:
        for layer in layers.values():
            layer.redraw()
        network(x)
        rows.append(list(found.values()))
    table = torch.tensor(rows, dtype=torch.float64)
    names = tuple(name.removeprefix("0.") for name in found)
    values = tuple(int(value) for value in table[0, :, 0])
    return SampleErrors(sample, names, values, table[..., 1], table[..., 2])


def sampled_part(layer: _Sampled, x: Tensor, virtual_rows: int) -> Part:
    """The sample that a layer takes of an activation."""
    spatial = tuple(x.shape[2:])
    if layer.sample == "virtual":
        return virtual(virtual_rows, spatial)
    numbers = tuple(layer.method_state["index"].tolist())
    return place(layer.sample, (len(x), *spatial), 0, numbers, layer.ratio, None, x.device)


def _errors(x: Tensor, part: Part, virtual_rows: int) -> tuple[int, float, float]:
    """Values in a sample, and the errors of its mean and variance."""
    real = x[virtual_rows:]
    mean, var = backends.moments(real, (len(real),))
    ((own_mean, own_var),) = part_moments(x, (part,))
    mean_error = (own_mean - mean).norm() / var.sum().sqrt()
    return part.values, float(mean_error), float((own_var - var).norm() / var.norm())
