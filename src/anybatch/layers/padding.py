"""Padding along a sequence: valid lengths followed through convolutions, padding set to zero."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.core.norm_layer import NormLayer

_FOLLOWED = (
    *(nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d),
    *(nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d),
)


class SequenceLengths:
    """Hooks that give each norm the valid lengths of its input, and set padding to zero.

    A convolution or pooling gives an example of length ``n`` the length that it has alone. Lengths
    are known by the size of the dimension, and of a convolution's output itself; in two dimensions
    the sequence is the first one whose size is known.

    Args:
        model: The network.
        layers: Its layers that get masks.
        lengths: Valid positions of each example; None to read them from ``attention_mask``.
        size: Positions of the network's input (default None: those of the first layer's input).
        zero: Whether padding is set to zero before convolutions and after norms.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NormLayer],
        lengths: Tensor | None,
        size: int | None,
        zero: bool,
    ) -> None:
        self.given = lengths, size
        self.zero = zero
        self.known: dict[int, Tensor] = {}
        self.first = 0  # positions of the network's input
        self.before = [(layer, layer.mask) for layer in layers]
        self.handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        ]
        for module in model.modules():
            if isinstance(module, _FOLLOWED):
                self.handles.append(module.register_forward_pre_hook(self._before_convolution))
                self.handles.append(module.register_forward_hook(self._after_convolution))
            elif isinstance(module, nn.GroupNorm):
                self.handles.append(module.register_forward_hook(self._after_group_norm))
        for layer in layers:
            self.handles.append(layer.register_forward_pre_hook(self._before_norm))
            self.handles.append(layer.register_forward_hook(self._after_norm))
        if lengths is not None and size is not None:
            self._start(lengths, size)

    def remove(self) -> None:
        """Leave the network as it was."""
        for handle in self.handles:
            handle.remove()
        for layer, mask in self.before:
            layer.mask = mask

    def _start(self, lengths: Tensor, size: int) -> None:
        if bool((lengths > size).any()):
            raise ValueError(f"lengths up to {int(lengths.max())}: the input has {size} positions")
        self.known, self.first = {size: lengths}, size

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the network begins."""
        lengths, size = self.given
        self.known = {}
        if lengths is None:
            mask = kwargs.get("attention_mask")
            if not isinstance(mask, Tensor):
                raise ValueError(
                    "masked: give mask=, lengths=, or call the model with attention_mask="
                )
            if mask.is_floating_point():
                raise TypeError(
                    f"attention_mask of type {mask.dtype}: give one of bool or whole numbers, 1 "
                    "where input is valid"
                )
            lengths, size = lengths_of(mask), mask.shape[1]
        if size is not None:
            self._start(lengths, size)

    def _of(self, x: Tensor) -> Tensor | None:
        """The valid lengths of ``(N, C, L)``, or of two dimensions; None if they are not known."""
        lengths: Tensor | None = getattr(x, "valid_lengths", None)
        if lengths is not None or x.dim() not in (3, 4):
            return lengths
        if not self.known and self.given[0] is not None:  # padded to the longest, else the first
            longest = int(self.given[0].max())
            self._start(self.given[0], longest if longest in x.shape[2:] else x.shape[2])
        lengths = self.known.get(x.shape[self._axis(x)])
        return None if lengths is None or len(lengths) != len(x) else lengths.to(x.device)

    def _axis(self, x: Tensor) -> int:
        """The dimension of the sequence."""
        return 3 if x.dim() == 4 and x.shape[2] not in self.known else 2

    def _before_convolution(self, module: nn.Module, args: Any) -> Any:
        lengths = self._of(args[0])
        if lengths is None or not self.zero:
            return None
        pools = isinstance(module, (nn.MaxPool1d, nn.MaxPool2d))
        lowest = torch.finfo(args[0].dtype).min if pools else 0.0
        return (_filled(args[0], lengths, lowest, self._axis(args[0])), *args[1:])

    def _after_convolution(self, module: nn.Module, args: Any, output: Any) -> Any:
        lengths = self._of(args[0]) if isinstance(output, Tensor) else None
        if lengths is None:
            return None
        axis = self._axis(args[0])
        size = output.shape[axis]
        lengths = _length_after(module, lengths, axis - 2).clamp(0, size)
        other = self.known.get(size)
        self.known[size] = lengths if other is None else other.maximum(lengths)
        if self.zero and isinstance(module, nn.ConvTranspose1d):  # shorter than what it is added to
            output = _filled(output, lengths, 0.0)
        output.valid_lengths = lengths
        return output

    def _before_norm(self, layer: NormLayer, args: Any) -> None:
        x, lengths = args[0], self._of(args[0])
        if lengths is not None and x.dim() == 4:
            axis = self._axis(x)
            valid = mask_of(lengths, x.shape[axis]).unsqueeze(4 - axis)
            layer.mask = valid.expand(-1, *x.shape[2:])
            return
        size = x.shape[-1]
        if lengths is None and self.known:
            lengths, size = self.known[self.first], self.first
        layer.mask = None if lengths is None else mask_of(lengths, size)

    def _after_norm(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        lengths = self._of(args[0]) if self.zero else None
        if lengths is None:
            return None
        output = _filled(output, lengths, 0.0, self._axis(output))
        output.valid_lengths = lengths  # type: ignore[attr-defined]
        return output

    def _after_group_norm(self, module: nn.GroupNorm, args: Any, output: Tensor) -> Tensor | None:
        """Normalize again, each example by its valid positions."""
        x, lengths = args[0], self._of(args[0]) if self.zero else None
        if lengths is None or x.dim() != 3:
            return None
        groups = _filled(x, lengths, 0.0).unflatten(1, (module.num_groups, -1))
        values = groups.shape[2] * lengths.clamp(min=1).view(-1, 1, 1, 1)
        centered = groups - groups.sum((2, 3), keepdim=True) / values
        valid = mask_of(lengths, x.shape[2])[:, None, None]
        var = (centered * valid).square().sum((2, 3), keepdim=True) / values
        output = (centered * torch.rsqrt(var + module.eps)).flatten(1, 2)
        if module.affine:
            output = output * module.weight.unsqueeze(1) + module.bias.unsqueeze(1)
        output = _filled(output, lengths, 0.0)
        output.valid_lengths = lengths  # type: ignore[attr-defined]
        return output


def lengths_of(mask: Tensor) -> Tensor:
    """The lengths of a mask ``(N, L)`` or ``(N, 1, L)`` that is valid first and padded after.

    Raises:
        ValueError: For a mask of another kind.
    """
    valid = mask != 0
    if valid.dim() == 3 and valid.shape[1] == 1:
        valid = valid.squeeze(1)
    lengths = valid.sum(-1)
    if valid.dim() != 2 or not torch.equal(valid, mask_of(lengths, valid.shape[1])):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: zero=True follows padding at the end of sequences"
            "; give a mask (N, L) that is true first and false after, or lengths="
        )
    return lengths


def mask_of(lengths: Tensor, size: int) -> Tensor:
    """The mask ``(N, size)`` of lengths."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def _filled(x: Tensor, lengths: Tensor, value: float, axis: int = 2) -> Tensor:
    shape = [len(lengths), *(1,) * (x.dim() - 1)]
    shape[axis] = x.shape[axis]
    return x.masked_fill(~mask_of(lengths, x.shape[axis]).view(shape), value)


def _length_after(module: nn.Module, lengths: Tensor, dim: int) -> Tensor:
    """The lengths that examples would have alone after a convolution or pooling along `dim`."""

    def number(name: str, default: int) -> int:
        value: Any = getattr(module, name, default)
        return int(value[dim] if isinstance(value, tuple) else value)

    kernel, stride = number("kernel_size", 1), number("stride", 1)
    dilation = number("dilation", 1)
    reach = dilation * (kernel - 1)
    if isinstance(module, nn.ConvTranspose1d):
        added = number("output_padding", 0) - 2 * number("padding", 0)
        return (lengths - 1) * stride + reach + 1 + added
    padding: Any = getattr(module, "padding", 0)
    named = {"same": reach, "valid": 0}
    both = named[padding] if isinstance(padding, str) else 2 * number("padding", 0)
    free = lengths + both - reach - 1
    if getattr(module, "ceil_mode", False):
        free = free + stride - 1
    return free.div(stride, rounding_mode="floor") + 1
