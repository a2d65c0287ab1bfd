"""Group norms of torch by the statistics of valid positions."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybatch.core.arguments import first_input
from anybatch.core.masks import fit_mask
from anybatch.core.notices import NoEffectWarning


class MaskedGroupNorm:
    """Forward hook of a group norm that normalizes by the valid positions of a mask.

    Args:
        mask: The mask, in any shape that a layer takes.
        name: The group norm's, for errors.

    Raises:
        ValueError: In a forward, if the mask does not fit the input.
    """

    def __init__(self, mask: Tensor, name: str) -> None:
        self.mask, self.name = mask, name

    def __call__(
        self, module: nn.GroupNorm, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        valid = fit_mask(self.mask, first_input(args, kwargs), self.name).valid
        return forward_by_valid(module, args, kwargs, valid)


def forward_by_valid(
    module: nn.GroupNorm, args: Sequence[Any], kwargs: Mapping[str, Any], valid: Tensor
) -> Any:
    """A group norm's forward, its subclasses' too, with statistics of valid positions.

    Args:
        module: The group norm.
        args: What its forward is given.
        kwargs: The same, by name.
        valid: True where a position of its input is valid: ``(N, 1, ...)``, or 1 in place of a
            dimension.

    Returns:
        The output at all positions; an example without valid ones has mean and variance 0.
    """
    with _ByValid(valid) as mode:
        output = module.forward(*args, **kwargs)
    if not mode.met:
        warnings.warn(
            f"masked: {type(module).__name__} does not normalize by torch's group_norm, and the "
            "mask has no effect on it",
            NoEffectWarning,
            stacklevel=2,
        )
    return output


class _ByValid(TorchFunctionMode):
    """Within it, `group_norm` leaves invalid positions out of its statistics.

    Attributes:
        met: Whether it did.
    """

    def __init__(self, valid: Tensor) -> None:
        super().__init__()
        self.valid, self.met = valid, False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.group_norm:
            return func(*args, **kwargs)
        x = first_input(args, kwargs)
        try:
            valid = self.valid.expand(x.shape[0], 1, *x.shape[2:])
        except RuntimeError:  # another tensor than its input
            return func(*args, **kwargs)
        self.met = True
        return _group_norm(valid, *args, **kwargs)


def _group_norm(
    valid: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm`` by the statistics of each example's valid positions."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    number = valid.flatten(1).sum(1).clamp(min=1) * (x.shape[1] // num_groups)
    number = number.view(-1, *(1,) * x.dim())
    groups, valid = x.unflatten(1, (num_groups, -1)), valid.unsqueeze(2)
    over = tuple(range(2, groups.dim()))
    centered = groups - groups.masked_fill(~valid, 0.0).sum(over, keepdim=True) / number
    var = centered.masked_fill(~valid, 0.0).square().sum(over, keepdim=True) / number
    output: Tensor = (centered * torch.rsqrt(var + eps)).flatten(1, 2)
    shape = (-1, *(1,) * (x.dim() - 2))
    output = output if weight is None else output * weight.view(shape)
    output = output if bias is None else output + bias.view(shape)
    return output if torch.is_autocast_enabled(x.device.type) else output.to(input.dtype)
