# mypy: disable-error-code="no-untyped-def"
"""Moving average batch normalization (Yan et al. 2020, moving-average-bn)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from anybatch.backends.protocol import Spec
from anybatch.core.arguments import check_choice, check_count
from anybatch.core.grouping import Partition
from anybatch.core.norm_layer import NormOptions
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
from anybatch.layers.uncentered_norm_layer import UncenteredNormLayer

# --- forward ----------------------------------------------------------------------


@rule
def is_warming(step, window, warmup_steps):
    """True while it is too early for averages."""
    return step < maximum(window + 1, warmup_steps)


@rule
def is_late(step, warmup_steps, renorm_warmup_steps):
    """True once the output is renormalized."""
    return step > maximum(renorm_warmup_steps, warmup_steps)


@rule
def average_of(new, average, full, warming):
    """The average of a window; the batch's own value as long as there is none."""
    return where(warming, new, where(full, average, new))


@rule
def factor(inner_var, var, eps, clip, late):
    """r, which makes of a value normalized by one variance that of another (eq. 19)."""
    return where(late, clamp(sqrt((inner_var + eps) / (var + eps)), 1 / clip, clip), 1.0)


@rule
def shift(inner_mean, mean, var, eps, clip, late):
    """d, the same of means (eq. 14)."""
    return where(late, clamp((inner_mean - mean) / sqrt(var + eps), -clip, clip), 0.0)


# Names: what normalizes, which the backward pass follows, then what the output is renormalized to.


@rule
def by_batch(mean, var):
    """The batch's own statistics."""
    return chosen(mean, var)


@rule
def by_batch_to_running(mean, var, running_var, step, eps, clip, warmup_steps, renorm_warmup_steps):
    """The batch's own second moment, and r towards the running one."""
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    return chosen(mean, var, r=factor(var, running_var, eps, clip, late))


@rule
def by_batch_to_running_centered(
    mean, var, running_mean, running_var, step, eps, clip, warmup_steps, renorm_warmup_steps
):
    """The batch's own mean and variance, r and d towards the running ones."""
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    r = factor(var, running_var, eps, clip, late)
    return chosen(mean, var, r=r, d=shift(mean, running_mean, running_var, eps, clip, late))


@rule
def by_batch_to_average(
    mean, var, window_var, window_full, step, eps, window, clip, warmup_steps, renorm_warmup_steps
):
    """The batch's own second moment, and r towards the average of the last ones."""
    target = average_of(var, window_var, window_full, is_warming(step, window, warmup_steps))
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    return chosen(mean, var, r=factor(var, target, eps, clip, late))


