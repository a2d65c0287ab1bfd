"""Cross-iteration batch normalization (Yao et al. 2021, cross-iteration-bn)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from anybatch.backends import is_finite, statistics_dtype
from anybatch.backends.aten.patches import ConvCall
from anybatch.backends.layout import is_dense
from anybatch.backends.protocol import BackwardMemory, CrossIterationSpec, Spec, Statistics
from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import check_between, check_choice, check_count
from anybatch.core.backward_statistics import BackwardAverage, all_finite, slide, slide_mean
from anybatch.core.fused_activation import Activation
from anybatch.core.grouping import Partition
from anybatch.core.norm_batch import Batch
from anybatch.core.norm_layer import NormOptions
from anybatch.core.reduction_scope import ReductionScope
from anybatch.layers import statistics_gradients as taylor
from anybatch.layers.bound_norm_layer import BoundBatch, BoundNormLayer, BoundState

_ENOUGH = 16  # examples for reliable statistics (cross-iteration-bn, section 4.3)
_LONGEST = 8  # the longest window that the paper found to help


class CrossIterationBatchNorm(BoundNormLayer):
    """Cross-iteration batch normalization: statistics of recent steps at today's weights.

    The layer is bound to the convolution or linear layer that feeds it. Of each of the last
    `window` - 1 steps it keeps mean and variance and their gradients with respect to the weights,
    and moves them to the weights ``w`` of this step by a Taylor polynomial::

        mean_t' = mean_t + (d mean_t / d w_t) (w - w_t) + (b - b_t)                     (eq. 7)
        nu_t'   = nu_t   + (d nu_t / d w_t) (w - w_t)         nu: mean of squares       (eq. 8)
        mean    = average of mean_t' over the window, this step included                (eq. 9)
        nu      = average of max(nu_t', mean_t'^2)                                      (eq. 10)
        y       = weight * (x - mean) / sqrt(nu - mean^2 + eps) + bias                  (eq. 11, 12)

    The averages weigh each step by its values; for batches of one size that is 1 / k each. Earlier
    steps are constants in the backward pass::

        g  = weight * dy
        dx = (g - a * mean(g) - a * z * mean(g * z)) / sqrt(var + eps)

    with ``a`` this step's share in the averages, 1 / k. With ``window=1``, and in the burn-in, the
    layer is batch normalization; the window then grows from 1 by one a step.

    Args:
        momentum: Weight of the newest batch in the running statistics (default 0.1); None for the
            average over all batches.
        track_running_stats: Keep running statistics for inference (default True).
        window: Steps k in the averages, this one included (default None: min(ceil(16 / batch
            size), 8), section 4.3).
        burn_in_steps: Steps before the window is used (default 0).
        burn_in: Part of all epochs before the window is used, where `anybatch.NormScheduler` tells
            the epoch (default 0.25, as in the paper's experiments).
        order: Terms of the Taylor polynomial: 1 (default), 2 (section 4.4), or 0 for none, the
            paper's naive variant, which needs no `bind`.
        gradient_sample: Positions that the gradients of a step's statistics are estimated from
            (default 16); None for all, which costs one more convolution weight gradient a step.
        backward_stats: "batch" (default): the batch's own, which is the gradient above; "window":
            a = 1, and ``mean(g * z)`` is its average over the window, as moving-average-bn,
            equation 13, has it. It is not the gradient of one step's output: it is nearer to the
            one that the joined batch would have had.
        running_stats: "batch" (default): running statistics follow the batch's own, as in batch
            normalization; "window": those that the batch was normalized by.
        batch_size: Examples in a forward, for ``window=None`` (default None: read from the first
            batch).
        norm_batch_size: Normalize in successive batches of so many examples, each a step of the
            memory.

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d. Memory a layer: see `memory_numbers`.

    Raises:
        ValueError: For an argument out of range, an input of another shape, or in training an
            input that is not what the bound layer put out.
        TypeError: For an input that is not floating point.
        RuntimeError: In training where no layer is bound, or did not run before this one.

    Source: cross-iteration-bn, section 3 and appendices A and B.

    Example:
        >>> import torch, anybatch
        >>> conv = torch.nn.Conv2d(3, 8, 3)
        >>> norm = anybatch.CrossIterationBatchNorm2d(8, window=4).bind(conv)
        >>> norm(conv(torch.randn(2, 3, 7, 7))).shape
        torch.Size([2, 8, 5, 5])
    """

    per_step_state = (
        "mean",
        "var",
        "values",
        "mean_base",
        "var_base",
        "mean_gradient",
        "var_gradient",
        "weight_rows",
        "patch_covariance",
    )

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        window: int | None = None,
        burn_in_steps: int = 0,
        burn_in: float = 0.25,
        order: int = 1,
        gradient_sample: int | None = 16,
        backward_stats: str = "batch",
        running_stats: str = "batch",
        batch_size: int | None = None,
        **common: Unpack[NormOptions],
    ) -> None:
        counts = {"window": window, "gradient_sample": gradient_sample, "batch_size": batch_size}
        counts["burn_in_steps"] = burn_in_steps or None
        for name, count in counts.items():
            if count is not None:
                check_count(name, count)
        check_between("burn_in", burn_in, 0.0, 1.0)
        check_choice("backward_stats", backward_stats, ("batch", "window"))
        check_choice("running_stats", running_stats, ("batch", "window"))
        if isinstance(order, bool) or order not in (0, 1, 2):
            raise ValueError(f"order={order!r}: give 0, 1 or 2")
        shared = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*shared, **common)
        self.window, self.order, self.gradient_sample = window, order, gradient_sample
        self.burn_in_steps, self.burn_in = burn_in_steps, float(burn_in)
        self.backward_stats, self.running_stats = backward_stats, running_stats
        self.batch_size = batch_size
        self.burning = False
        self._flow = BoundState()
        for name in ("step", "position", "entries", "burning"):
            self.method_state[name] = self.new_counter()
        if window is None and batch_size is not None:
            self.window = recommended_window(batch_size)
        self.open_memory()

    def open_memory(self) -> None:
        """One slot a step of the window, the newest one's included."""
        if self.window == 1 or (self.order and self.geometry is None):
            return
        # Before the first batch tells the window it has no slots: the state's names are there.
        slots, channels = self.window or 0, self.num_features
        shapes: dict[str, tuple[int, ...]] = {"mean": (channels,), "var": (channels,), "values": ()}
        if self.order and self.geometry is not None:
            groups, fan_in = self.geometry.groups, self.geometry.fan_in
            shapes["mean_base"] = shapes["var_base"] = (channels,)
            shapes["mean_gradient"], shapes["var_gradient"] = (groups, fan_in), (channels, fan_in)
            if self.order == 2:
                shapes["weight_rows"] = (channels, fan_in)
                shapes["patch_covariance"] = (groups, fan_in, fan_in)
        for name, shape in shapes.items():
            self.method_state[name] = self.new_state(slots, *shape)
        self._flow = BoundState()
        if self.backward_stats == "window":
            self.method_state["backward_window"] = self.new_state(slots, channels)
            self.method_state["backward_step"] = self.new_counter()
        if self.step is not None:  # it has a place for all that there is
            self.accumulate(self.step.steps, self.step.counts)

    @property
    def memory_numbers(self) -> int:
        """Numbers that the window holds; ``window * (4 C + 1 + (C + groups) fan_in)`` in order 1.

        The paper counts ``2 (window - 1) (C + C fan_in)``: it keeps the weights too, which here are
        one number per channel, their product with the gradient.
        """
        state = self.method_state
        return sum(state[name].numel() for name in self.per_step_state if name in state)

    def reset_memory(self) -> None:
        super().reset_memory()
        if self.method_state:
            self.method_state["burning"].fill_(self.burning)

    def set_progress(self, epoch: int, total_epochs: int) -> None:
        """Use the window from the first epoch after the burn-in on.

        Args:
            epoch: From 1 on.
            total_epochs: T; the burn-in is the first ``burn_in * T`` epochs.
        """
        check_count("epoch", epoch)
        check_count("total_epochs", total_epochs)
        self.burning = epoch <= round(self.burn_in * total_epochs)
        self.method_state["burning"].fill_(self.burning)

    def follows(self) -> bool:
        return super().follows() and self.window != 1 and bool(self.order) and not self.burning

    def _lacks_values(self, cut: Partition, values: int) -> bool:
        """With a window, earlier steps give one value statistics."""
        return (self.window == 1 or self.burning) and super()._lacks_values(cut, values)

    def _enough(self, counts: Tensor) -> Tensor:
        return super()._enough(counts) if self._flow.batch is None else counts > 0

    def _normalize_batch(
        self,
        x: Tensor,
        training: bool,
        source: ReductionScope | None = None,
        then: Activation | None = None,
    ) -> Tensor:
        if training:
            self.open_state(x)
        if training and self.window != 1 and not self.burning:
            feed = self.take_feed(x) if self.order and not in_backward() else None
            self._flow.batch = BoundBatch(feed, x.detach(), 0, source)
        try:
            return super()._normalize_batch(x, training, source, then)
        finally:
            self._flow.batch = self._flow.feed = None

    def open_state(self, x: Tensor) -> None:
        """Choose the window by the first batch, and make its slots."""
        if self.window is not None and len(self.method_state.get("mean", (1,))):
            return
        feed = self._flow.feed
        if self.window is None:
            examples = min(x.shape[0], self.norm_batch_size or x.shape[0])
            self.window = recommended_window(self.examples_of_all(examples))
        if self.window > 1:
            self.open_memory()
        self._flow.feed = feed

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        assert mean is not None
        some = batch.seen is not None or batch.counts is not None
        tracks = update and (some or not batch.is_one_value())
        if self._flow.batch is None or self.burning:
            if tracks:
                self.track(mean, batch.unbiased(var))
            if update:
                self.method_state["step"].add_(1)
            return Statistics(mean, var)
        feed, y, first, source = self._flow.batch
        self._flow.batch = BoundBatch(feed, y, first + batch.examples(), source)
        chosen, total = self._average(mean, var, batch, feed)
        if tracks and self.running_stats == "window":
            self.track(chosen.mean, chosen.var * (total / (total - 1).clamp(min=1)))
        elif tracks:
            self.track(mean, batch.unbiased(var))
        if update:
            examples = slice(first, first + batch.examples())
            feed = feed and feed.at(examples)
            source = source and source.at(examples)
            self._record(mean, var, batch, feed, y[examples], source)
        return chosen

    def _average(
        self, mean: Tensor, var: Tensor, batch: Batch, feed: ConvCall | None
    ) -> tuple[Statistics, Tensor]:
        """Equations 9 to 11, in means and variances; and the number of values behind them."""
        state = self.method_state
        slots = {n: state[n].to(var.dtype) for n in self.per_step_state if n in state}
        means, variances = taylor.compensated(slots, feed, self.order)
        place = torch.arange(means.shape[0], device=var.device)
        age = (self.method_state["position"] - place).remainder(means.shape[0])
        used = (age > 0) & (age <= self.method_state["entries"])
        weights = torch.where(used, self.method_state["values"], 0).to(var.dtype)
        own = batch.seen.total if batch.seen is not None else batch.number()
        total = weights.sum() + own
        weights, batch_weight = (weights / total).unsqueeze(1), own / total
        means = torch.where(used.unsqueeze(1), means, 0)
        pooled = torch.addcmul((means * weights).sum(0), mean, batch_weight)
        spread = (variances + (means - pooled).square()).mul_(weights).sum(0)
        spread = torch.addcmul(spread, var + (mean - pooled).square(), batch_weight)
        chosen = Statistics(pooled, spread, batch_weight=batch_weight)
        if self.backward_stats == "window":
            chosen = chosen.weighted(1.0)
        if batch.counts is not None or batch.is_one_value():
            fallback = self._fallback(chosen.var.dtype)
            chosen = chosen.where(total > 1, *fallback, batch_weight=0.0)
        return chosen, total

    steady = False  # it is the bound layer's forward that tells

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        at, method_state = self._flow.batch, self.method_state
        if at is not None and at.feed is None and self.order:
            return "the layer that feeds this one has not run"
        if at is not None and at.feed is not None:
            if self.order != 1:
                return f"order={self.order}: the kernels take the first order, or none"
            fed, rows = at.feed.x, at.feed.rows
            if not is_dense(fed):
                return "the bound layer's input has gaps in memory"
            if len({statistics_dtype(one) for one in (fed, rows, x)}) > 1:
                return f"the bound layer has an input of {fed.dtype} and weights of {rows.dtype}"
        return CrossIterationSpec(
            at is not None,
            method_state,
            self.per_step_state[:7] if self.order else self.per_step_state[:3],
            self._flow,
            self.gradient_sample,
            self.running_stats == "window",
            None if self.burning else method_state.get("backward_window"),
            self.burn_in_steps,
        )

    def _kernel_state(self, x: Tensor) -> tuple[Any, ...]:
        state = super()._kernel_state(x)
        at = self._flow.batch
        # The list takes what kernels make of the feed.
        return state if at is None else (*state, (at.feed, x.detach(), []))

    def backward_memory(self, statistics: Statistics, update: bool) -> BackwardMemory | None:
        if "backward_window" not in self.method_state or self.window == 1 or self.burning:
            return None
        average = BackwardAverage(self, None, None, update)
        return lambda g, psi: (g, average(None, psi)[1])

    def average_backward(self, new: Tensor, enough: Tensor | None, update: bool) -> Tensor:
        """Take a step's ``mean(g * z)``, give its average over the window."""
        window, count = self.method_state["backward_window"], self.method_state["backward_step"]
        finite = all_finite(new, self.num_features)
        average = slide_mean(window.to(new.dtype), count, new, finite, False)
        if update:
            slide(window, new.to(window.dtype), finite, True)
            count.add_(1)
        return average

    def _record(
        self,
        mean: Tensor,
        var: Tensor,
        batch: Batch,
        feed: ConvCall | None,
        y: Tensor,
        source: ReductionScope | None = None,
    ) -> None:
        """Write this step into its slot, unless it is not finite or still burn-in."""
        assert self.window is not None
        method_state, place = self.method_state, self.method_state["position"].view(1)
        values = batch.number()
        if not isinstance(values, Tensor):
            values = mean.new_tensor(float(values))
        new = {"mean": mean, "var": var, "values": values}
        if batch.seen is not None:
            new["values"] = batch.seen.total
        if feed is not None:
            own = mean if batch.seen is None else batch.seen.own_mean
            assert own is not None
            sample, start = self.gradient_sample, method_state["step"] * (self.gradient_sample or 1)
            how = taylor.StatisticsGradients(self.order, sample, start)
            if source is None:
                new.update(how.of_batch(feed, y, own))
            else:
                new.update(how.of_source(feed, y, own, source))
            if batch.seen is not None:
                slot = ((n, method_state[n].index_select(0, place).squeeze(0)) for n in new)
                taylor.pool_gradients(new, {n: old.to(var.dtype) for n, old in slot}, batch.seen)
            taylor.settle(new, feed, self.order)
        finite = is_finite(new["var_base" if feed is not None else "var"].abs()).all()
        finite = finite & is_finite(new["var"]).all()
        for name, tensor in new.items():
            ring = method_state[name]
            old = ring.index_select(0, place)
            ring.index_copy_(0, place, torch.where(finite, tensor.to(ring.dtype), old))
        method_state["step"].add_(1)
        kept = finite if batch.seen is None else finite | (batch.seen.share < 1)
        kept = kept & (method_state["step"] > self.burn_in_steps)
        method_state["position"].add_(kept).remainder_(self.window)
        method_state["entries"].add_(kept).clamp_(max=self.window - 1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        mean = state_dict.get(prefix + "mean")
        if isinstance(mean, Tensor) and len(mean) and self.window is None:
            self.window = mean.shape[0]
            self.open_memory()
        elif isinstance(mean, Tensor) and not len(mean) and "mean" in self.method_state:
            rings = {name: ring for name, ring in self.method_state.items() if ring.dim()}
            empty = {prefix + name: torch.zeros_like(ring) for name, ring in rings.items()}
            state_dict = {**state_dict, **empty}  # of a network that has seen no batch yet
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._flow = BoundState()
        if not self.method_state["burning"].is_meta:
            self.burning = bool(self.method_state["burning"])
            self._check_counters()

    def _check_counters(self) -> None:
        """Empty the window where a checkpoint's counters do not fit it."""
        slots = self.window or 1
        position, entries = (int(self.method_state[name]) for name in ("position", "entries"))
        if not (0 <= position < slots and 0 <= entries <= slots):
            self.method_state["position"].zero_()
            self.method_state["entries"].zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_flow": BoundState()}

    def own_arguments(self) -> Mapping[str, Any]:
        names = ["window", "burn_in_steps", "burn_in", "order"]
        names += ["gradient_sample", "backward_stats", "running_stats"]
        bound = {} if self.geometry is not None or not self.order else {"bound": False}
        return {**{name: getattr(self, name) for name in names}, **bound}


def recommended_window(batch_size: int) -> int:
    """The window for a batch size (cross-iteration-bn, section 4.3).

    >>> [recommended_window(n) for n in (1, 2, 4, 5, 16, 32)]
    [8, 8, 4, 4, 1, 1]
    """
    return min(-(-_ENOUGH // batch_size), _LONGEST)


class CrossIterationBatchNorm1d(CrossIterationBatchNorm, dims=1): ...


class CrossIterationBatchNorm2d(CrossIterationBatchNorm, dims=2): ...


class CrossIterationBatchNorm3d(CrossIterationBatchNorm, dims=3): ...
