"""What all layers have in common: state, the course of a forward, inference.

A method adds a file with its rule. The base owns torch's parameters and buffers,
the memory a method adds to them, float32 statistics whatever the model's type,
checkpoints, the cut of a batch, inference, and the cases in which a batch has no
statistics to give.
"""

import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch import kernels
from anybatch.layers.accumulation import Seen, StepBackward, StepMemory
from anybatch.layers.arguments import check_between, check_count
from anybatch.layers.compiled import BackwardArrays, Compiled, ForwardArrays, Kept
from anybatch.layers.normalize import BackwardMemory, normalize
from anybatch.layers.partition import Partition, partition
from anybatch.layers.recompute import Recent, in_backward, may_run_again
from anybatch.layers.state import NormState
from anybatch.layers.statistics import Statistics, stack

_LOW = (torch.float16, torch.bfloat16)


class Batch(NamedTuple):
    """A normalization batch, as rules see it.

    Attributes:
        sizes: Examples in each of its groups.
        values: Values that an example gives to a channel.
        seen: What its optimizer step has seen, where several forwards make one; the statistics
            that a rule gets are then those of all of them.
    """

    sizes: tuple[int, ...]
    values: int
    seen: Seen | None = None

    @property
    def examples(self) -> int:
        """Examples in all groups."""
        return sum(self.sizes)

    def unbiased(self, var: Tensor) -> Tensor:
        """Bessel's correction of a single group's variance."""
        if self.seen is not None:
            return var * (self.seen.total / (self.seen.total - 1).clamp_(min=1))
        count = self.examples * self.values
        return var * kernels.scalar(count / (count - 1)) if count > 1 else var


class _Updates(threading.local):
    enabled = True


updates = _Updates()


