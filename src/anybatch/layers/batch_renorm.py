# mypy: disable-error-code="no-untyped-def"
"""Batch renormalization (Ioffe 2017), the baseline of three of the papers."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from typing_extensions import Unpack

from anybatch.core.arguments import check_count
from anybatch.core.module_state import NormState
from anybatch.core.norm_layer import NormLayer, NormOptions
from anybatch.core.rule import Counter, State, chosen, clamp, maximum, rule, sqrt, where

_WARMUP_STEPS = 10000


class BatchRenorm(NormLayer):
    """Batch renormalization: batch statistics, corrected towards the running ones.

    ::

        y = weight * (r * (x - mean) / sigma + d) + bias
        r = clip(sigma / running_sigma, 1 / max_r, max_r)
        d = clip((mean - running_mean) / running_sigma, -max_d, max_d)

    with ``sigma = sqrt(var + eps)``; no gradient passes r and d, and the running
    statistics are those before the step. With ``warmup_steps`` it starts as batch
    normalization (r = 1, d = 0).

    Args:
        momentum: Weight of the newest batch in the running statistics (default
            0.01, as in the paper; the correction is only as steady as they are).
        track_running_stats: Must be True.
        max_r: Limit of r, from 1 on (default 3.0).
        max_d: Limit of d, from 0 on (default 5.0).
        warmup_steps: Training forwards before the limits are reached (default 10000).
        smooth: Let the limits grow evenly over the warm-up instead of jumping
            from 1 and 0 at its end: the first forward is batch normalization, and
            after `warmup_steps` forwards they are open (default False).

    Source: S. Ioffe, Batch Renormalization, 2017, algorithm 1; moving-average-bn,
    equation 14.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.BatchRenorm1d(4, warmup_steps=100)
        >>> norm(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """

    needs_running_stats = True
    state = State(step=Counter())

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        max_r: float = 3.0,
        max_d: float = 5.0,
        warmup_steps: int = _WARMUP_STEPS,
        smooth: bool = False,
        **common: Unpack[NormOptions],
    ) -> None:
        if not max_r >= 1:
            raise ValueError(f"max_r={max_r!r}: give a number from 1 on")
        if not max_d >= 0:
            raise ValueError(f"max_d={max_d!r}: give a number from 0 on")
        check_count("warmup_steps", warmup_steps, 0)
        shared = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*shared, **common)
        self.max_r, self.max_d = float(max_r), float(max_d)
        self.warmup_steps, self.smooth = warmup_steps, smooth
        self.declare_state()

    @classmethod
    def crossq(cls, num_features: int, **options: Any) -> "BatchRenorm":
        """A layer with the constants of CrossQ (Bhatt et al. 2024), for critics.

        Args:
            num_features: Channels C.
            **options: Arguments of the class, in place of CrossQ's ``eps=1e-3``, ``momentum=0.01``,
                ``max_r=3.0``, ``max_d=5.0`` and ``warmup_steps=100_000``.


        Example:
            >>> import anybatch
            >>> anybatch.BatchRenorm1d.crossq(4).warmup_steps
            100000
        """
        constants = {"eps": 1e-3, "momentum": 0.01, "warmup_steps": 100_000}
        return cls(num_features, **{**constants, **options})

    def adopt_(self, norm: nn.Module) -> "NormState":
        super().adopt_(norm)
        if self.warmup_steps == 0:
            # Its checkpoint then has no warm-up in a layer that was built with one, either.
            self.method_state["step"].fill_(_WARMUP_STEPS)
        return self

    def _start_from_batchnorm(self, error_msgs: list[str], prefix: str) -> None:
        """After loading a batch norm's checkpoint: no warm-up if its statistics are trained."""
        super()._start_from_batchnorm(error_msgs, prefix)
        tracked = self.num_batches_tracked
        if tracked is not None and not tracked.is_meta and tracked > 0:
            self.method_state["step"].fill_(self.warmup_steps)

    @rule
    def choose(mean, var, running_mean, running_var, step, eps, max_r, max_d, warmup_steps, smooth):
        opening = (step - 1) / maximum(warmup_steps, 1) if smooth else 0.0
        opened = where(step > warmup_steps, 1.0, opening)
        most_r, most_d = opened * (max_r - 1) + 1, opened * max_d
        sigma = sqrt(running_var + eps)
        r = clamp(sqrt(var + eps) / sigma, 1 / most_r, most_r)
        d = clamp((mean - running_mean) / sigma, -most_d, most_d)
        return chosen(mean, var, r=r, d=d)

    def own_arguments(self) -> Mapping[str, Any]:
        names = ("max_r", "max_d", "warmup_steps", "smooth")
        return {name: getattr(self, name) for name in names}


class BatchRenorm1d(BatchRenorm, dims=1): ...


class BatchRenorm2d(BatchRenorm, dims=2): ...


class BatchRenorm3d(BatchRenorm, dims=3): ...
