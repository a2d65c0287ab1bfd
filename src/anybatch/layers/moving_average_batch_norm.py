"""Moving average batch normalization (Yan et al. 2020, moving-average-bn)."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.backends import scalar
from anybatch.backends.kinds import AVERAGES, WINDOW
from anybatch.backends.protocol import BackwardMemory, MethodSpec, Spec, Statistics
from anybatch.core.arguments import check_choice, check_count
from anybatch.core.backward_statistics import BackwardAverage, all_finite, slide, slide_mean
from anybatch.core.grouping import Partition
from anybatch.core.norm_layer import Batch, NormLayer
from anybatch.layers.weight_centralization import (
    is_centralized,
    use_uncentred,
    weight_centralization,
)


class _MovingAverageBatchNorm(NormLayer):
    """Moving average batch normalization: averages forward *and* backward.

    With ``x2`` the second moment of a batch, ``x2_bar`` its average over the last
    `window` steps and ``x2_hat`` its exponential average before this step::

        z   = x / sqrt(x2_bar + eps)
        r   = clip(sqrt(x2_bar + eps) / sqrt(x2_hat + eps), 1 / clip, clip)
        y   = weight * r * z + bias                                      (eq. 19)
        g   = r * weight * dy
        dx  = (g - z * Psi_bar) / sqrt(x2_bar + eps)                     (eq. 20)

    where ``Psi_bar`` is the average of ``mean(g * z)`` over the last `window`
    steps (equation 13). This is not the gradient of the output: it is the one
    that a large batch would have had. There is no mean to subtract; give the
    layer the output of a convolution with `anybatch.weight_centralization`
    (equation 18), as `anybatch.convert` does.

    Counting steps from 1: while ``step <= window or step < warmup_steps`` the
    averages are the batch's own; while ``step <= max(renorm_warmup_steps,
    warmup_steps)``, r is 1. Inference is ``weight * x / sqrt(x2_hat + eps) +
    bias``, stored as ``running_mean = 0`` and ``running_var = x2_hat``.

    Args:
        num_features: Channels C.
        eps: Added to the second moment (default 1e-5).
        momentum: Weight of the newest step in ``x2_hat`` (default 0.02).
        affine: Learn weight and bias (default True).
        bias: Learn the shift, where affine is true (default True).
        track_running_stats: Must be True.
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
        window: Steps in the simple averages (default 16).
        clip: Limit of r, from 1 on (default 5.0).
        warmup_steps: Steps before any average is used (default 100).
        renorm_warmup_steps: Steps before r is used (default 1000).
        centered: Use mean and variance, four batch statistics, in place of the
            second moment (default False; the paper's "vanilla" form).
        forward_stats: "ema" as above (default); "sma" the window's average, with
            r = 1; "batch" the batch's own, with r = 1.
        backward_stats: "sma" as above (default); "ema" an exponential average;
            "batch" the batch's own, which is the exact gradient.
        norm_batch_size: Normalize in successive batches of so many examples, each
            a step of the memory.
        example_weight: Share of an example's own statistics at inference.
        process_group: Processes whose batches are one in training, a process group or "world"
            (default None: this process alone).
        outlier_limit: Times its running variance that a channel of a batch may have and enter
            memory (default None: any).

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d.

    Raises:
        ValueError: For an argument out of range or an input of another shape.
        TypeError: For an input that is not floating point.

    Source: moving-average-bn, section 4 and equations 13, 15 to 20; `centered`,
    `forward_stats` and `backward_stats` give the rows of its tables 2 and 4.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.MovingAverageBatchNorm2d(8)
        >>> norm(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    needs_running_stats = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        window: int = 16,
        clip: float = 5.0,
        warmup_steps: int = 100,
        renorm_warmup_steps: int = 1000,
        centered: bool = False,
        forward_stats: str = "ema",
        backward_stats: str = "sma",
        norm_batch_size: int | None = None,
        example_weight: float = 0.0,
        process_group: Any = None,
        outlier_limit: float | None = None,
    ) -> None:
        check_count("window", window)
        if not clip >= 1:
            raise ValueError(f"clip={clip!r}: give a number from 1 on")
        for name, steps in (("warmup", warmup_steps), ("renorm_warmup", renorm_warmup_steps)):
            if steps != 0:
                check_count(f"{name}_steps", steps)
        for name, choice in (("forward", forward_stats), ("backward", backward_stats)):
            check_choice(f"{name}_stats", choice, ("ema", "sma", "batch"))
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            norm_batch_size=norm_batch_size,
            example_weight=example_weight,
            process_group=process_group,
            outlier_limit=outlier_limit,
        )
        self.window, self.clip, self.centered = window, float(clip), bool(centered)
        self.warmup_steps, self.renorm_warmup_steps = warmup_steps, renorm_warmup_steps
        self.forward_stats, self.backward_stats = forward_stats, backward_stats
        # x2 and Psi, or mean beside variance and g beside Psi in the centred form.
        width = 2 * num_features if centered else num_features
        self.memory["step"] = self._new_counter()
        if forward_stats != "batch":
            self.memory["window"] = self._new_memory(window, width)
        if backward_stats != "batch":
            length = () if backward_stats == "ema" else (window,)
            self.memory["backward_average"] = self._new_memory(*length, width)
            self.memory["backward_step"] = self._new_counter()

    def reset_memory(self) -> None:
        for tensor in self.memory.values():
            tensor.zero_()

    # --- forward -----------------------------------------------------------

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        if self.running_mean is None or self.running_var is None:
            return Statistics(mean, var)  # removed, to normalize by the batch
        step = self.memory["step"] + 1
        warming = torch.lt(step, scalar(float(max(self.window + 1, self.warmup_steps))))
        new = var if mean is None else torch.cat([mean, var])
        used = new
        if self.forward_stats != "batch":
            moved = slide(self.memory["window"], new, self._finite(new), update)
            # A window that steps which were not finite have left with empty places is no average.
            empty = torch.eq(moved[0, -self.num_features :], 0)
            empty = empty if mean is None else empty.repeat(2)
            used = torch.where(empty.logical_or_(warming), new, moved.mean(0))
        used_mean, used_var = (None, used) if mean is None else used.chunk(2)
        r = d = None
        if self.forward_stats == "ema":
            r, d = self._renormalize(used_mean, used_var, step)
        if update:
            self.memory["step"].copy_(step)
            self.track(used_mean, used_var)
        return Statistics(used_mean, used_var, r, d, own=warming)

    def _renormalize(
        self, mean: Tensor | None, var: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """r, and d of the centred form (moving-average-bn, equations 14 and 19)."""
        assert self.running_mean is not None and self.running_var is not None  # see `rule`
        off = torch.le(step, scalar(float(max(self.renorm_warmup_steps, self.warmup_steps))))
        square = self.running_var.to(var.dtype) + scalar(self.eps)
        r = (var + scalar(self.eps)).div_(square).sqrt_().clamp_(1 / self.clip, self.clip)
        r.masked_fill_(off, 1.0)
        if mean is None:
            return r, None
        d = (mean - self.running_mean).div_(square.sqrt_()).clamp_(-self.clip, self.clip)
        return r, d.masked_fill_(off, 0.0)

    def _finite(self, new: Tensor) -> Tensor:
        return all_finite(new, self.num_features)

    # --- backward ----------------------------------------------------------

    def backward_memory(
        self, statistics: Statistics, live: tuple[bool, ...] | None, update: bool
    ) -> BackwardMemory | None:
        if self.backward_stats == "batch" or statistics.own is None:
            return None
        return BackwardAverage(self, statistics.own, live, update)

    def average_backward(self, new: Tensor, update: bool) -> Tensor:
        """Take the backward statistics of a step, give their average."""
        count = self.memory["backward_step"]
        if self.backward_stats == "sma":
            window = self.memory["backward_average"]
            average = slide_mean(window, count, new, self._finite(new), update)
        else:
            stored = self.memory["backward_average"]
            old = stored.to(new.dtype)
            started = (count > 0).to(new.dtype)
            average = torch.lerp(new, old, started * (1 - self._pace()))
            if update:
                stored.copy_(torch.where(self._finite(new), average, old))
        if update:
            count.add_(1)
        return average

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        if self.centered:
            return "centered=True: the kernels take the uncentred form"
        memory = self.memory
        return MethodSpec(
            WINDOW,
            (self.clip if self.forward_stats == "ema" else 0.0, 0.0),
            (self.window, self.warmup_steps, self.renorm_warmup_steps),
            window=memory.get("window"),
            counter=memory["step"],
            averages=AVERAGES[self.backward_stats],
            psi=memory.get("backward_average"),
            psi_counter=memory.get("backward_step"),
        )

    # --- the layer whose weights are centred ----------------------------------

    _feeder: tuple[nn.Module, ...] = ()

    def follow_centralized(self, module: nn.Module) -> None:
        """Keep the layer before this one, whose weights are centred, for checkpoints.

        A checkpoint tells whether it was trained with centred weights. Where it was not, the layer
        uses its weights as they are from the load on, and the other way round.
        """
        self.__dict__["_feeder"] = (module,)  # a tuple: it is no part of this layer

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if own is not None and self._feeder:
            own["centralized"] = is_centralized(self._feeder[0])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        centred = local_metadata.get("centralized")
        if centred is None and not any(prefix + name in state_dict for name in self.memory):
            count = state_dict.get(prefix + "num_batches_tracked")
            mean = state_dict.get(prefix + "running_mean")
            evidence = mean if count is None else count
            if evidence is not None and bool(evidence.any()):  # of a trained batch norm
                centred = False
        if centred is not None and prefix + "running_mean" in state_dict:
            self._match_feeder(prefix[:-1], centred)

    def _match_feeder(self, name: str, centred: bool) -> None:
        """Let the layer before this one use its weights as the checkpoint's network did."""
        advice = "; to centre the weights of a trained network, use convert(..., centralize=True)"
        if not self._feeder:
            if centred:
                warnings.warn(
                    f"{name}: the checkpoint was trained with centred weights before this layer, "
                    "which are not centred here, and its output differs: convert the network "
                    'while it is untrained, or with anybatch.convert(model, "mabn", '
                    "centralize=True)",
                    stacklevel=2,
                )
        elif centred and not is_centralized(self._feeder[0]):
            weight_centralization(self._feeder[0])
            warnings.warn(
                f"{name}: the checkpoint was trained with centred weights before this layer; its "
                "weights are centred again",
                stacklevel=2,
            )
        elif not centred and is_centralized(self._feeder[0]):
            use_uncentred(self._feeder[0])
            warnings.warn(
                f"{name}: the checkpoint was trained with weights before this layer that are not "
                f"centred; its weights are no longer centred, so that the output is the same"
                f"{advice}",
                stacklevel=2,
            )

    # --- from a batch norm -------------------------------------------------

    def adopt_(self, norm: torch.nn.Module) -> "_MovingAverageBatchNorm":
        super().adopt_(norm)
        if isinstance(norm, _MovingAverageBatchNorm):
            self._feeder = norm._feeder
        obstacle = self._absorb_mean()
        if obstacle is not None:
            raise ValueError(obstacle)
        return self

    def _start_from_batchnorm(self, error_msgs: list[str], prefix: str) -> None:
        self.reset_memory()
        obstacle = self._absorb_mean()
        if obstacle is not None:
            error_msgs.append(f"{prefix}running_mean: {obstacle}")

    @torch.no_grad()
    def _absorb_mean(self) -> str | None:
        """Move a running mean into scale and shift: the uncentred form has none.

        ``var + mean**2`` is the second moment that the uncentred form divides by.

        Returns:
            Why it cannot be done, or None. State is changed only if it can.
        """
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or self.centered or mean.is_meta:
            return None
        if self.weight is None or self.bias is None:
            if bool(mean.any()):
                lacking = "affine=False" if self.weight is None else "bias=False"
                return (
                    f"{lacking} with a running mean that is not 0: {type(self).__name__} has "
                    "no mean and no bias to move it to; use centered=True"
                )
            return None
        second = torch.addcmul(var, mean, mean)
        inverse = torch.rsqrt(var + self.eps)
        self.bias.sub_(self.weight * mean * inverse)
        self.weight.mul_((second + self.eps).sqrt_() * inverse)
        self.running_mean, self.running_var = torch.zeros_like(mean), second
        return None

    def own_arguments(self) -> Mapping[str, Any]:
        names = ("window", "clip", "warmup_steps", "renorm_warmup_steps")
        ablations = {"centered": False, "forward_stats": "ema", "backward_stats": "sma"}
        changed = [name for name, value in ablations.items() if getattr(self, name) != value]
        return {name: getattr(self, name) for name in (*names, *changed)}


class MovingAverageBatchNorm1d(_MovingAverageBatchNorm):
    __doc__ = _MovingAverageBatchNorm.__doc__
    dims = 1


class MovingAverageBatchNorm2d(_MovingAverageBatchNorm):
    __doc__ = _MovingAverageBatchNorm.__doc__
    dims = 2


class MovingAverageBatchNorm3d(_MovingAverageBatchNorm):
    __doc__ = _MovingAverageBatchNorm.__doc__
    dims = 3