class NormLayer(NormState):
    """Base of all layers.

    It derives from torch's ``_NormBase`` and not from ``_BatchNorm``, so that
    names and shapes of a batch norm's state, strict loading and folding are
    torch's, while ``SyncBatchNorm.convert_sync_batchnorm`` leaves it alone.

    Statistics, memory and, through ``.half()`` and ``.bfloat16()``, parameters
    stay float32 (float64 for float64). Memory beyond torch's buffers lives in
    `memory`, tensors that follow the layer's device and are in its
    ``state_dict``, but are no buffers: DistributedDataParallel overwrites
    buffers with those of rank 0.

    Args:
        num_features: Channels C of the input.
        eps: Added to the variance (default 1e-5).
        momentum: Weight of the new value in the running statistics (default
            0.1); None for the average over all batches.
        affine: Learn a scale and a shift a channel (default True).
        track_running_stats: Keep running statistics for inference (default True).
        device: Of parameters and state.
        dtype: Of parameters and state; float16 and bfloat16 give float32.
        norm_batch_size: Normalize as if the batch had come in successive batches
            of so many examples, memory running along them (default None: as one).
        example_weight: Share of an example's own statistics in its normalization
            at inference, alpha of four-things, equation 3 (default 0.0).
    """

    dims: ClassVar[int] = 0
    centered: bool = True
    needs_running_stats: ClassVar[bool] = False
    pools: ClassVar[bool] = True  # statistics of micro-batches make those of all
    fuses: bool = False
    fuses_small_only: bool = False

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
        norm_batch_size: int | None = None,
        example_weight: float = 0.0,
    ) -> None:
        check_count("num_features", num_features)
        if norm_batch_size is not None:
            check_count("norm_batch_size", norm_batch_size)
        check_between("example_weight", example_weight, 0.0, 1.0)
        if momentum is not None:
            check_between("momentum", momentum, 0.0, 1.0)
        if not eps > 0:
            raise ValueError(f"eps={eps!r}: give a number above 0, such as 1e-5")
        if self.needs_running_stats and not track_running_stats:
            raise ValueError(
                f"track_running_stats=False: {type(self).__name__} normalizes by remembered "
                "statistics in training; leave it True"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        dtype = torch.float32 if dtype in _LOW else dtype
        self.memory: dict[str, Tensor] = {}
        self.frozen = self.affine_frozen = False
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
        )
        self.norm_batch_size = norm_batch_size
        self.example_weight = float(example_weight)
        self._last: Statistics | list[Kept] | None = None
        self._recent = Recent()

    # --- what a method adds ------------------------------------------------

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        """Decide how one normalization batch is normalized, and remember it.

        Args:
            mean: Row ``(C,)``, or table ``(g, C)`` where a batch has more groups
                than one; None in the uncentred form.
            var: Biased variances, or second moments in the uncentred form.
            batch: The examples behind them.
            update: Whether state may change.

        Returns:
            The statistics to normalize by.
        """
        raise NotImplementedError

    def backward_memory(
        self, statistics: Statistics, live: tuple[bool, ...] | None, update: bool
    ) -> BackwardMemory | None:
        """Averages that stand in for the batch's statistics in the backward pass.

        Args:
            statistics: What the rule decided for this forward.
            live: Which groups have statistics of their own; None for all.
            update: Whether the averages may change.

        Returns:
            The memory, or None for the batch's own statistics.
        """
        return None

    def set_progress(self, epoch: int, total_epochs: int) -> None:
        """Tell the layer where training is; epochs count from 1."""

    def accumulate(self, steps: int | None) -> None:
        self.step = None if steps == 1 else StepMemory(self, steps)
        self._last, self._recent = None, Recent()

    @property
    def group_size(self) -> int | None:
        """Examples that share statistics within a normalization batch; None is all."""
        return None

    @property
    def columns(self) -> int:
        """Statistics a group of examples has: channels, or groups of channels."""
        return self.num_features

    def fused(self, loops: ModuleType, arrays: ForwardArrays, update: bool) -> Kept:
        """The forward of one normalization batch in one compiled call, for layers with `fuses`.

        Args:
            loops: The compiled kernels.
            arrays: Input, output and parameters.
            update: Whether state may change.

        Returns:
            The statistics that it normalized by.
        """
        raise NotImplementedError

    def fused_backward(
        self, loops: ModuleType, arrays: BackwardArrays, kept: Kept, update: bool
    ) -> None:
        """The backward of one normalization batch in one compiled call."""
        centers = kept.used[0] if kept.centers is None else kept.centers
        unused = (loops.BATCH, loops.none(arrays.x), loops.NO_COUNT, 0.0, True, False)
        loops.backward(*arrays, kept.used, centers, kept.share, kept.centered, self.eps, *unused)

    # --- forward -----------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, ...)``; the output has the input's shape, type and format."""
        shape = input.shape
        if len(shape) not in self._ranks or shape[1] != self.num_features:
            self._refuse(input)
        if not input.is_floating_point():
            self._refuse(input)
        if not self.training or self.frozen:
            if self.running_mean is not None:
                return self._infer(input)
            return self._normalize_batch(input, False) if input.numel() else self._empty(input)
        return self._normalize_batch(input, True) if input.numel() else self._empty(input)

    def _normalize_batch(self, x: Tensor, training: bool) -> Tensor:
        cut = partition(x.shape[0], self.norm_batch_size, self.group_size)
        values = x.numel() // (x.shape[0] * self.num_features)
        recomputed, again = in_backward(), may_run_again()
        update = training and updates.enabled and not recomputed
        if training and not recomputed and self.fuses and self.step is None:
            scale, shift = self._parameters.get("weight"), self._parameters.get("bias")
            small = self.fuses_small_only
            loops = kernels.fused_for(x, self._buffers["running_var"], scale, small)
            if loops is not None and shift is not None and self._live(cut, values) is None:
                y: Tensor = Compiled.apply(x, scale, shift, self, loops, cut, update)  # type: ignore[no-untyped-call]
                if again and self._last is not None:
                    self._recent.note(x, self._last)
                return y
        live = self._live(cut, values)
        chosen = self._recent.find(x, _rows(cut)) if recomputed else None
        if chosen is None:
            with torch.no_grad():
                chosen = self._choose(x.detach(), cut, values, live, update)
            if again and not recomputed:
                self._recent.note(x, chosen)
        # Under a compiler this makes them outputs of its graph: saved for backward, and not
        # computed again from memory that has moved on since.
        self._last = chosen
        memory = None
        if training:
            memory = self._backward_memory(chosen, cut, values, live, update or recomputed)
        return self._apply_statistics(x, cut, chosen, memory)

    def _apply_statistics(
        self, x: Tensor, cut: Partition, chosen: Statistics, memory: BackwardMemory | None
    ) -> Tensor:
        """Normalize by what the rule decided."""
        weight, bias = self._parameters_like(chosen.var)
        return normalize(x, weight, bias, cut.sizes, chosen, self.eps, memory)

    def _choose(
        self,
        x: Tensor,
        cut: Partition,
        values: int,
        live: tuple[bool, ...] | None,
        update: bool,
    ) -> Statistics:
        """Decide how a batch is normalized, and remember it."""
        if self.step is None:
            return self._run_rule(x, cut, values, live, update)
        aside = self.step.rewind(self, "", update)
        try:
            return self._run_rule(x, cut, values, live, update)
        finally:
            self.step.leave(self, "", aside, update)

    def _run_rule(
        self,
        x: Tensor,
        cut: Partition,
        values: int,
        live: tuple[bool, ...] | None,
        update: bool,
    ) -> Statistics:
        """Run the rule along the successive normalization batches."""
        mean, var = self._moments(x, cut.sizes)
        return self._decide(mean, var, cut, values, live, update)

    def _decide(
        self,
        mean: Tensor | None,
        var: Tensor,
        cut: Partition,
        values: int,
        live: tuple[bool, ...] | None,
        update: bool,
    ) -> Statistics:
        """Decide on given moments how successive normalization batches are normalized."""
        if self.step is not None and self.group_size is None:
            return self._run_pooled(self.step, mean, var, cut, values, update)
        if len(cut.steps) == 1 and live is None:
            return self.rule(mean, var, Batch(cut.sizes, values), update)
        if len(cut.sizes) == 1:
            return self._fall_back(var)
        live = (True,) * len(cut.sizes) if live is None else live
        parts, first = [], 0
        for groups in cut.steps:
            alive = sum(live[first : first + groups])
            middle, end = first + alive, first + groups  # smaller groups come last
            fallen = [self._fall_back(var[middle:end])] if middle < end else []
            if alive:
                rows = slice(first, middle) if groups > 1 else first
                part = None if mean is None else mean[rows]
                batch = Batch(cut.sizes[first:middle], values)
                parts.append(self.rule(part, var[rows], batch, update))
            parts += fallen
            first = end
        return stack(parts)

    def _run_pooled(
        self,
        step: StepMemory,
        mean: Tensor | None,
        var: Tensor,
        cut: Partition,
        values: int,
        update: bool,
    ) -> Statistics:
        """Run the rule on the statistics of all micro-batches of an optimizer step."""
        count = cut.sizes[0] * values
        mean, var, seen = step.pool(mean, var, count, update)
        if mean is None or count > 1:
            return self.rule(mean, var, Batch(cut.sizes, values, seen), update)
        enough = seen.total > 1
        var = torch.where(enough, var, torch.nan)  # which no memory takes
        return self._or_remembered(
            enough, self.rule(mean, var, Batch(cut.sizes, values, seen), update)
        )

    def _or_remembered(self, enough: Tensor, chosen: Statistics) -> Statistics:
        """Statistics where there are enough values for them, else remembered ones."""
        fallen = self._fall_back(chosen.var)
        mean, var, r, d, center, share, own = chosen
        assert mean is not None and fallen.mean is not None
        mean = torch.where(enough, mean, fallen.mean)
        return Statistics(
            mean,
            torch.where(enough, var, fallen.var),
            None if r is None else torch.where(enough, r, 1.0),
            None if d is None else torch.where(enough, d, 0.0),
            None if center is None else torch.where(enough, center, fallen.mean),
            enough * share,
            own,
        )

    def _backward_memory(
        self,
        chosen: Statistics,
        cut: Partition,
        values: int,
        live: tuple[bool, ...] | None,
        update: bool,
    ) -> BackwardMemory | None:
        """The method's memory of the backward statistics, which counts optimizer steps."""
        inner = self.backward_memory(chosen, live, update)
        if self.step is None or inner is None:
            return inner
        return StepBackward(self, self.step, inner, cut.sizes[0] * values, update)

    def _moments(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
        if self.centered:
            return kernels.moments(x, sizes)
        return None, kernels.second_moment(x, sizes)

    def _fall_back(self, like: Tensor) -> Statistics:
        """Remembered statistics for groups that have none, constants in backward."""
        mean, var = (row.to(like.dtype).expand(like.shape).clone() for row in self.remembered())
        return Statistics(mean, var, share=0.0)

    def _live(self, cut: Partition, values: int) -> tuple[bool, ...] | None:
        """Which groups have statistics, more than one value each; None for all."""
        if not self.centered or values * (self.num_features // self.columns) > 1:
            return None
        live = tuple(size > 1 for size in cut.sizes)
        return None if all(live) else live

    def _empty(self, x: Tensor) -> Tensor:
        """An empty batch: no statistics, no trace, gradients of zero."""
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = x
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                y = y + parameter.view(shape)
        return y.to(x.dtype)

    # --- inference ---------------------------------------------------------

    def _infer(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        dtype = kernels.statistics_dtype(x)
        mean, var = self.running_mean, self.running_var
        if var.dtype != dtype:
            mean, var = mean.to(dtype), var.to(dtype)
        if torch.is_grad_enabled() and not kernels.is_watched():
            mean, var = mean.clone(), var.clone()  # a training forward may come before backward
        weight, bias = self._parameters_like(var)
        if self.columns == self.num_features and not self.example_weight:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if kernels.is_watched():  # elementary operators, which every exporter knows
            own = kernels.example_moments(x, self.centered)
            statistics = self._mixed(*own, mean, var)
            return kernels.example_affine(x, *statistics[:2], weight, bias, self.eps)
        if x.numel() == 0:
            return self._empty(x)
        sizes = (1,) * x.shape[0]
        with torch.no_grad():
            statistics = self._mixed(*self._moments(x.detach(), sizes), mean, var)
        return self._apply_statistics(x, partition(x.shape[0], 1), statistics, None)

    def _mixed(
        self, own_mean: Tensor | None, own_var: Tensor, mean: Tensor, var: Tensor
    ) -> Statistics:
        """Each example's statistics mixed with the running ones (four-things, equation 3)."""
        alpha = self.example_weight
        check_between("example_weight", alpha, 0.0, 1.0)
        if own_mean is None:
            return Statistics(None, torch.lerp(var.expand_as(own_var), own_var, alpha), share=alpha)
        # E[x^2] - E[x]^2 of the mixture, without the difference of two large numbers.
        apart = (own_mean - mean).square() * (alpha * (1 - alpha))
        mixed_mean = torch.lerp(mean.expand_as(own_mean), own_mean, alpha)
        mixed_var = torch.lerp(var.expand_as(own_var), own_var, alpha) + apart
        if self.columns != self.num_features:
            mixed_mean, mixed_var = kernels.pool_channels(mixed_mean, mixed_var, self.columns)
        return Statistics(mixed_mean, mixed_var, share=alpha)

    def inference_obstacle(self) -> str | None:
        """Why inference is no affine map a channel; None where it is one."""
        if self.running_mean is None:
            return "track_running_stats=False: it normalizes by the batch at inference too"
        if self.example_weight:
            return f"example_weight={self.example_weight}: each example has statistics of its own"
        if self.columns != self.num_features:
            return f"{self.columns} channel groups: channels share statistics"
        return None

    # --- checks and looks --------------------------------------------------

    def _refuse(self, x: Tensor) -> NoReturn:
        """Say what is wrong with an input."""
        given = f"input of shape {tuple(x.shape)}: {type(self).__name__}"
        if x.dim() not in self._ranks:
            wanted = {1: "(N, C) or (N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}
            takes = wanted.get(self.dims, "(N, C, ...)")
            raise ValueError(f"{given} takes {takes}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{given} has num_features={self.num_features}, "
                f"the input {x.shape[1]} channels (dimension 1)"
            )
        raise TypeError(
            f"input of type {x.dtype}: {type(self).__name__} needs floating point; "
            "give input.float()"
        )

    @property
    def _ranks(self) -> tuple[int, ...]:
        return (2, 3) if self.dims == 1 else (self.dims + 2,)

    def extra_repr(self) -> str:
        """The arguments, those of the method where they differ from the default, and frozen."""
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.norm_batch_size is not None:
            parts.append(f"norm_batch_size={self.norm_batch_size}")
        if self.example_weight:
            parts.append(f"example_weight={self.example_weight}")
        parts += [f"{name}={value}" for name, value in self.own_arguments().items()]
        if self.frozen or self.affine_frozen:
            frozen = (("statistics", self.frozen), ("affine", self.affine_frozen))
            parts.append("frozen=" + "+".join(name for name, flag in frozen if flag))
        return ", ".join(parts)

    def own_arguments(self) -> Mapping[str, Any]:
        """The method's own arguments, for the layer's repr."""
        return {}


def _rows(cut: Partition) -> tuple[int, ...]:
    return () if len(cut.sizes) == 1 else (len(cut.sizes),)
