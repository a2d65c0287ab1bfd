"""What a convolution's weights meet: the input values under each of its taps.

A convolution or linear layer computes ``x[n, o, p] = sum_k w[o, k] * patch[n, p, k] + b[o]``. Here
are the two gradients of the statistics of ``x`` with respect to ``w`` (cross-iteration-bn,
appendix B), taken without a graph::

    d mean[o] / d w[o, k] = mean over n, p of patch[n, p, k]          one row a channel group
    d var[o]  / d w[o, k] = 2 * mean of (x[n, o, p] - mean[o]) * patch[n, p, k]

The first is a pass over the input and two small products, whatever the layer: along each
dimension, a tap meets each input position a known number of times. The second is one convolution
weight gradient with ``x`` in the place of the output's gradient, or the same over a few positions.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from anybatch.backends.layout import rows
from anybatch.backends.tracing import is_traced

_OUTSIDE = -1
_CIRCLE = 2**31


class Geometry(NamedTuple):
    """How a layer's taps move over its input; `kernel` is empty for a linear layer.

    Attributes:
        kernel: Taps along each dimension.
        stride: Of the output (of the input, where transposed).
        dilation: Distance of taps.
        before: Padding before each dimension.
        after: Padding after each dimension; for torch's own padding it is `before`.
        mode: Of the padding.
        groups: Channel groups.
        transposed: Whether it is a transposed convolution.
        inputs: Input channels.
        outputs: Output channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: str
    groups: int
    transposed: bool
    inputs: int
    outputs: int

    @property
    def fan_in(self) -> int:
        """Weights of one output channel."""
        taps = 1
        for size in self.kernel:
            taps *= size
        return self.inputs // self.groups * taps

    def rows(self, weight: Tensor) -> Tensor:
        """Weights, one row ``(fan_in)`` an output channel."""
        if not self.transposed:
            return weight.flatten(1)
        parts: Tensor = weight.unflatten(0, (self.groups, -1))
        return parts.transpose(1, 2).flatten(0, 1).flatten(1)  # (groups, out, in, ...) before


class ConvCall(NamedTuple):
    """What a convolution or linear layer did in this forward.

    Attributes:
        geometry: How its taps move.
        x: Its input.
        rows: The weights it used, one row per output channel.
        bias: Its bias, or None.
        output: What it put out.
    """

    geometry: Geometry
    x: Tensor
    rows: Tensor
    bias: Tensor | None
    output: Tensor

    def at(self, *examples: slice) -> "ConvCall":
        """The call for some examples of the batch."""
        geometry, x, weights, bias, output = self  # `_replace` is beyond torch 2.6's compilers
        return ConvCall(geometry, rows(x, examples), weights, bias, rows(output, examples))


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """The settings of a convolution that networks change after they have made it."""
    mode = module.padding_mode
    ends: Any = () if mode == "zeros" else module._reversed_padding_repeated_twice
    return module.stride, module.padding, module.dilation, mode, tuple(ends)


def geometry_of(module: nn.Module) -> Geometry:
    """Read the geometry off a convolution or linear layer.

    >>> geometry_of(nn.Conv2d(4, 6, 3, groups=2, padding="same")).before
    (1, 1)
    """
    if isinstance(module, nn.Linear):
        none: tuple[int, ...] = ()
        inputs, outputs = module.in_features, module.out_features
        return Geometry(none, none, none, none, none, "zeros", 1, False, inputs, outputs)
    assert isinstance(module, _ConvNd)
    transposed = isinstance(module, _ConvTransposeNd)
    dims = len(module.kernel_size)
    dilation = _each(module.dilation, dims)
    before, after = _padding(module, dilation)
    return Geometry(
        tuple(module.kernel_size),
        _each(module.stride, dims),
        dilation,
        before,
        after,
        module.padding_mode,
        module.groups,
        transposed,
        module.in_channels,
        module.out_channels,
    )


