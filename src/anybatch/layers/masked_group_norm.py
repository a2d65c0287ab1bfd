"""Group norms of torch by the statistics of valid positions."""

import torch
from torch import Tensor, nn

from anybatch.core.masks import fit_mask

_AFTER = ("drop", "act")  # of timm's group norms, which end in an activation


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

    def __call__(self, module: nn.GroupNorm, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        valid = fit_mask(self.mask, args[0], self.name).valid
        return normalize_groups(module, args[0], valid, output.dtype)


def normalize_groups(module: nn.GroupNorm, x: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalize as a group norm does, by the statistics of each example's valid positions.

    Args:
        module: The group norm.
        x: Its input ``(N, C, ...)``.
        valid: True where a position is valid: ``(N, 1, ...)``, or 1 in place of a dimension.
        dtype: That of the output.

    Returns:
        The output at all positions; an example without valid ones has mean and variance 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    valid = valid.expand(-1, 1, *x.shape[2:])
    number = valid.flatten(1).sum(1).clamp(min=1) * (x.shape[1] // module.num_groups)
    number = number.view(-1, *(1,) * x.dim())
    groups, valid = x.unflatten(1, (module.num_groups, -1)), valid.unsqueeze(2)
    over = tuple(range(2, groups.dim()))
    centered = groups - groups.masked_fill(~valid, 0.0).sum(over, keepdim=True) / number
    var = centered.masked_fill(~valid, 0.0).square().sum(over, keepdim=True) / number
    output: Tensor = (centered * torch.rsqrt(var + module.eps)).flatten(1, 2)
    if module.affine:
        shape = (-1, *(1,) * (x.dim() - 2))
        output = output * module.weight.view(shape) + module.bias.view(shape)
    output = output.to(dtype)
    for name in _AFTER:
        part = module._modules.get(name)
        output = output if part is None else part(output)
    return output
