"""Cross-iteration batch normalization (Yao et al. 2021, cross-iteration-bn)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from anybatch.backends import is_finite, is_traced
from anybatch.backends.aten import patches
from anybatch.backends.aten.patches import ConvCall, Geometry
from anybatch.backends.protocol import BackwardMemory, CrossIterationSpec, Spec, Statistics
from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import check_between, check_choice, check_count
from anybatch.core.backward_statistics import BackwardAverage, all_finite, slide, slide_mean
from anybatch.core.fused_activation import Activation
from anybatch.core.gradient_accumulation import Seen
from anybatch.core.grouping import Partition
from anybatch.core.norm_batch import Batch
from anybatch.core.norm_layer import NormLayer
from anybatch.core.reduction_scope import Source
from anybatch.core.tensor_subclasses import as_plain
from anybatch.layers.weight_centralization import centralized_weight, is_centralized

_ENOUGH = 16  # examples for reliable statistics (cross-iteration-bn, section 4.3)
_LONGEST = 8  # the longest window that the paper found to help


class _Batch(NamedTuple):
    """The normalization batch that a rule is at: its feed, its examples of input and output."""

    feed: ConvCall | None
    y: Tensor
    first: int
    source: Source | None = None


class _Flow:
    """What passes from the bound layer's forward to this one's; nothing of it lasts.

    Attributes:
        feed: Of the bound layer's latest forward.
        weight: That a parametrization has just made.
        batch: That the rule is at.
        key: Shapes that `tables` belong to.
        tables: Of the geometry, as arrays of the compiled kernels.
        memory: The layer's memory that `arrays` belong to.
        arrays: Rings and counters as arrays of the same storage.
    """

    def __init__(self) -> None:
        self.feed: ConvCall | None = None
        self.weight: Tensor | None = None
        self.batch: _Batch | None = None
        self.key: Any = None
        self.tables: Any = None
        self.memory: Any = None
        self.arrays: Any = None


class _CrossIterationBatchNorm(NormLayer):
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
        num_features: Channels C.
        eps: Added to the variance (default 1e-5).
        momentum: Weight of the newest batch in the running statistics (default 0.1); None for the
            average over all batches.
        affine: Learn weight and bias (default True).
        bias: Learn the shift, where affine is true (default True).
        track_running_stats: Keep running statistics for inference (default True).
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
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
        example_weight: Share of an example's own statistics at inference.
        process_group: Processes whose batches are one in training, a process group or "world"
            (default None: this process alone).
        outlier_limit: Times its running variance that a channel of a batch may have and enter
            memory (default None: any).

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

    rings = (
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
        bias: bool = True,
        window: int | None = None,
        burn_in_steps: int = 0,
        burn_in: float = 0.25,
        order: int = 1,
        gradient_sample: int | None = 16,
        backward_stats: str = "batch",
        running_stats: str = "batch",
        batch_size: int | None = None,
        norm_batch_size: int | None = None,
        example_weight: float = 0.0,
        process_group: Any = None,
        outlier_limit: float | None = None,
    ) -> None:
        for name, count in (
            ("window", window),
            ("gradient_sample", gradient_sample),
            ("batch_size", batch_size),
        ):
            if count is not None:
                check_count(name, count)
        if burn_in_steps != 0:
            check_count("burn_in_steps", burn_in_steps)
        check_between("burn_in", burn_in, 0.0, 1.0)
        check_choice("backward_stats", backward_stats, ("batch", "window"))
        check_choice("running_stats", running_stats, ("batch", "window"))
        if isinstance(order, bool) or order not in (0, 1, 2):
            raise ValueError(f"order={order!r}: give 0, 1 or 2")
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
        self.window, self.order, self.gradient_sample = window, order, gradient_sample
        self.burn_in_steps, self.burn_in = burn_in_steps, float(burn_in)
        self.backward_stats, self.running_stats = backward_stats, running_stats
        self.batch_size = batch_size
        self.geometry: Geometry | None = None
        self.burning = False
        self._flow = _Flow()
        for name in ("step", "position", "entries", "burning"):
            self.memory[name] = self.new_counter()
        if window is None and batch_size is not None:
            self.window = recommended_window(batch_size)
        self._make_rings()

    def _make_rings(self) -> None:
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
            self.memory[name] = self.new_memory(slots, *shape)
        self._flow = _Flow()
        if self.backward_stats == "window":
            self.memory["backward_window"] = self.new_memory(slots, channels)
            self.memory["backward_step"] = self.new_counter()
        if self.step is not None:  # it has a place for all that there is
            self.accumulate(self.step.steps, self.step.counts)

    @property
    def memory_numbers(self) -> int:
        """Numbers that the window holds.

        With fan_in = C_in / groups x K: ``window * (4 C + 1 + groups * fan_in + C * fan_in)`` in
        the first order. (The paper counts ``2 (window - 1) (C + C * fan_in)``: it keeps the
        weights too, which here are one number a channel, their product with the gradient.)
        """
        return sum(self.memory[name].numel() for name in self.rings if name in self.memory)

    def reset_memory(self) -> None:
        for tensor in self.memory.values():
            tensor.zero_()
        if self.memory:
            self.memory["burning"].fill_(self.burning)

    def set_progress(self, epoch: int, total_epochs: int) -> None:
        """Use the window from the first epoch after the burn-in on.

        Args:
            epoch: From 1 on.
            total_epochs: T; the burn-in is the first ``burn_in * T`` epochs.
        """
        check_count("epoch", epoch)
        check_count("total_epochs", total_epochs)
        self.burning = epoch <= round(self.burn_in * total_epochs)
        self.memory["burning"].fill_(self.burning)

    # --- the layer that feeds this one ----------------------------------------

    def bind(self, module: nn.Module) -> "_CrossIterationBatchNorm":
        """Follow the convolution or linear layer whose output this layer normalizes.

        The weights that it *uses* count: centralized ones, and those of a parametrization or a
        weight norm.

        Args:
            module: ``Conv1d`` to ``3d``, ``ConvTranspose1d`` to ``3d`` or ``Linear``.

        Returns:
            This layer.

        Raises:
            TypeError: For another layer.
            ValueError: If it puts out another number of channels, or one is bound already.
        """
        if not isinstance(module, (_ConvNd, nn.Linear)):
            raise TypeError(
                f"module={type(module).__name__}: give a convolution, a transposed convolution or "
                "a linear layer"
            )
        geometry = patches.geometry_of(module)
        if geometry.outputs != self.num_features:
            raise ValueError(
                f"module={module}: it puts out {geometry.outputs} channels, this layer normalizes "
                f"{self.num_features}"
            )
        if self.geometry is not None:
            raise ValueError("a layer is bound already: unbind it first")
        if geometry.inputs < 1 or isinstance(
            module._parameters.get("weight"), nn.UninitializedParameter
        ):
            raise ValueError(
                f"module={module}: its number of inputs is not known yet; run one batch through "
                "the network first"
            )
        self.geometry = geometry
        module.register_forward_hook(self._note, with_kwargs=True)
        if parametrize.is_parametrized(module, "weight"):  # reading the weight may change it
            module.parametrizations["weight"].register_forward_hook(self._note_weight)  # type: ignore[index,union-attr]
        self._make_rings()
        return self

    def unbind(self, module: nn.Module) -> None:
        """Undo `bind`; the window is dropped."""
        release(module, self)
        self.geometry = None
        for name in self.rings:
            self.memory.pop(name, None)
        self._flow = _Flow()
        self.reset_memory()

    def _note(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """After the bound layer's forward: keep what the next forward of this layer needs."""
        weight, self._flow.weight = self._flow.weight, None
        if not self.training or self.frozen or self.window == 1 or not self.order or self.burning:
            return
        if in_backward():  # a recomputed forward finds its statistics
            return
        assert self.geometry is not None
        x = as_plain(args[0] if args else kwargs["input"])
        weight = as_plain(_weight_of(module) if weight is None else weight)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        rows = self.geometry.rows(weight.detach())
        bias = None if bias is None else as_plain(bias).detach()
        self._flow.feed = ConvCall(self.geometry, x.detach(), rows, bias, as_plain(output).detach())

    def _note_weight(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After a parametrization's forward: the weight it made."""
        self._flow.weight = as_plain(output).detach()

    def _take_feed(self, y: Tensor) -> ConvCall | None:
        """What the bound layer did to make ``y``."""
        feed, self._flow.feed = self._flow.feed, None
        if not self.order:
            return None
        if self.geometry is None:
            raise RuntimeError(
                f"{type(self).__name__} is bound to no layer: call .bind(conv) with the layer that "
                'feeds it, or use anybatch.convert(model, "cbn"), or order=0'
            )
        if feed is None:
            raise RuntimeError(
                f"{type(self).__name__}: the layer it is bound to has not run in training mode "
                "since this layer's last forward; both must run in turn"
            )
        if not is_traced() and feed.rows.untyped_storage().size() < feed.rows.nbytes:
            raise RuntimeError(
                f"{type(self).__name__}: the weight of the layer it is bound to has been given "
                "back before this forward; shard the block that holds both (fully_shard(block)), "
                "not each layer by itself"
            )
        dims = len(feed.geometry.kernel)
        itself = is_traced() or y.data_ptr() == feed.output.data_ptr()  # tracers have no pointers
        if y.shape != feed.output.shape or y.dim() != max(2 + dims, 2) or not itself:
            raise ValueError(
                f"input of shape {tuple(y.shape)}: {type(self).__name__} is bound to a layer whose "
                f"output has the shape {tuple(feed.output.shape)}; it must normalize that layer's "
                "latest output, itself and unchanged"
            )
        return feed

    # --- forward -----------------------------------------------------------

    def _lacks_values(self, cut: Partition, values: int) -> bool:
        """With a window, earlier steps give one value statistics."""
        return (self.window == 1 or self.burning) and super()._lacks_values(cut, values)

    def _enough(self, counts: Tensor) -> Tensor:
        return super()._enough(counts) if self._flow.batch is None else counts > 0

    def _normalize_batch(
        self,
        x: Tensor,
        training: bool,
        source: Source | None = None,
        then: Activation | None = None,
    ) -> Tensor:
        if training and self.window is None:
            examples = min(x.shape[0], self.norm_batch_size or x.shape[0])
            self._open_window(self.examples_of_all(examples))
        if training and self.window != 1 and not self.burning:
            feed = None if in_backward() else self._take_feed(x)
            self._flow.batch = _Batch(feed, x.detach(), 0, source)
        try:
            return super()._normalize_batch(x, training, source, then)
        finally:
            self._flow.batch = self._flow.feed = None

    def _open_window(self, examples: int) -> None:
        """Choose the window by the first batch."""
        feed = self._flow.feed
        self.window = recommended_window(examples)
        if self.window > 1:
            self._make_rings()
        self._flow.feed = feed

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        assert mean is not None
        some = batch.seen is not None or batch.counts is not None
        tracks = update and (some or not batch.is_one_value())
        if self._flow.batch is None or self.burning:
            if tracks:
                self.track(mean, batch.unbiased(var))
            if update:
                self.memory["step"].add_(1)
            return Statistics(mean, var)
        feed, y, first, source = self._flow.batch
        self._flow.batch = _Batch(feed, y, first + batch.examples(), source)
        chosen, total = self._average(mean, var, batch, feed)
        if tracks and self.running_stats == "window":
            self.track(chosen.mean, chosen.var * (total / (total - 1).clamp(min=1)))
        elif tracks:
            self.track(mean, batch.unbiased(var))
        if update:
            examples = slice(first, first + batch.examples())
            if feed is not None:
                feed = ConvCall(feed.geometry, feed.x[examples], feed.rows, feed.bias, feed.output)
            if source is not None and source.mask is not None:
                source = Source(source.mask[examples], source.group, source.name)
            self._record(mean, var, batch, feed, y[examples], source)
        return chosen

    def _average(
        self, mean: Tensor, var: Tensor, batch: Batch, feed: ConvCall | None
    ) -> tuple[Statistics, Tensor]:
        """Equations 9 to 11, in means and variances; and the number of values behind them."""
        means, variances = self._compensated(feed, var.dtype)
        slots = means.shape[0]
        age = (self.memory["position"] - _range(slots, var)).remainder(slots)
        used = (age > 0) & (age <= self.memory["entries"])
        weights = torch.where(used, self.memory["values"], 0).to(var.dtype)
        own = batch.seen.total if batch.seen is not None else batch.number()
        total = weights.sum() + own
        weights, share = (weights / total).unsqueeze(1), own / total
        means = torch.where(used.unsqueeze(1), means, 0)
        pooled = torch.addcmul((means * weights).sum(0), mean, share)
        spread = (variances + (means - pooled).square()).mul_(weights).sum(0)
        spread = torch.addcmul(spread, var + (mean - pooled).square(), share)
        chosen = Statistics(pooled, spread, share=share)
        if self.backward_stats == "window":
            chosen = chosen.shared(1.0)
        if batch.counts is not None or batch.is_one_value():
            chosen = self._with_fallback(total > 1, chosen, self._fallback(chosen.var.dtype))
        return chosen, total

    def _compensated(self, feed: ConvCall | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Means and variances of all slots at today's weights (equations 7, 8 and 10).

        In variances equations 8 and 10 are ``max(var + (d var / d w) dw - ((d mean / d w) dw)^2,
        0)``. The gradients' products with the weights of their step are kept, not the weights:
        ``(d var / d w) (w - w_t) = (d var / d w) w - var_base``. A bias moves the mean by itself.
        """
        slot = {name: self.memory[name].to(dtype) for name in self.rings if name in self.memory}
        means, variances = slot["mean"], slot["var"]
        if feed is None:
            return means, variances
        rows = feed.rows.to(dtype)
        grouped = rows.view(feed.geometry.groups, -1, feed.geometry.fan_in)
        moved = (slot["mean_gradient"].unsqueeze(2) * grouped).sum(-1).flatten(1)
        shift = moved - slot["mean_base"]
        change = (slot["var_gradient"] * rows).sum(-1) - slot["var_base"]
        if self.order == 1:
            change = change - shift.square()
        else:
            apart = (rows - slot["weight_rows"]).unflatten(1, grouped.shape[:2])
            curved = torch.matmul(apart, slot["patch_covariance"])
            change = change + (curved * apart).sum(-1).flatten(1)
        means = means + shift
        if feed.bias is not None:
            means = means + feed.bias
        return means, (variances + change).clamp_(min=0)

    # --- in one compiled call ------------------------------------------------

    steady = False  # it is the bound layer's forward that tells

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        at, memory = self._flow.batch, self.memory
        if at is not None and at.feed is None and self.order:
            return "the layer that feeds this one has not run"
        if at is not None and at.feed is not None:
            if self.order != 1:
                return f"order={self.order}: the kernels take the first order, or none"
            fed = at.feed.x
            if not (fed.is_contiguous() and fed.dtype == at.feed.rows.dtype == x.dtype):
                return "the bound layer's input is not contiguous, or of another type"
        return CrossIterationSpec(
            at is not None,
            memory,
            self.rings[:7] if self.order else self.rings[:3],
            self._flow,
            self.gradient_sample,
            self.running_stats == "window",
            None if self.burning else memory.get("backward_window"),
            self.burn_in_steps,
        )

    def _kernel_state(self, x: Tensor) -> tuple[Any, ...]:
        state = super()._kernel_state(x)
        return state if self._flow.batch is None else (*state, self._flow.batch.feed, x.detach())

    # --- backward -----------------------------------------------------------

    def backward_memory(self, statistics: Statistics, update: bool) -> BackwardMemory | None:
        if "backward_window" not in self.memory or self.window == 1 or self.burning:
            return None
        average = BackwardAverage(self, None, None, update)
        return lambda g, psi: (g, average(None, psi)[1])

    def average_backward(self, new: Tensor, enough: Tensor | None, update: bool) -> Tensor:
        """Take a step's ``mean(g * z)``, give its average over the window."""
        window, count = self.memory["backward_window"], self.memory["backward_step"]
        finite = all_finite(new, self.num_features)
        average = slide_mean(window.to(new.dtype), count, new, finite, False)
        if update:
            slide(window, new.to(window.dtype), finite, True)
            count.add_(1)
        return average

    # --- what is kept of a step --------------------------------------------

    def _record(
        self,
        mean: Tensor,
        var: Tensor,
        batch: Batch,
        feed: ConvCall | None,
        y: Tensor,
        source: Source | None = None,
    ) -> None:
        """Write this step into its slot, unless it is not finite or still burn-in."""
        assert self.window is not None
        memory, place = self.memory, self.memory["position"].view(1)
        values = batch.number()
        if not isinstance(values, Tensor):
            values = mean.new_tensor(float(values))
        new = {"mean": mean, "var": var, "values": values}
        if batch.seen is not None:
            new["values"] = batch.seen.total
        if feed is not None:
            own = mean if batch.seen is None else batch.seen.own_mean
            assert own is not None
            if source is None:
                new.update(self._gradients(feed, y, own))
            else:
                new.update(self._source_gradients(feed, y, own, source))
            if batch.seen is not None:
                self._pool_gradients(new, batch.seen, place)
            self._settle(new, feed)
        finite = is_finite(new["var_base" if feed is not None else "var"].abs()).all()
        finite = finite & is_finite(new["var"]).all()
        for name, tensor in new.items():
            ring = memory[name]
            old = ring.index_select(0, place)
            ring.index_copy_(0, place, torch.where(finite, tensor.to(ring.dtype), old))
        memory["step"].add_(1)
        kept = finite if batch.seen is None else finite | (batch.seen.share < 1)
        kept = kept & (memory["step"] > self.burn_in_steps)
        memory["position"].add_(kept).remainder_(self.window)
        memory["entries"].add_(kept).clamp_(max=self.window - 1)

    def _gradients(self, feed: ConvCall, y: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Gradients of a batch's own mean and variance with respect to the weights (appendix B)."""
        geometry, dtype = feed.geometry, mean.dtype
        x, y = feed.x.to(dtype), y.to(dtype)
        with torch.autocast(y.device.type, enabled=False):
            sample = self.gradient_sample
            few = sample is not None and sample < y.numel() // y.shape[1]
            if not few and self.order == 1:
                patch = patches.mean_patch(geometry, x, y)
                slope = patches.var_gradient(geometry, x, y, mean, patch)
                return {"mean_gradient": patch, "var_gradient": slope}
            points = self._points(sample, y) if few else patches.all_points(y)
            values, seen = patches.sampled_patches(geometry, x, y, points)
            patch = seen.mean(0)
            apart, seen = values - mean, (seen - patch).transpose(0, 1)  # (groups, n, fan_in)
            apart = apart.unflatten(1, (geometry.groups, -1)).permute(1, 2, 0)
            slope = torch.matmul(apart, seen).flatten(0, 1).mul_(2 / points.shape[1])
            found = {"mean_gradient": patch, "var_gradient": slope}
            if self.order == 2:
                product = torch.matmul(seen.transpose(1, 2), seen)
                found["patch_covariance"] = product.div_(points.shape[1])
            return found

    def _source_gradients(
        self, feed: ConvCall, y: Tensor, mean: Tensor, source: Source
    ) -> dict[str, Tensor]:
        """`_gradients` of the values that stand behind statistics, of all processes.

        Args:
            feed: What the bound layer did in this process.
            y: What it put out.
            mean: Of all processes' values.
            source: Which these are.
        """
        geometry, dtype = feed.geometry, mean.dtype
        x, y = feed.x.to(dtype), y.to(dtype)
        with torch.autocast(y.device.type, enabled=False):
            weight, *sums = self._gradient_sums(geometry, x, y, mean, source.mask)
            count = mean.new_tensor(float(y.numel() // y.shape[1]))
            if source.mask is not None:
                count = source.mask.sum().to(dtype)
            count = count * (weight > 0)  # a sample may have missed what is valid
            scale = count / weight.clamp(min=1)
            total, *summed = source.sum(count, *(table * scale for table in sums))
            assert total is not None
            patch, slope, apart, *square = (t / total.clamp(min=1) for t in summed if t is not None)
            apart = apart.view(geometry.groups, -1, 1) * patch.unsqueeze(1)
            found = {"mean_gradient": patch, "var_gradient": 2 * (slope - apart.flatten(0, 1))}
            if square:
                outer = patch.unsqueeze(2) * patch.unsqueeze(1)
                found["patch_covariance"] = square[0] - outer
            return found

    def _gradient_sums(
        self, geometry: Geometry, x: Tensor, y: Tensor, mean: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        """The number of valid positions, or of some of them, and sums over them.

        Of patches; of ``y - mean`` times patches; of ``y - mean``; in the second order of products
        of patches.
        """
        groups, fan_in, sample = geometry.groups, geometry.fan_in, self.gradient_sample
        if y.numel() == 0:
            shapes: list[tuple[int, ...]] = [(groups, fan_in), (y.shape[1], fan_in), (y.shape[1],)]
            shapes += [(groups, fan_in, fan_in)] if self.order == 2 else []
            return [mean.new_zeros(()), *(mean.new_zeros(shape) for shape in shapes)]
        few = sample is not None and sample < y.numel() // y.shape[1]
        offset = y - mean.view(1, -1, *(1,) * (y.dim() - 2))
        if not few and self.order == 1:
            valid = torch.ones_like(y) if mask is None else mask.to(y.dtype).expand_as(y)
            met = patches.raw_gradient(geometry, x, valid.contiguous())
            offset = offset * valid
            slope = patches.raw_gradient(geometry, x, offset)
            aside = offset.transpose(0, 1).flatten(1).sum(1)
            return [valid[:, 0].sum(), met.unflatten(0, (groups, -1))[:, 0], slope, aside]
        points = self._points(sample, y) if few else patches.all_points(y)
        values, seen = patches.sampled_patches(geometry, x, offset, points)
        if mask is not None:
            weights = patches.values_at(mask, points).to(values.dtype)  # (n, 1)
            values, seen = values * weights, seen * weights.unsqueeze(2)
        number = values.new_tensor(float(len(values))) if mask is None else weights.sum()
        grouped = values.unflatten(1, (groups, -1)).permute(1, 2, 0)  # (groups, outputs, n)
        rows = seen.transpose(0, 1)  # (groups, n, fan_in)
        sums = [number, seen.sum(0), torch.matmul(grouped, rows).flatten(0, 1), values.sum(0)]
        if self.order == 2:
            sums.append(torch.matmul(rows.transpose(1, 2), rows))
        return sums

    def _points(self, count: int | None, y: Tensor) -> Tensor:
        """The positions of this step: the next ones of a sequence that covers the unit cube."""
        assert count is not None
        first = self.memory["step"] * count
        return patches.covering_points(first, count, y.dim() - 1)

    def _pool_gradients(self, new: dict[str, Tensor], seen: Seen, place: Tensor) -> None:
        """Join a micro-batch's gradients with those of the step before it, in its slot."""
        assert seen.own_mean is not None and seen.earlier_mean is not None
        share = seen.share
        both = share * (1 - share)
        old = {n: self.memory[n].index_select(0, place).squeeze(0).to(share.dtype) for n in new}
        patch_apart = new["mean_gradient"] - old["mean_gradient"]
        groups = patch_apart.shape[0]
        means_apart = (seen.own_mean - seen.earlier_mean).view(groups, -1, 1)
        across = (means_apart * patch_apart.unsqueeze(1)).flatten(0, 1)
        for name in ("mean_gradient", "var_gradient", "patch_covariance"):
            if name in new:
                new[name] = torch.lerp(old[name], new[name], share)
        new["var_gradient"] = new["var_gradient"] + across * (2 * both)
        if "patch_covariance" in new:
            square = patch_apart.unsqueeze(2) * patch_apart.unsqueeze(1)
            new["patch_covariance"] = new["patch_covariance"] + square * both

    def _settle(self, new: dict[str, Tensor], feed: ConvCall) -> None:
        """Add what the compensation subtracts: the products with the weights of this step."""
        rows = feed.rows.to(new["var"].dtype)
        grouped = rows.view(feed.geometry.groups, -1, feed.geometry.fan_in)
        new["mean_base"] = (new["mean_gradient"].unsqueeze(1) * grouped).sum(-1).flatten()
        new["var_base"] = (new["var_gradient"] * rows).sum(-1)
        if feed.bias is not None:
            new["mean"] = new["mean"] - feed.bias
        if self.order == 2:
            new["weight_rows"] = rows

    # --- state -------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        mean = state_dict.get(prefix + "mean")
        if isinstance(mean, Tensor) and len(mean) and self.window is None:
            self.window = mean.shape[0]
            self._make_rings()
        elif isinstance(mean, Tensor) and not len(mean) and "mean" in self.memory:
            names = (prefix + name for name in self.memory if self.memory[name].dim())
            empty = {name: torch.zeros_like(self.memory[name[len(prefix) :]]) for name in names}
            state_dict = {**state_dict, **empty}  # of a network that has seen no batch yet
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._flow = _Flow()
        if not self.memory["burning"].is_meta:
            self.burning = bool(self.memory["burning"])
            self._check_counters()

    def _check_counters(self) -> None:
        """Empty the window where a checkpoint's counters do not fit it."""
        slots = self.window or 1
        position, entries = (int(self.memory[name]) for name in ("position", "entries"))
        if not (0 <= position < slots and 0 <= entries <= slots):
            self.memory["position"].zero_()
            self.memory["entries"].zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_flow": _Flow()}

    def own_arguments(self) -> Mapping[str, Any]:
        names = (
            "window",
            "burn_in_steps",
            "burn_in",
            "order",
            "gradient_sample",
            "backward_stats",
            "running_stats",
        )
        bound = {} if self.geometry is not None or not self.order else {"bound": False}
        return {**{name: getattr(self, name) for name in names}, **bound}


def recommended_window(batch_size: int) -> int:
    """The window for a batch size (cross-iteration-bn, section 4.3).

    >>> [recommended_window(n) for n in (1, 2, 4, 5, 16, 32)]
    [8, 8, 4, 4, 1, 1]
    """
    return min(-(-_ENOUGH // batch_size), _LONGEST)


def release(module: nn.Module, layer: nn.Module) -> None:
    """Take away the hooks by which a layer follows a module."""
    followed = [module]
    if parametrize.is_parametrized(module, "weight"):
        followed.append(module.parametrizations["weight"])  # type: ignore[index,arg-type]
    for one in followed:
        for key, hook in list(one._forward_hooks.items()):
            if getattr(hook, "__self__", None) is layer:
                del one._forward_hooks[key]
                one._forward_hooks_with_kwargs.pop(key, None)


def _weight_of(module: nn.Module) -> Tensor:
    """The weights that a layer has just used."""
    if is_centralized(module):
        return centralized_weight(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


class CrossIterationBatchNorm1d(_CrossIterationBatchNorm):
    __doc__ = _CrossIterationBatchNorm.__doc__
    dims = 1


class CrossIterationBatchNorm2d(_CrossIterationBatchNorm):
    __doc__ = _CrossIterationBatchNorm.__doc__
    dims = 2


class CrossIterationBatchNorm3d(_CrossIterationBatchNorm):
    __doc__ = _CrossIterationBatchNorm.__doc__
    dims = 3
