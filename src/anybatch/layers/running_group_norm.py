"""Group normalization with running statistics, for inference example weighing (four-things)."""

from typing import Any

import torch
from torch import Tensor

from anybatch.layers.batch_group_norm import BatchGroupNorm


class RunningGroupNorm(BatchGroupNorm):
    """Group normalization that keeps the statistics of training, to mix them in at inference.

    In training, ``torch.nn.GroupNorm`` that also tracks mean and variance of each
    channel. At inference (four-things, equation 3, of each example and channel)::

        E    = a * E[x]   + (1 - a) * running_mean
        E2   = a * E[x^2] + (1 - a) * (running_var + running_mean^2)
        mean = average of E over the channel group
        var  = average of E2 over the channel group - mean^2
        y    = weight * (x - mean) / sqrt(var + eps) + bias

    With ``example_weight`` a = 1 it is ``torch.nn.GroupNorm`` exactly; the paper
    finds the best a somewhat below 1. It is batch-group normalization with one
    example a group, for inputs of any rank, and loads a group norm's checkpoint.

    Args:
        num_groups: Channel groups; they divide num_channels.
        num_channels: Channels C.
        eps: Added to the variance (default 1e-5).
        affine: Learn weight and bias (default True).
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
        momentum: Weight of the newest batch in the running statistics (default
            0.1); None averages over all batches.
        example_weight: Share of the example's own statistics at inference (default 1.0).

    Shape:
        Input and output ``(N, C, ...)``.

    Raises:
        ValueError: For an argument out of range, or an input of another shape.
        TypeError: For an input that is not floating point.

    Source: four-things, section 3.1 and figure 2.

    Example:
        >>> import torch, anybatch
        >>> norm, plain = anybatch.RunningGroupNorm(2, 8).eval(), torch.nn.GroupNorm(2, 8)
        >>> x = torch.randn(3, 8, 5)
        >>> torch.equal(norm(x), plain(x))
        True
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        momentum: float | None = 0.1,
        example_weight: float = 1.0,
    ) -> None:
        super().__init__(
            num_channels,
            eps,
            momentum,
            affine,
            True,
            device,
            dtype,
            num_groups=num_groups,
            examples_per_group=1,
            example_weight=example_weight,
        )

    def _infer(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.example_weight == 1.0 and mask is None:
            weight, bias = self.weight, self.bias
            # torch.nn.functional.group_norm refuses an example of one value per group.
            cudnn = torch.backends.cudnn.enabled
            return torch.group_norm(x, self.num_groups, weight, bias, self.eps, cudnn)
        return super()._infer(x, mask)

    def inference_obstacle(self) -> str | None:
        return super().inference_obstacle() or "it is made for inputs of any rank"

    @property
    def _ranks(self) -> tuple[int, ...]:
        return tuple(range(2, 9))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        _, _, missing_keys, *_ = rest  # as torch.nn.Module has them
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if prefix + name in missing_keys:  # a group norm's checkpoint
                missing_keys.remove(prefix + name)
