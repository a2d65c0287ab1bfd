"""What all layers have in common: state, the course of a forward, inference.

A method adds a file with its rule. The base owns torch's parameters and buffers,
the memory a method adds to them, float32 statistics whatever the model's type,
checkpoints, the cut of a batch, inference, and the cases in which a batch has no
statistics to give.
"""

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch import backends
from anybatch.backends.aten import recorded
from anybatch.backends.protocol import BackwardMemory, Formula, NormCall, Rows, Spec, Statistics
from anybatch.core.activation_checkpointing import Recent, in_backward, may_run_again, runs_once
from anybatch.core.arguments import check_between, check_count
from anybatch.core.autograd import apply_plain, normalize_by, statistics_of
from anybatch.core.backward_statistics import BackwardAverage
from anybatch.core.dispatch import ExecutionPlan, find_plan, only_aten, run_plan, with_plan
from anybatch.core.fused_activation import Activation, read_activation
from anybatch.core.gradient_accumulation import Seen, StepBackward, StepMemory
from anybatch.core.graphs import as_leaf, refuse_script, refuse_trace
from anybatch.core.grouping import Partition, partition
from anybatch.core.module_state import NormState
from anybatch.core.reduction_scope import (
    WORLD,
    HeldGroup,
    Source,
    check_group,
    check_same,
    fit_mask,
    several,
    sum_processes,
)
from anybatch.core.rule import (
    Method,
    Rule,
    State,
    method_of,
    run_average,
    run_rule,
    spec_of,
)
from anybatch.core.statistics import stack
from anybatch.core.tensor_subclasses import is_distributed, is_overridden, on_local, on_plain
from anybatch.core.transforms import check_state

_LOW = (torch.float16, torch.bfloat16)
_SETTLED = 20  # batches that running statistics have seen before anything is out of proportion
_PATIENCE = 10  # batches in a row after which it is not an accident