def _padding(module: _ConvNd, dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after each dimension, read where torch's forward reads it."""
    if module.padding_mode != "zeros":
        ends = module._reversed_padding_repeated_twice  # last dimension first: before, after
        return tuple(ends[::2][::-1]), tuple(ends[1::2][::-1])
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, module.kernel_size, strict=True)]
        return tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)
    padding = _each(0 if module.padding == "valid" else module.padding, len(dilation))
    return padding, padding


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A setting along each dimension; somebody may have set one number for all."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _taps(layer: Geometry, dim: int, outputs: int, inputs: int) -> Tensor:
    """The input position under each tap, ``(outputs, taps)``; `_OUTSIDE` for none."""
    out = torch.arange(outputs, device="cpu").unsqueeze(1)
    tap = torch.arange(layer.kernel[dim], device="cpu") * layer.dilation[dim]
    if layer.transposed:
        scaled = out + layer.before[dim] - tap
        index = scaled.div(layer.stride[dim], rounding_mode="floor")
        inside = (scaled % layer.stride[dim] == 0) & (index >= 0) & (index < inputs)
        return index.masked_fill(~inside, _OUTSIDE)
    index = out * layer.stride[dim] - layer.before[dim] + tap
    if layer.mode == "replicate":
        return index.clamp(0, inputs - 1)
    if layer.mode == "circular":
        return index % inputs
    if layer.mode == "reflect":
        period = max(2 * (inputs - 1), 1)
        index = index % period
        return torch.minimum(index, period - index)
    return index.masked_fill((index < 0) | (index >= inputs), _OUTSIDE)


def _meetings(layer: Geometry, dim: int, outputs: int, inputs: int) -> Tensor:
    """How often a tap meets an input position, a share of the outputs: ``(taps, inputs)``."""
    met = _taps(layer, dim, outputs, inputs).unsqueeze(-1) == torch.arange(inputs, device="cpu")
    return met.sum(0).double() / outputs


