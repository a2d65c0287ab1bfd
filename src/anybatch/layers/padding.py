"""Padding along a sequence: valid lengths followed through convolutions, padding set to zero."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anybatch.core.arguments import first_input
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.masked_group_norm import forward_by_valid
from anybatch.layers.virtual_dataset import VirtualDataset

_FOLLOWED = (
    *(nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d),
    *(nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d),
)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d)


# The sequence's dimension of each network in two dimensions, for inputs that do not say it.
_axes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class SequenceLengths:
    """Hooks that give each norm the valid lengths of its input, and set padding to zero.

    A convolution or pooling gives an example of length ``n`` the length that it has alone. Lengths
    are known by the size of the dimension, and of what convolutions, norms and modules without
    children behind them give itself; in two dimensions
    the first input whose size is known says which one the sequence is, for all of a forward, and
    for later inputs in which both are so large, or neither is. What a `VirtualDataset` puts in
    front of the batch is as long as the input.

    Args:
        model: The network.
        layers: Its layers that get masks, and its group norms.
        lengths: Valid positions of each example; None to read them from ``attention_mask``.
        size: Positions of the network's input (default None: those of the first layer's input).
        zero: Whether padding is set to zero before convolutions and after norms.
        dim: The sequence's dimension in two dimensions, 2 or 3 (default None: by its size).

    Raises:
        ValueError: With `zero`, for a convolution that pads with something else.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NormLayer | nn.GroupNorm],
        lengths: Tensor | None,
        size: int | None,
        zero: bool,
        dim: int | None = None,
    ) -> None:
        self.given = lengths, size
        self.model, self.zero, self.dim, self.axis = model, zero, dim, dim
        self.virtual = next((m for m in model.modules() if isinstance(m, VirtualDataset)), None)
        if zero:
            _check_padding_modes(model)
        self.known: dict[int, Tensor] = {}
        self.first = 0  # positions of the network's input
        self.before = [(layer, layer.mask) for layer in layers if isinstance(layer, NormLayer)]
        self.handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        ]
        for module in model.modules():
            if isinstance(module, _FOLLOWED):
                self._hook(module, self._before_convolution, self._after_convolution)
            elif module not in layers and not module._modules:
                self._hook(module, None, _after_other)
        for layer in layers:
            if isinstance(layer, nn.GroupNorm):
                self._hook(layer, None, self._after_group_norm)
            else:
                self._hook(layer, self._before_norm, self._after_norm)
        if lengths is not None and size is not None:
            self._start(lengths, size)

    def _hook(self, module: nn.Module, before: Any, after: Any) -> None:
        if before is not None:
            self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        first = isinstance(module, nn.GroupNorm)  # others' hooks see what it replaces
        self.handles.append(module.register_forward_hook(after, prepend=first, with_kwargs=True))

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
        self.known, self.axis = {}, self.dim
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
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        if tensors and all(len(tensor) != len(lengths) for tensor in tensors):
            raise ValueError(
                f"{len(lengths)} lengths: the input has {len(tensors[0])} examples; give one each"
            )
        if size is not None:
            self._start(lengths, size)

    def _of(self, x: Tensor) -> Tensor | None:
        """The valid lengths of ``(N, C, L)``, or of two dimensions; None if they are not known."""
        lengths: Tensor | None = getattr(x, "valid_lengths", None)
        if lengths is not None or x.dim() not in (3, 4):
            return lengths
        if not self.known and self.given[0] is not None:
            self._start(self.given[0], self._positions(x, int(self.given[0].max())))
        size = x.shape[self._axis(x)]
        lengths = self.known.get(size)
        if lengths is not None and len(lengths) != len(x) and self.virtual is not None:
            lengths = self.virtual.grown(lengths, size)
        return None if lengths is None or len(lengths) != len(x) else lengths.to(x.device)

    def _positions(self, x: Tensor, longest: int) -> int:
        """Positions of the network's first input, which is padded to the longest example, or on."""
        if x.dim() == 3:
            return x.shape[2]
        if self.axis is None and longest in x.shape[2:]:
            return longest
        self.axis = self.axis or _axes.get(self.model)
        if self.axis is None:
            raise ValueError(
                f"lengths up to {longest}: no dimension of the input of shape {tuple(x.shape)} has "
                "so many positions; say along which they run, masked(..., dim=2) or dim=3"
            )
        return x.shape[self.axis]

    def _axis(self, x: Tensor) -> int:
        """The dimension of the sequence; that of two dimensions is the same in all of a forward."""
        if x.dim() == 3:
            return 2
        if self.axis is None:
            fits = [dim for dim in (2, 3) if x.shape[dim] in self.known]
            if len(fits) == 1:
                _axes[self.model] = fits[0]
            elif len(fits) == 2:  # in transformers' models the sequence comes first
                fits = [_axes.get(self.model, 0 if self.given[0] is not None else 2)]
            if fits == [0]:
                raise ValueError(
                    f"input of shape {tuple(x.shape)}: lengths may run along either dimension; "
                    "say along which, masked(..., dim=2) or dim=3"
                )
            self.axis = fits[0] if fits else None
        return self.axis or 2

    def _before_convolution(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        lengths = self._of(x)
        if lengths is None or not self.zero:
            return None
        pools = isinstance(module, (nn.MaxPool1d, nn.MaxPool2d))
        lowest = torch.finfo(x.dtype).min if pools else 0.0
        filled = _filled(x, lengths, lowest, self._axis(x))
        filled.valid_lengths = lengths  # type: ignore[attr-defined]
        others = {name: v for name, v in kwargs.items() if v is not x}
        return (filled, *args[1:]), others

    def _after_convolution(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = first_input(args, kwargs)
        lengths = self._of(x) if isinstance(output, Tensor) else None
        if lengths is None:
            return None
        axis = self._axis(x)
        size = output.shape[axis]
        if self.zero and isinstance(module, _AVERAGES):
            output = _averaged_alone(module, lengths, x.shape[axis], output, axis)
        lengths = _length_after(module, lengths, axis - 2).clamp(0, size)
        other = self.known.get(size, lengths)
        self.known[size] = lengths if len(other) != len(lengths) else other.maximum(lengths)
        if self.zero and isinstance(module, nn.ConvTranspose1d):  # shorter than what it is added to
            output = _filled(output, lengths, 0.0)
        output.valid_lengths = lengths
        return output

    def _before_norm(self, layer: NormLayer, args: Any, kwargs: Any) -> None:
        x = first_input(args, kwargs)
        lengths = self._of(x)
        if lengths is not None and x.dim() == 4:
            axis = self._axis(x)
            valid = mask_of(lengths, x.shape[axis]).unsqueeze(4 - axis)
            layer.mask = valid.expand(-1, *x.shape[2:])
            return
        size = x.shape[-1]
        if lengths is None and self.known:
            size = self.first
            if x.dim() == 2:  # positions in rows, of the sequence as long as it is by now
                size = next((n for n in self.known if n * len(self.known[n]) == len(x)), size)
            lengths = self.known[size]
        layer.mask = None if lengths is None else mask_of(lengths, size)

    def _after_norm(
        self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        lengths = self._of(first_input(args, kwargs)) if self.zero else None
        if lengths is None:
            return None
        output = _filled(output, lengths, 0.0, self._axis(output))
        output.valid_lengths = lengths  # type: ignore[attr-defined]
        return output

    def _after_group_norm(
        self, module: nn.GroupNorm, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        x = first_input(args, kwargs)
        lengths = self._of(x)
        if lengths is None:
            return None
        axis = self._axis(x)
        valid = _along(mask_of(lengths, x.shape[axis]), x.dim(), axis)
        output = forward_by_valid(module, args, kwargs, valid)
        if self.zero:
            output = output.masked_fill(~valid, 0.0)
        output.valid_lengths = lengths  # type: ignore[attr-defined]
        return output


def _after_other(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Give the output of an activation or dropout the lengths of its input."""
    x = first_input(args, kwargs) if args or kwargs else None
    lengths = getattr(x, "valid_lengths", None)
    if lengths is not None and isinstance(output, Tensor) and output.shape == x.shape:  # type: ignore[union-attr]
        output.valid_lengths = lengths  # type: ignore[attr-defined]


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


def _along(mask: Tensor, dims: int, axis: int) -> Tensor:
    """A mask ``(N, L)`` along one of `dims` dimensions."""
    shape = [len(mask), *(1,) * (dims - 1)]
    shape[axis] = mask.shape[1]
    return mask.view(shape)


def _filled(x: Tensor, lengths: Tensor, value: float, axis: int = 2) -> Tensor:
    return x.masked_fill(~_along(mask_of(lengths, x.shape[axis]), x.dim(), axis), value)


def _number(module: nn.Module, name: str, dim: int, default: int = 0) -> int:
    """A setting of a convolution or pooling along a dimension."""
    value: Any = getattr(module, name, default)
    return int(value[dim] if isinstance(value, tuple) else value)


def _length_after(module: nn.Module, lengths: Tensor, dim: int) -> Tensor:
    """The lengths that examples would have alone after a convolution or pooling along `dim`."""
    kernel, stride = _number(module, "kernel_size", dim, 1), _number(module, "stride", dim, 1)
    reach = _number(module, "dilation", dim, 1) * (kernel - 1)
    if isinstance(module, nn.ConvTranspose1d):
        added = _number(module, "output_padding", dim) - 2 * _number(module, "padding", dim)
        return (lengths - 1) * stride + reach + 1 + added
    padding: Any = getattr(module, "padding", 0)
    named = {"same": reach, "valid": 0}
    both = named[padding] if isinstance(padding, str) else 2 * _number(module, "padding", dim)
    free = lengths + both - reach - 1
    if not getattr(module, "ceil_mode", False):
        return free.div(stride, rounding_mode="floor") + 1
    after = (free + stride - 1).div(stride, rounding_mode="floor") + 1
    # A window begins within the input or the padding before it.
    return after - ((after - 1) * stride >= lengths + both // 2).long()


def _averaged_alone(
    module: nn.Module, lengths: Tensor, size: int, output: Tensor, axis: int
) -> Tensor:
    """The output of an average pooling with each window divided as if an example were alone."""
    if getattr(module, "divisor_override", None):
        return output
    kernel, stride, padding = (
        _number(module, name, axis - 2) for name in ("kernel_size", "stride", "padding")
    )
    first = torch.arange(output.shape[axis], device=output.device) * stride - padding

    def values(length: Tensor) -> Tensor:
        """Those behind each window, padding included where it counts."""
        last = (first + kernel).minimum(length + padding)
        if module.count_include_pad:
            return last - first
        return last.minimum(length) - first.clamp(min=0)

    alone = values(lengths.unsqueeze(1)).clamp(min=1)
    shape = [len(lengths), *(1,) * (output.dim() - 1)]
    shape[axis] = output.shape[axis]
    together = values(lengths.new_tensor(size))
    ratio = together.to(torch.promote_types(output.dtype, torch.float32)) / alone
    return output * ratio.to(output.dtype).view(shape)


def _check_padding_modes(model: nn.Module) -> None:
    """Raise for a convolution that repeats an example's values beyond its end."""
    for name, module in model.named_modules():
        mode = getattr(module, "padding_mode", "zeros")
        if not isinstance(module, _FOLLOWED) or mode == "zeros":
            continue
        if any(getattr(module, "_reversed_padding_repeated_twice", ())):
            raise ValueError(
                f"zero=True: the convolution {name!r} pads with {mode!r}, which repeats what is at "
                "the end of the longest example; give it padding_mode='zeros', or leave zero out"
            )