class Batch(NamedTuple):
    """A normalization batch, as rules see it.

    Attributes:
        sizes: Examples in each of its groups.
        values: Values that an example gives to a channel.
        seen: What its optimizer step has seen, where several forwards make one; the statistics
            that a rule gets are then those of all of them.
        counts: Values a channel behind each group's statistics, a number or a column ``(G, 1)``,
            where these are not simply those of its examples; see `Source`.
    """

    sizes: tuple[int, ...]
    values: int
    seen: Seen | None = None
    counts: Tensor | None = None

    def examples(self) -> int:
        """Examples in all groups."""
        return sum(self.sizes)

    def number(self) -> int | Tensor:
        """Values a channel behind the statistics of a single group, in this forward."""
        return self.examples() * self.values if self.counts is None else self.counts

    def unbiased(self, var: Tensor) -> Tensor:
        """Bessel's correction of a single group's variance; NaN where one value has none."""
        if self.seen is not None:
            return var * (self.seen.total / (self.seen.total - 1).clamp_(min=1))
        if self.counts is not None:
            return var * (self.counts / (self.counts - 1))
        count = self.examples() * self.values
        return var * backends.scalar(count / (count - 1)) if count > 1 else var


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
        bias: Learn the shift, where affine is true (default True).
        track_running_stats: Keep running statistics for inference (default True).
        device: Of parameters and state.
        dtype: Of parameters and state; float16 and bfloat16 give float32.
        norm_batch_size: Normalize as if the batch had come in successive batches
            of so many examples, memory running along them (default None: as one).
        example_weight: Share of an example's own statistics in its normalization
            at inference, alpha of four-things, equation 3 (default 0.0).
        process_group: Processes of ``torch.distributed`` whose batches are one in training:
            a process group, or "world" for all (default None: this process alone).
        outlier_limit: A batch in which a channel's variance about its running mean is more than so
            many times the running variance is normalized by its own statistics in that channel, and
            enters no memory there; after ten such batches in a row it does (default None: every
            batch that is finite enters).
    """

    dims: ClassVar[int] = 0
    centered: bool = True
    needs_running_stats: ClassVar[bool] = False
    pools: ClassVar[bool] = True  # statistics of micro-batches make those of all
    steady: bool = True  # whether `method_spec` changes with nothing but attributes

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
        norm_batch_size: int | None = None,
        example_weight: float = 0.0,
        process_group: Any = None,
        outlier_limit: float | None = None,
    ) -> None:
        check_count("num_features", num_features)
        if norm_batch_size is not None:
            check_count("norm_batch_size", norm_batch_size)
        check_between("example_weight", example_weight, 0.0, 1.0)
        if process_group is not None and norm_batch_size is not None:
            raise ValueError(
                f"norm_batch_size={norm_batch_size}: it cuts a batch where process_group joins "
                "batches; leave one of them out"
            )
        if outlier_limit is not None:
            if not outlier_limit > 1:
                raise ValueError(f"outlier_limit={outlier_limit!r}: give a number above 1 or None")
            if not track_running_stats:
                raise ValueError(
                    f"outlier_limit={outlier_limit!r}: batches are compared with running "
                    "statistics; leave track_running_stats True"
                )
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
        if not bias:
            self.register_parameter("bias", None)
        self.norm_batch_size = norm_batch_size
        self.example_weight = float(example_weight)
        self.process_group = process_group
        self.mask: Tensor | None = None
        self._compared = False
        self.outlier_limit = outlier_limit
        if outlier_limit is not None:
            self.memory["outliers"] = self._new_memory(num_features).long()
        self._last: Statistics | None = None
        self._recent = Recent()

    @property
    def process_group(self) -> Any:
        """Processes whose batches are one in training: a process group, "world" or None."""
        return self._group.group if isinstance(self._group, HeldGroup) else self._group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        check_group(process_group)
        named = process_group is None or process_group == WORLD
        self._group = process_group if named else HeldGroup(process_group)

    # --- what a method adds ------------------------------------------------

    choose: ClassVar[Rule | None] = None  # None: the batch's own statistics
    average: ClassVar[Rule | None] = None  # None: those of the backward pass
    state: ClassVar[State] = State()
    method: Method = method_of(None, None, State())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"choose", "average", "state"} & set(vars(cls)):
            cls.method = method_of(cls.choose, cls.average, cls.state)

    def declare_state(self) -> None:
        """Create the state of the method, once the layer has its options."""
        for name, kept in self.method.state.kept:
            value = self._new_memory(*kept.shape(self))
            self.memory[name] = value.long() if getattr(kept, "whole", False) else value
        self.reset_memory()

    def track_batch(self, mean: Tensor | None, var: Tensor, batch: Batch) -> None:
        """Move the running statistics towards those of a batch."""
        self.track(mean, batch.unbiased(var))

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        """Choose the statistics of one normalization batch, and move the state.

        Mean and variance are rows ``(C,)``, or tables ``(g, C)`` of several groups; the variance is
        biased, in the uncentered form the second moment.
        """
        if update:
            self.meet(batch.examples())
        used = mean, var
        if self.columns != self.num_features and mean is not None:
            used = backends.pool_channels(mean, var, self.columns)
        chosen = run_rule(self, self.method, *used, update)
        if update and self.method.state.running == "used":
            self.track(chosen.mean, chosen.var)
        elif update:
            self.track_batch(mean, var, batch)
        return chosen

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
        forward, backward, *_ = self.method.rules
        chosen = "own" not in forward.uses or statistics.own is not None
        remembered = isinstance(statistics.share, float) and statistics.share == 0
        if backward.rule is None or remembered or not chosen:
            return None
        return BackwardAverage(self, statistics.own, live, update)

    def average_backward(self, new: Tensor, update: bool) -> Tensor:
        """Take the backward statistics of a step, give their average."""
        return run_average(self, self.method, new, self._pace(), update)

    def set_progress(self, epoch: int, total_epochs: int) -> None:
        """Tell the layer where training is; epochs count from 1."""

    def accumulate(self, steps: int | None, counts: bool = True) -> None:
        self.step = None if steps == 1 else StepMemory(self, steps, counts)
        self._last, self._recent = None, Recent()

    def track_none(self, x: Tensor) -> None:
        """Take part in what processes track together, with an empty batch of groups."""

    @property
    def group_size(self) -> int | None:
        """Examples that share statistics within a normalization batch; None is all."""
        return None

    @property
    def columns(self) -> int:
        """Statistics a group of examples has: channels, or groups of channels."""
        return self.num_features

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        """The method as compiled kernels take it, or why they do not.

        Args:
            x: A batch.
            cut: Its normalization batches.
        """
        if type(self).rule is not NormLayer.rule:
            return f"{type(self).__name__} has a rule of torch's operators"
        return spec_of(self, self.method)

    def formula(self, x: Tensor, cut: Partition, source: Source | None) -> Formula | None:
        """The method's own gradient by torch's operators; None for that of all.

        Args:
            x: The batch.
            cut: Its normalization batches.
            source: Which elements contribute to its statistics; None for all.
        """
        return None

    def meet(self, examples: int) -> None:
        """Take notice of a batch that is about to change the state, as of its size.

        Args:
            examples: Examples in its first normalization batch.
        """

    # --- forward -----------------------------------------------------------

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Normalize; with an `activation`, write ``relu(norm(x) + residual)`` in the same pass.

        Args:
            input: ``(N, C, ...)``.
            mask: Where input is valid, true or not 0: ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``.
                Statistics are those of the valid positions; the output is normalized everywhere.
                None for all; `anybatch.masked` gives it to the layers of a network.
            residual: A tensor of the input's shape and type, added to the normalized input before
                the activation (default None: nothing).
            activation: "relu", or None (default). What is kept for backward is the input and the
                output, as of a norm and a ReLU apart.

        Returns:
            A tensor of the input's shape, type and format; for a subclass of ``Tensor`` the class
            and metadata that it gives to results of torch's functions.
        """
        if type(input) is not Tensor or residual is not None:
            if not isinstance(input, Tensor):
                return as_leaf(self, input, mask=mask, residual=residual, activation=activation)
            plain = partial(self._forward_plain, mask, activation)
            if is_overridden(input, residual):
                return on_plain(plain, input, residual)
            if is_distributed(input):
                return on_local(self, plain, input, residual)
        then = None
        if activation is not None or residual is not None:
            then = read_activation(activation, residual, input)
        known = self._run_cached_plan(input, then) if mask is None else None
        if known is not None:
            return known
        shape = input.shape
        if len(shape) not in self._ranks or shape[1] != self.num_features:
            self._refuse(input)
        if not input.is_floating_point():
            self._refuse(input)
        mask = self.mask if mask is None else mask
        training = self.training and not self.frozen
        if not training and self.running_mean is not None and self.running_var is not None:
            y = self._infer(input, mask)
            return y if then is None else then.of(y)
        source = None
        if mask is not None or self._group is not None:
            source = self._source(input, mask, training)
        if input.numel() or (source is not None and source.group is not None):
            return self._normalize_batch(input, training, source, then)
        y = self._empty(input, training)
        return y if then is None else then.of(y)

    def _forward_plain(
        self, mask: Tensor | None, activation: str | None, input: Tensor, residual: Tensor | None
    ) -> Tensor:
        return NormLayer.forward(self, input, mask, residual=residual, activation=activation)

    def _source(self, x: Tensor, mask: Tensor | None, training: bool) -> Source | None:
        """Whose values stand behind the statistics; None for all of the batch's own."""
        valid = None if mask is None else self._fit(mask, x)
        joins = training and self.group_size is None
        group = several(self.process_group) if joins else None
        if group is not None and not self._compared and not torch.compiler.is_compiling():
            check_same(group, self._described(), self._device())
            self._compared = True
        if valid is None and group is None:
            return None
        return Source(valid, group, f"{type(self).__name__}({self.num_features})")

    def _described(self) -> str:
        """What processes that synchronize must agree on."""
        own = ", ".join(f"{name}={value}" for name, value in self.own_arguments().items())
        return f"{type(self).__name__}({self.num_features}, eps={self.eps}, {own})"

    def _fit(self, mask: Tensor, x: Tensor) -> Tensor:
        return fit_mask(mask, x, type(self).__name__)

    def examples_of_all(self, examples: int) -> int:
        """Examples in a batch of all processes; where there are several, reading it waits."""
        group = several(self.process_group)
        if group is None:
            return examples
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__} reads the batch size of all processes from the first "
                "batch, which a compiled graph cannot: give batch_size=, the examples of all "
                "processes' batches, or run a step before torch.compile"
            )
        (total,) = sum_processes(group, torch.tensor([float(examples)], device=self._device()))
        assert total is not None
        return round(float(total))

    def _normalize_batch(
        self,
        x: Tensor,
        training: bool,
        source: Source | None = None,
        then: Activation | None = None,
    ) -> Tensor:
        if training and torch._C._get_tracing_state() is not None:
            refuse_trace(self)
        cut = partition(x.shape[0], self.norm_batch_size, self.group_size)
        values = x.shape[2:].numel()
        recomputed, again = in_backward(), may_run_again()
        update = training and updates.enabled and not recomputed
        if update and recorded.is_transformed():
            check_state(self, x)
        if training and not recomputed:
            obstacle = self._obstacle(cut, values, source)
            if obstacle is None:
                y = self._run_compiled(x, cut, update, then, again)
                if y is not None:
                    return y
            else:
                only_aten(obstacle)
        live = self._live(cut, values) if source is None else None
        chosen = self._recent.find(x, _rows(cut)) if recomputed else None
        if chosen is None:
            with torch.no_grad():
                chosen = self._choose(x.detach(), cut, values, live, update, source)
            if again and not recomputed:
                self._recent.note(x, chosen)
        # Under a compiler this makes them outputs of its graph: saved for backward, and not
        # computed again from memory that has moved on since.
        self._last = chosen if torch.compiler.is_compiling() else None
        memory = None
        if training:
            memory = self._backward_memory(chosen, cut, values, live, update or recomputed)
        y = self._apply_statistics(x, cut, chosen, memory, source)
        return y if then is None else then.of(y, fresh=True)

    def _obstacle(self, cut: Partition, values: int, source: Source | None) -> str | None:
        """Why only torch's operators serve a batch in training, whatever it is; None if not so."""
        if source is not None or (
            self._group is not None and several(self.process_group) is not None
        ):
            return "a mask or a process group decides which elements contribute"
        if any(t is None for t in self._buffers.values()):
            return "a running statistic was set to None"
        if not self.track_running_stats:
            return "track_running_stats=False: running statistics stay as they are"
        if self.outlier_limit is not None:
            return f"outlier_limit={self.outlier_limit}: channels are compared with the state"
        if self.step is not None:
            return "gradient accumulation joins the statistics of micro-batches"
        if self._live(cut, values) is not None:
            return "groups of one value per channel have no statistics"
        return None

    def _run_compiled(
        self, x: Tensor, cut: Partition, update: bool, then: Activation | None, again: bool
    ) -> Tensor | None:
        """The forward in compiled kernels, where some can serve a batch."""
        if update:
            self.meet(cut.batches[0])
        rows = self._rows()
        plan = self._plan_for(x, cut, rows)
        if plan is None:
            return None
        contexts: list[Any] | None = [] if again else None
        y = run_plan(plan, x, rows, self, self._kernel_state(x), update, then, contexts)
        if contexts:
            call = plan.calls[update]
            self._recent.note(x, statistics_of(plan.backend, call, contexts[0], x))
        return y

    def _plan_for(self, x: Tensor, cut: Partition, rows: Rows) -> ExecutionPlan | None:
        """How compiled kernels serve a batch; None if they do not."""
        compiling = torch.compiler.is_compiling()
        call = self._call(x, cut)
        if isinstance(call, str):
            only_aten(call)
            return None
        plan: ExecutionPlan | None = None
        if self._plans is not None and not compiling:
            plan = self._plans.get(x.shape)
        if plan is not None and plan.fits(x, rows):
            return plan
        plan = find_plan(call, x, rows)
        if plan is not None and not compiling and self.steady and self._group is None:
            self._plans = with_plan(self._plans, x, plan)
        return plan

    def _call(self, x: Tensor, cut: Partition) -> NormCall | str:
        """How kernels go through a batch, or why they do not."""
        spec = self.method_spec(x, cut)
        if isinstance(spec, str):
            return spec
        formula = self.formula(x, cut, None)
        how = (cut, self.columns, self.eps, True, spec)
        return NormCall(*how, pace=self._number(), formula=formula)

    def _run_cached_plan(self, x: Tensor, then: Activation | None) -> Tensor | None:
        """Run the cached plan, if shape, layout and settings still match."""
        plans = self._plans  # which another thread may take away
        if plans is None or torch.compiler.is_compiling():
            return None
        plan: ExecutionPlan | None = plans.get(x.shape)
        if plan is None or not runs_once():
            return None
        inside = then is not None
        if inside and not (plan.takes_relu and then.is_plain()):  # type: ignore[union-attr]
            return None
        rows = weight, bias, mean, var = self._rows()
        if not plan.fits(x, rows):
            return None
        residual = None if then is None else then.residual
        state = mean, var, self._buffers["num_batches_tracked"]
        call = plan.calls[updates.enabled]
        # A plain tuple: a `Pass` takes a hundredth of a small batch to make.
        return apply_plain(
            x, weight, bias, residual, (plan.backend, call, self, state, inside, None)
        )

    def _kernel_state(self, x: Tensor) -> tuple[Any, ...]:
        """Running statistics and the number of batches, as kernels take them."""
        kept = self._buffers
        return kept["running_mean"], kept["running_var"], kept["num_batches_tracked"]

    def _apply_statistics(
        self,
        x: Tensor,
        cut: Partition,
        chosen: Statistics,
        memory: BackwardMemory | None,
        source: Source | None = None,
    ) -> Tensor:
        """Normalize by what the rule decided."""
        weight, bias = self._parameters_like(chosen.var)
        how = (cut.sizes, chosen, self.eps, memory, source, self.formula(x, cut, source))
        return normalize_by(x, weight, bias, *how)

    def _choose(
        self,
        x: Tensor,
        cut: Partition,
        values: int,
        live: tuple[bool, ...] | None,
        update: bool,
        source: Source | None,
    ) -> Statistics:
        """Decide how a batch is normalized, and remember it."""
        if self.step is None:
            return self._run_rule(x, cut, values, live, update, source)
        aside = self.step.rewind(self, "", update)
        try:
            return self._run_rule(x, cut, values, live, update, source)
        finally:
            self.step.leave(self, "", aside, update)

    def _run_rule(
        self,
        x: Tensor,
        cut: Partition,
        values: int,
        live: tuple[bool, ...] | None,
        update: bool,
        source: Source | None,
    ) -> Statistics:
        """Run the rule along the successive normalization batches."""
        if source is not None:
            mean, var, counts = self._source_moments(x, cut.sizes, source)
            return self._decide_counted(mean, var, counts, cut, values, update)
        mean, var = self._moments(x, cut.sizes)
        return self._decide(mean, var, cut, values, live, update)

    def _decide_counted(
        self,
        mean: Tensor | None,
        var: Tensor,
        counts: Tensor,
        cut: Partition,
        values: int,
        update: bool,
    ) -> Statistics:
        """`_decide` where only the device knows how many values stand behind the moments."""
        if self.step is not None and self.group_size is None:
            chosen = self._run_pooled(self.step, mean, var, cut, values, update, counts)
            return chosen.of(counts)
        parts, first = [], 0
        for groups in cut.steps:
            one: Any = slice(first, first + groups) if groups > 1 else first
            one = ... if len(cut.sizes) == 1 else one  # a row, and a number
            enough = self._enough(counts[one])
            batch = Batch(cut.sizes[first : first + groups], values, None, counts[one])
            part_var = torch.where(enough, var[one], torch.nan)  # which no memory takes
            fallen = self._fallen(part_var.dtype)
            part = self._guarded(None if mean is None else mean[one], part_var, batch, update)
            parts.append(self._or_remembered(enough, part, fallen).of(counts[one]))
            if update:
                self._uncount(counts[one])
            first += groups
        return stack(parts) if len(parts) > 1 else parts[0]

    def _uncount(self, counts: Tensor) -> None:
        """Take back the count of a batch of which running statistics could take nothing."""
        tracked = counts > 1 if self.centered else counts > 0
        together = self.group_size is not None and several(self.process_group) is not None
        if self.num_batches_tracked is not None and not together:
            self.num_batches_tracked.sub_(1 - tracked.any().long())

    def _guarded(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        """The rule, in whose memory channels have no part that are out of all proportion."""
        if self.outlier_limit is None:
            return self.rule(mean, var, batch, update)
        fits = self._proportionate(mean, var, update)
        chosen = self.rule(mean, torch.where(fits, var, torch.nan), batch, update)
        if self.columns != self.num_features:
            fits = fits.unflatten(-1, (self.columns, -1)).all(-1)
            assert mean is not None
            mean, var = backends.pool_channels(mean, var, self.columns)
        used_mean, used_var, r, d, center, share, own, counts = chosen
        return Statistics(
            None if used_mean is None or mean is None else torch.where(fits, used_mean, mean),
            torch.where(fits, used_var, var),
            None if r is None else torch.where(fits, r, 1.0),
            None if d is None else torch.where(fits, d, 0.0),
            None if center is None or mean is None else torch.where(fits, center, mean),
            share if isinstance(share, float) and share == 1 else torch.where(fits, share, 1.0),
            own,
            counts,
        )

    def _proportionate(self, mean: Tensor | None, var: Tensor, update: bool) -> Tensor:
        """Which channels of a batch may enter memory."""
        if self.running_mean is None or self.running_var is None or self.outlier_limit is None:
            return torch.ones_like(var, dtype=torch.bool)
        count = self.num_batches_tracked
        settled = True if count is None else count >= _SETTLED
        spread = var if mean is None else var + (mean - self.running_mean).square()
        limit = (self.running_var + self.eps) * self.outlier_limit
        far = (spread > limit) & settled
        seen = self.memory["outliers"]
        fits = ~far | (seen >= _PATIENCE)
        if update:
            far = far if far.dim() == 1 else far.all(0)
            seen.copy_(torch.where(far, seen + 1, 0))
        return fits

    def _enough(self, counts: Tensor) -> Tensor:
        """Where there are values enough for statistics."""
        shared = self.num_features // self.columns
        return counts * shared > 1 if self.centered else counts > 0

    def _source_moments(
        self, x: Tensor, sizes: tuple[int, ...], source: Source
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Moments of given values, and how many they are."""
        return source.moments(x, sizes, self.centered)

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
            return self._guarded(mean, var, Batch(cut.sizes, values), update)
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
                parts.append(self._guarded(part, var[rows], batch, update))
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
        counts: Tensor | None = None,
    ) -> Statistics:
        """Run the rule on the statistics of all micro-batches of an optimizer step."""
        count = cut.sizes[0] * values
        mean, var, seen = step.pool(mean, var, count if counts is None else counts, update)
        batch = Batch(cut.sizes, values, seen, counts)
        if counts is None and (mean is None or count > 1):
            return self._guarded(mean, var, batch, update)
        enough = self._enough(seen.total)
        var = torch.where(enough, var, torch.nan)  # which no memory takes
        fallen = self._fallen(var.dtype)
        return self._or_remembered(enough, self._guarded(mean, var, batch, update), fallen)

    def _fallen(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies of the remembered mean and variance, a number a channel group."""
        mean, var = (row.to(dtype, copy=True) for row in self.remembered())
        if self.columns != self.num_features:
            return backends.pool_channels(mean, var, self.columns)
        return mean, var

    def _or_remembered(
        self, enough: Tensor, chosen: Statistics, fallen: tuple[Tensor, Tensor]
    ) -> Statistics:
        """Statistics where there are enough values for them, else remembered ones."""
        old_mean, old_var = fallen
        mean, var, r, d, center, share, own, counts = chosen
        return Statistics(
            None if mean is None else torch.where(enough, mean, old_mean),
            torch.where(enough, var, old_var),
            None if r is None else torch.where(enough, r, 1.0),
            None if d is None else torch.where(enough, d, 0.0),
            None if center is None else torch.where(enough, center, old_mean),
            enough * share,
            own,
            counts,
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
        count = cut.sizes[0] * values if chosen.counts is None else chosen.counts
        return StepBackward(self, self.step, inner, count, update)

    def _moments(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
        if recorded.is_transformed():
            mean, var = recorded.moments(x.to(backends.statistics_dtype(x)), sizes)
            mean, var = (mean[0], var[0]) if len(sizes) == 1 else (mean, var)
            return (mean, var) if self.centered else (None, var + mean.square())
        if self.centered:
            return backends.moments(x, sizes)
        return None, backends.second_moment(x, sizes)

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

    def _empty(self, x: Tensor, training: bool = False) -> Tensor:
        """An empty batch: no statistics, no trace, gradients of zero."""
        if training and self.group_size is not None and updates.enabled and not in_backward():
            with torch.no_grad():
                self.track_none(x)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = x
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                y = y + parameter.view(shape)
        return y.to(x.dtype)

    # --- inference ---------------------------------------------------------

    def _infer(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        dtype = backends.statistics_dtype(x)
        mean, var = self.running_mean, self.running_var
        if var.dtype != dtype:
            mean, var = mean.to(dtype), var.to(dtype)
        if torch.is_grad_enabled() and not backends.is_traced():
            mean, var = mean.clone(), var.clone()  # a training forward may come before backward
        weight, bias = self._parameters_like(var)
        if self.columns == self.num_features and not self.example_weight:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if backends.is_traced() and mask is None:  # operators that every exporter knows
            own = backends.example_moments(x, self.centered)
            statistics = self._mixed(*own, mean, var)
            return backends.example_affine(
                x, statistics.mean, statistics.var, weight, bias, self.eps
            )
        if x.numel() == 0:
            return self._empty(x)
        sizes = (1,) * x.shape[0]
        cut = partition(x.shape[0], 1)
        if mask is None:
            with torch.no_grad():
                statistics = self._mixed(*self._moments(x.detach(), sizes), mean, var)
            return self._apply_statistics(x, cut, statistics, None)
        source = Source(self._fit(mask, x))
        with torch.no_grad():
            own_mean, own_var, counts = self._source_moments(x.detach(), sizes, source)
            alpha = self.example_weight * (counts > 0).to(counts.dtype)  # none, no statistics
            statistics = self._mixed(own_mean, own_var, mean, var, alpha).of(counts)
        return self._apply_statistics(x, cut, statistics, None, source)

    def _mixed(
        self,
        own_mean: Tensor | None,
        own_var: Tensor,
        mean: Tensor,
        var: Tensor,
        alpha: float | Tensor | None = None,
    ) -> Statistics:
        """Each example's statistics mixed with the running ones (four-things, equation 3)."""
        check_between("example_weight", self.example_weight, 0.0, 1.0)
        alpha = self.example_weight if alpha is None else alpha
        if own_mean is None:
            return Statistics(None, torch.lerp(var.expand_as(own_var), own_var, alpha), share=alpha)
        # E[x^2] - E[x]^2 of the mixture, without the difference of two large numbers.
        apart = (own_mean - mean).square() * (alpha * (1 - alpha))
        mixed_mean = torch.lerp(mean.expand_as(own_mean), own_mean, alpha)
        mixed_var = torch.lerp(var.expand_as(own_var), own_var, alpha) + apart
        if self.columns != self.num_features:
            mixed_mean, mixed_var = backends.pool_channels(mixed_mean, mixed_var, self.columns)
        return Statistics(mixed_mean, mixed_var, share=alpha)

    def inference_obstacle(self) -> str | None:
        """Why inference is no affine map a channel; None where it is one."""
        if self.running_mean is None or self.running_var is None:
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

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def extra_repr(self) -> str:
        """The arguments, those of the method where they differ from the default, and frozen."""
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.norm_batch_size is not None:
            parts.append(f"norm_batch_size={self.norm_batch_size}")
        if self.example_weight:
            parts.append(f"example_weight={self.example_weight}")
        parts += [f"{name}={value}" for name, value in self.own_arguments().items()]
        if self.outlier_limit is not None:
            parts.append(f"outlier_limit={self.outlier_limit}")
        if self.process_group is not None:
            named = self.process_group == WORLD
            parts.append(f"process_group={'world' if named else 'of its own'}")
        if self.frozen or self.affine_frozen:
            frozen = (("statistics", self.frozen), ("affine", self.affine_frozen))
            parts.append("frozen=" + "+".join(name for name, flag in frozen if flag))
        return ", ".join(parts)

    def own_arguments(self) -> Mapping[str, Any]:
        """The method's own arguments, for the layer's repr."""
        return {}


def _rows(cut: Partition) -> tuple[int, ...]:
    return () if len(cut.sizes) == 1 else (len(cut.sizes),)
