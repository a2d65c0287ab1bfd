# mypy: disable-error-code="no-untyped-def"
"""Moving average batch normalization (Yan et al. 2020, moving-average-bn)."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.backends.protocol import Spec
from anybatch.core.arguments import check_choice, check_count
from anybatch.core.grouping import Partition
from anybatch.core.norm_layer import NormLayer
from anybatch.core.rule import (
    Counter,
    Method,
    Row,
    Rule,
    State,
    Window,
    chosen,
    clamp,
    lerp,
    maximum,
    method_of,
    rule,
    sqrt,
    where,
)
from anybatch.layers.weight_centralization import (
    is_centralized,
    use_uncentred,
    weight_centralization,
)

# --- forward ----------------------------------------------------------------------


@rule
def is_warming(step, window, warmup_steps):
    """Whether it is too early for averages."""
    return step < maximum(window + 1, warmup_steps)


@rule
def average_of(new, average, full, warming):
    """The average of a window; the batch's own value as long as there is none."""
    return where(warming, new, where(full, average, new))


@rule
def batch_statistics(mean, var, step, window, warmup_steps):
    """The batch's own statistics."""
    return chosen(mean, var, own=is_warming(step, window, warmup_steps))


@rule
def simple_average(mean, var, window_var, window_full, step, window, warmup_steps):
    """The average of the last second moments."""
    own = is_warming(step, window, warmup_steps)
    return chosen(mean, average_of(var, window_var, window_full, own), own=own)


@rule
def simple_average_centered(
    mean, var, window_mean, window_var, window_full, step, window, warmup_steps
):
    """The averages of the last means and variances."""
    own = is_warming(step, window, warmup_steps)
    used_mean = average_of(mean, window_mean, window_full, own)
    return chosen(used_mean, average_of(var, window_var, window_full, own), own=own)


@rule
def renormalized(
    mean,
    var,
    running_var,
    window_var,
    window_full,
    step,
    eps,
    window,
    clip,
    warmup_steps,
    renorm_warmup_steps,
):
    """The average of the last second moments, corrected towards the running one (eq. 19)."""
    own = is_warming(step, window, warmup_steps)
    used = average_of(var, window_var, window_full, own)
    r = clamp(sqrt((used + eps) / (running_var + eps)), 1 / clip, clip)
    late = step > maximum(renorm_warmup_steps, warmup_steps)
    return chosen(mean, used, r=where(late, r, 1.0), own=own)


@rule
def renormalized_centered(
    mean,
    var,
    running_mean,
    running_var,
    window_mean,
    window_var,
    window_full,
    step,
    eps,
    window,
    clip,
    warmup_steps,
    renorm_warmup_steps,
):
    """`renormalized` with means, corrected as in batch renormalization (eq. 14)."""
    own = is_warming(step, window, warmup_steps)
    used_mean = average_of(mean, window_mean, window_full, own)
    used = average_of(var, window_var, window_full, own)
    square = running_var + eps
    r = clamp(sqrt((used + eps) / square), 1 / clip, clip)
    d = clamp((used_mean - running_mean) / sqrt(square), -clip, clip)
    late = step > maximum(renorm_warmup_steps, warmup_steps)
    return chosen(used_mean, used, r=where(late, r, 1.0), d=where(late, d, 0.0), own=own)


# --- backward ---------------------------------------------------------------------


@rule
def simple_psi(backward_average_psi):
    """The average of the last Psi (eq. 13)."""
    return backward_average_psi


@rule
def exponential_psi(psi, old_backward_average, backward_step, update_weight):
    """The exponential average of Psi, which starts with the first."""
    return lerp(psi, old_backward_average, where(backward_step > 1, 1 - update_weight, 0.0))


def _form(centered: bool, forward_stats: str, backward_stats: str) -> Method:
    """The rules and state of a form."""
    choose: Rule = {
        ("batch", False): batch_statistics,
        ("batch", True): batch_statistics,
        ("sma", False): simple_average,
        ("sma", True): simple_average_centered,
        ("ema", False): renormalized,
        ("ema", True): renormalized_centered,
    }[forward_stats, centered]
    kept: dict[str, Any] = {"step": Counter()}
    if forward_stats != "batch":
        kept["window"] = Window(("mean", "var") if centered else ("var",), "window")
    if backward_stats != "batch":
        psi = ("psi",)
        kept["backward_average"] = Row(psi) if backward_stats == "ema" else Window(psi, "window")
        kept["backward_step"] = Counter()
    average: Rule | None = {"batch": None, "sma": simple_psi, "ema": exponential_psi}[
        backward_stats
    ]
    return method_of(choose, average, State("used", **kept))


_STATS = ("ema", "sma", "batch")
_FORMS = {
    (centered, ahead, behind): _form(centered, ahead, behind)
    for centered in (False, True)
    for ahead in _STATS
    for behind in _STATS
}


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
        self.declare_state()

    @property
    def method(self) -> Method:  # type: ignore[override]
        """The form that `centered`, `forward_stats` and `backward_stats` ask for."""
        return _FORMS[self.centered, self.forward_stats, self.backward_stats]

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        if self.centered:
            return "centered=True: the kernels take the uncentred form"
        return super().method_spec(x, cut)

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