@rule
def by_batch_to_average_centered(
    mean,
    var,
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
    """The batch's own mean and variance, r and d towards the averages of the last ones."""
    warming = is_warming(step, window, warmup_steps)
    target_mean = average_of(mean, window_mean, window_full, warming)
    target = average_of(var, window_var, window_full, warming)
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    r = factor(var, target, eps, clip, late)
    return chosen(mean, var, r=r, d=shift(mean, target_mean, target, eps, clip, late))


@rule
def by_average(mean, var, window_var, window_full, step, window, warmup_steps):
    """The average of the last second moments."""
    warming = is_warming(step, window, warmup_steps)
    return chosen(mean, average_of(var, window_var, window_full, warming), use_batch_stats=warming)


@rule
def by_average_centered(
    mean, var, window_mean, window_var, window_full, step, window, warmup_steps
):
    """The averages of the last means and variances."""
    warming = is_warming(step, window, warmup_steps)
    applied_mean = average_of(mean, window_mean, window_full, warming)
    return chosen(
        applied_mean, average_of(var, window_var, window_full, warming), use_batch_stats=warming
    )


@rule
def by_average_to_batch(
    mean, var, window_var, window_full, step, eps, window, clip, warmup_steps, renorm_warmup_steps
):
    """The average of the last second moments, and r towards the batch's own."""
    warming = is_warming(step, window, warmup_steps)
    applied = average_of(var, window_var, window_full, warming)
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    return chosen(mean, applied, r=factor(applied, var, eps, clip, late), use_batch_stats=warming)


@rule
def by_average_to_batch_centered(
    mean,
    var,
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
    """The averages of the last means and variances, r and d towards the batch's own."""
    warming = is_warming(step, window, warmup_steps)
    applied_mean = average_of(mean, window_mean, window_full, warming)
    applied = average_of(var, window_var, window_full, warming)
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    r, d = factor(applied, var, eps, clip, late), shift(applied_mean, mean, var, eps, clip, late)
    return chosen(applied_mean, applied, r=r, d=d, use_batch_stats=warming)


@rule
def by_average_to_running(
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
    """The average of the last second moments, and r towards the running one (eq. 19)."""
    warming = is_warming(step, window, warmup_steps)
    applied = average_of(var, window_var, window_full, warming)
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    return chosen(
        mean, applied, r=factor(applied, running_var, eps, clip, late), use_batch_stats=warming
    )


@rule
def by_average_to_running_centered(
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
    """The averages of the last means and variances, r and d towards the running ones (eq. 14)."""
    warming = is_warming(step, window, warmup_steps)
    applied_mean = average_of(mean, window_mean, window_full, warming)
    applied = average_of(var, window_var, window_full, warming)
    late = is_late(step, warmup_steps, renorm_warmup_steps)
    r = factor(applied, running_var, eps, clip, late)
    d = shift(applied_mean, running_mean, running_var, eps, clip, late)
    return chosen(applied_mean, applied, r=r, d=d, use_batch_stats=warming)


# --- backward ---------------------------------------------------------------------


@rule
def simple_psi(backward_average_psi):
    """The average of the last Psi (eq. 13)."""
    return backward_average_psi


@rule
def exponential_psi(psi, old_backward_average, backward_step, update_weight):
    """The exponential average of Psi, which starts with the first."""
    return lerp(psi, old_backward_average, where(backward_step > 1, 1 - update_weight, 0.0))


# By what normalizes and what the output is renormalized to: uncentered, centered.
_RULES: dict[tuple[str, str], tuple[Rule, Rule]] = {
    ("batch", "batch"): (by_batch, by_batch),
    ("batch", "sma"): (by_batch_to_average, by_batch_to_average_centered),
    ("batch", "ema"): (by_batch_to_running, by_batch_to_running_centered),
    ("sma", "batch"): (by_average_to_batch, by_average_to_batch_centered),
    ("sma", "sma"): (by_average, by_average_centered),
    ("sma", "ema"): (by_average_to_running, by_average_to_running_centered),
}


def _form(centered: bool, forward_stats: str, backward_stats: str) -> Method:
    """The rules and state of a form."""
    inner = "batch" if backward_stats == "batch" else "sma"
    kept: dict[str, Any] = {"step": Counter()}
    if "sma" in (inner, forward_stats):
        kept["window"] = Window(("mean", "var") if centered else ("var",), "window")
    if backward_stats != "batch":
        psi = ("psi",)
        kept["backward_average"] = Row(psi) if backward_stats == "ema" else Window(psi, "window")
        kept["backward_step"] = Counter()
    average: Rule | None = {"batch": None, "sma": simple_psi, "ema": exponential_psi}[
        backward_stats
    ]
    return method_of(_RULES[inner, forward_stats][centered], average, State("applied", **kept))


_STATS = ("ema", "sma", "batch")
_FORMS = {
    (centered, ahead, behind): _form(centered, ahead, behind)
    for centered in (False, True)
    for ahead in _STATS
    for behind in _STATS
}


class MovingAverageBatchNorm(UncenteredNormLayer):
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

    The paper's ablations replace averages by the batch's own statistics. z then follows
    the backward pass, and r leads to the forward one, as in batch renormalization: with
    ``x2_b`` the window's average if `backward_stats` is an average and the batch's own
    if it is "batch", and ``x2_f`` the statistic of `forward_stats`::

        z   = x / sqrt(x2_b + eps),   r = clip(sqrt(x2_b + eps) / sqrt(x2_f + eps))
        dx  = (g - z * Psi) / sqrt(x2_b + eps)

    so that dx is the gradient of a normalization by ``x2_b``, scaled by the constant r.
    With "batch" twice it is the exact gradient of the output. The running statistics
    average ``x2_b``, in the centered form biased variances.

    Args:
        eps: Added to the second moment (default 1e-5).
        momentum: Weight of the newest step in ``x2_hat`` (default 0.02).
        track_running_stats: Must be True.
        window: Steps in the simple averages (default 16).
        clip: Limit of r, from 1 on (default 5.0).
        warmup_steps: Steps before any average is used (default 100).
        renorm_warmup_steps: Steps before r is used (default 1000).
        centered: Use mean and variance, four batch statistics, in place of the
            second moment (default False; the paper's "vanilla" form).
        forward_stats: Statistic that the output is normalized by: "ema" ``x2_hat``
            (default); "sma" the window's average; "batch" the batch's own.
        backward_stats: Statistic that the backward pass uses in place of ``Psi``: "sma"
            the average of the last `window` steps (default); "ema" an exponential
            average; "batch" the batch's own. See below.
        norm_batch_size: Normalize in successive batches of so many examples, each
            a step of the memory.

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
        window: int = 16,
        clip: float = 5.0,
        warmup_steps: int = 100,
        renorm_warmup_steps: int = 1000,
        centered: bool = False,
        forward_stats: str = "ema",
        backward_stats: str = "sma",
        **common: Unpack[NormOptions],
    ) -> None:
        check_count("window", window)
        if not clip >= 1:
            raise ValueError(f"clip={clip!r}: give a number from 1 on")
        check_count("warmup_steps", warmup_steps, 0)
        check_count("renorm_warmup_steps", renorm_warmup_steps, 0)
        for name, choice in (("forward", forward_stats), ("backward", backward_stats)):
            check_choice(f"{name}_stats", choice, ("ema", "sma", "batch"))
        shared = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*shared, **common)
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

    def own_arguments(self) -> Mapping[str, Any]:
        names = ("window", "clip", "warmup_steps", "renorm_warmup_steps")
        ablations = {"centered": False, "forward_stats": "ema", "backward_stats": "sma"}
        changed = [name for name, value in ablations.items() if getattr(self, name) != value]
        return {name: getattr(self, name) for name in (*names, *changed)}


class MovingAverageBatchNorm1d(MovingAverageBatchNorm, dims=1): ...


class MovingAverageBatchNorm2d(MovingAverageBatchNorm, dims=2): ...


class MovingAverageBatchNorm3d(MovingAverageBatchNorm, dims=3): ...