def _make(
    layer: Geometry, dim: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Taps and meetings along one dimension, on a device."""
    taps = _taps(layer, dim, outputs, inputs)
    return taps.to(device), _meetings(layer, dim, outputs, inputs).to(device, dtype)


@lru_cache(maxsize=1024)
def _kept(*key: Any) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _make(*key)


def tables(layer: Geometry, dim: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The input position under each tap, -1 for none, and how often each tap meets a position."""
    sizes = (y.shape[2 + dim], x.shape[2 + dim])
    make = _make if is_traced() else _kept
    return make(layer, dim, *sizes, x.device, x.dtype)


def mean_patch(layer: Geometry, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the mean: the mean patch of each channel group, ``(groups, fan_in)``.

    Args:
        layer: The convolution or linear layer.
        x: Its input.
        y: Its output.
    """
    total = x.mean(0)
    for dim in range(len(layer.kernel)):
        _, meetings = tables(layer, dim, x, y)
        total = torch.tensordot(total, meetings, ([1], [1]))  # a dimension becomes its taps, last
    return total.reshape(layer.groups, layer.fan_in)


def var_gradient(layer: Geometry, x: Tensor, y: Tensor, mean: Tensor, patch: Tensor) -> Tensor:
    """Gradient of the variance, ``(outputs, fan_in)``, from all positions.

    Args:
        layer: The convolution or linear layer.
        x: Its input.
        y: Its output.
        mean: Mean of the output, ``(outputs,)``.
        patch: `mean_patch`.
    """
    count = y.numel() // y.shape[1]
    product = raw_gradient(layer, x, y).mul_(2 / count)
    apart = mean.view(layer.groups, -1, 1) * patch.unsqueeze(1)
    return product.sub_(apart.reshape(product.shape), alpha=2)


def raw_gradient(layer: Geometry, x: Tensor, y: Tensor) -> Tensor:
    """``sum over n, p of y[n, o, p] * patch[n, p, k]``, ``(outputs, fan_in)``."""
    if not layer.kernel:
        return y.t() @ x
    dims, padding = len(layer.kernel), layer.before
    if layer.mode != "zeros" or layer.before != layer.after:
        ends = [e for pair in zip(layer.before[::-1], layer.after[::-1], strict=True) for e in pair]
        x = F.pad(x, ends, "constant" if layer.mode == "zeros" else layer.mode)
        padding = (0,) * dims
    taps = layer.kernel
    shape = (layer.inputs, layer.outputs // layer.groups, *taps)
    if not layer.transposed:
        shape = (layer.outputs, layer.inputs // layer.groups, *taps)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        y, x, y.new_empty(()).expand(shape), None, layer.stride, padding, layer.dilation,
        layer.transposed, _output_padding(layer, x, y), layer.groups, (False, True, False),
    )  # fmt: skip
    return layer.rows(gradient)


def _output_padding(layer: Geometry, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Rows that a transposed convolution's output has beyond the least."""
    if not layer.transposed:
        return (0,) * len(layer.kernel)
    least = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(
            x.shape[2:], layer.stride, layer.before, layer.dilation, layer.kernel, strict=True
        )
    ]
    return tuple(n - m for n, m in zip(y.shape[2:], least, strict=True))


def sampled_patches(layer: Geometry, x: Tensor, y: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Output and patches at a few positions.

    Args:
        layer: The convolution or linear layer.
        x: Its input.
        y: Its output.
        points: Where, in each of example and dimensions: ``(1 + dims, n)`` from 0 to 1.

    Returns:
        Outputs ``(n, outputs)`` and patches ``(n, groups, fan_in)``.
    """
    places = _places(y, points)
    n, dims = points.shape[1], len(layer.kernel)
    values = values_at(y, points)
    if not dims:
        return values, x[places[0]].unsqueeze(1)
    index: list[Tensor | slice] = [places[0].view(n, *(1,) * dims), slice(None)]
    inside: Tensor | None = None
    for dim, place in enumerate(places[1:]):
        taps, _ = tables(layer, dim, x, y)
        under = taps[place].view(n, *(1,) * dim, -1, *(1,) * (dims - dim - 1))
        index.append(under.clamp(min=0))
        met = under != _OUTSIDE
        inside = met if inside is None else inside & met
    assert inside is not None
    patches = x[tuple(index)] * inside.unsqueeze(-1)  # (n, taps, inputs)
    patches = patches.flatten(1, -2).transpose(1, 2)  # (n, inputs, taps)
    return values, patches.reshape(n, layer.groups, layer.fan_in)


def values_at(y: Tensor, points: Tensor) -> Tensor:
    """Values ``(n, channels)`` at the points of `sampled_patches`."""
    first, *others = _places(y, points)
    at: tuple[Tensor | slice, ...] = (first, slice(None), *others)
    return y[at]


def _places(y: Tensor, points: Tensor) -> list[Tensor]:
    sizes = (y.shape[0], *y.shape[2:])
    return [
        (row * size).long().clamp_(max=size - 1) for row, size in zip(points, sizes, strict=True)
    ]


def all_points(y: Tensor) -> Tensor:
    """Every position of an output, for `sampled_patches`."""
    sizes = (y.shape[0], *y.shape[2:])
    middles = [(torch.arange(size, device=y.device, dtype=y.dtype) + 0.5) / size for size in sizes]
    return torch.stack([grid.flatten() for grid in torch.meshgrid(*middles, indexing="ij")])


def covering_points(first: Tensor, count: int, dims: int) -> Tensor:
    """Some successive points of a sequence that fills the unit cube evenly.

    Roberts' additive sequence: point k is the fractional part of ``k * (1 / phi, 1 / phi^2, ...)``
    with ``phi^(dims + 1) = phi + 1``, here in whole numbers modulo 2^31. It needs no random state:
    a step's points follow from its number.

    Args:
        first: Number of the first point, on the device.
        count: Points.
        dims: Dimensions.

    Returns:
        ``(dims, count)``, each from 0 to 1.
    """
    paces = torch.tensor(PACES[dims], device=first.device)
    number = (first + torch.arange(count, device=first.device)).remainder(_CIRCLE)
    turned = (paces.unsqueeze(1) * number).remainder(_CIRCLE)
    return turned.to(torch.float32) / _CIRCLE


def _paces(dims: int) -> tuple[int, ...]:
    phi = 2.0
    for _ in range(64):
        phi = (1 + phi) ** (1 / (dims + 1))
    return tuple(round(phi**-power * _CIRCLE) for power in range(1, dims + 1))


# Whole numbers that `covering_points` multiplies the number of a point by, by dimensions.
PACES = {dims: _paces(dims) for dims in range(1, 5)}
