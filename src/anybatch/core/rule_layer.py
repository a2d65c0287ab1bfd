"""A method's rule on the statistics of a batch: along its normalization batches, with fallbacks."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from anybatch import backends
from anybatch.backends.aten import recorded
from anybatch.backends.protocol import BackwardMemory, Statistics
from anybatch.core.backward_statistics import BackwardAverage
from anybatch.core.gradient_accumulation import StepBackward, StepMemory
from anybatch.core.grouping import Partition
from anybatch.core.method import Side
from anybatch.core.norm_batch import Batch, Moments
from anybatch.core.outliers import OutlierGuard
from anybatch.core.reduction_scope import ReductionScope, active_group
from anybatch.core.rule import Method, Rule, State, method_of, run_average, run_rule
from anybatch.core.scoped_layer import ScopedLayer
from anybatch.core.statistics import stack


class RuleLayer(ScopedLayer):
    """A layer that decides, by its method's rule, how a batch is normalized."""

    centered: bool = True
    needs_running_stats: ClassVar[bool] = False
    outlier_limit: float | None
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
            value = self.new_state(*kept.shape(self))
            self.method_state[name] = value.long() if getattr(kept, "whole", False) else value
        self.reset_memory()

    def track_batch(self, mean: Tensor | None, var: Tensor, batch: Batch) -> None:
        """Move the running statistics towards those of a batch."""
        self.track(mean, batch.unbiased(var))

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        """Choose the statistics of one normalization batch, and move the state.

        Mean and variance are rows ``(C,)``, or tables ``(g, C)`` of several groups; the variance is
        biased, in the uncentered form the second moment.
        """
        if update and not batch.is_one_value():
            self.meet(batch.examples())
        used = mean, var
        if self.num_statistics != self.num_features and mean is not None:
            used = backends.pool_channels(mean, var, self.num_statistics)
        chosen = run_rule(self, self.method, *used, update)
        if update and self.method.state.running == "applied":
            self.track(chosen.mean, chosen.var)
        elif update:
            self.track_batch(mean, var, batch)
        return chosen

    def backward_memory(self, statistics: Statistics, update: bool) -> BackwardMemory | None:
        """Averages that stand in for the batch's statistics in the backward pass.

        Args:
            statistics: What the rule decided for this forward.
            update: Whether the averages may change.

        Returns:
            The memory, or None for the batch's own statistics.
        """
        forward, backward, *_ = self.method.rules
        chosen = "use_batch_stats" not in forward.uses or statistics.use_batch_stats is not None
        if backward.rule is None or not chosen:
            return None
        counts = statistics.counts if self.step is None else None  # a step has others' as well
        enough = None if counts is None else self._enough(counts)
        return BackwardAverage(self, statistics.use_batch_stats, enough, update)

    def average_backward(self, new: Tensor, enough: Tensor | None, update: bool) -> Tensor:
        """Take the backward statistics of a step, give their average.

        Args:
            new: ``mean(g * z)``, or ``mean(g)`` and it side by side.
            enough: Whether the batch had values enough for them; None for yes.
            update: Whether the averages may change.
        """
        if enough is None:
            return run_average(self, self.method, new, self._update_weight(), update)
        taken = torch.where(enough, new, torch.nan)  # which no state takes
        average = run_average(self, self.method, taken, self._update_weight(), update)
        if update:
            self._take_back(self.method.backward, enough)
        return torch.where(enough, average, new)

    def meet(self, examples: int) -> None:
        """Take notice of a batch that is about to change the state, as of its size.

        Args:
            examples: Examples in its first normalization batch.
        """

    def _choose(
        self, x: Tensor, cut: Partition, values: int, update: bool, source: ReductionScope | None
    ) -> Statistics:
        """Decide how a batch is normalized, and remember it."""
        if self.step is None:
            return self._run_rule(x, cut, values, update, source)
        aside = self.step.rewind(self, "", update)
        try:
            return self._run_rule(x, cut, values, update, source)
        finally:
            self.step.leave(self, "", aside, update)

    def _run_rule(
        self, x: Tensor, cut: Partition, values: int, update: bool, source: ReductionScope | None
    ) -> Statistics:
        """Run the rule along the successive normalization batches."""
        moments = self._moments(x, cut.sizes, source)
        if source is None and self._lacks_values(cut, values):
            moments = Moments(moments.mean, moments.var, backends.all_counts(x, cut.sizes))
        return self._decide(moments, cut, values, update)

    def _decide(self, moments: Moments, cut: Partition, values: int, update: bool) -> Statistics:
        """Decide on given moments how successive normalization batches are normalized."""
        if self.step is not None and self.group_size is None:
            return self._run_pooled(self.step, moments, cut, values, update)
        if len(cut.steps) == 1:
            return self._decide_step(moments, cut.sizes, values, update)
        parts, first = [], 0
        for groups in cut.steps:
            rows = slice(first, first + groups)
            part = moments.at(rows if groups > 1 else first)
            parts.append(self._decide_step(part, cut.sizes[rows], values, update))
            first += groups
        return stack(parts)

    def _decide_step(
        self, moments: Moments, sizes: tuple[int, ...], values: int, update: bool
    ) -> Statistics:
        """Run the rule on one normalization batch; remembered statistics where it has none."""
        mean, var, counts = moments
        batch = Batch(sizes, values, None, counts)
        if counts is None:
            return self._guarded(mean, var, batch, update)
        enough = self._enough(counts)
        chosen = self._guarded_where(enough, mean, var, batch, update)
        if update:
            self._uncount(counts)
            self._take_back(self.method.forward, enough)
        return chosen.of(counts)

    def _uncount(self, counts: Tensor) -> None:
        """Undo the `num_batches_tracked` increment for a batch with too few values."""
        tracked = counts > 1 if self.centered else counts > 0
        together = self.group_size is not None and active_group(self.process_group) is not None
        if self.num_batches_tracked is not None and not together:
            self.num_batches_tracked.sub_(1 - tracked.any().long())

    def _take_back(self, side: Side, enough: Tensor) -> None:
        """Undo the steps that a method counted for a batch with too few values."""
        for name, counter in side.counters:
            if not counter.complete:
                self.method_state[name].sub_(1 - enough.any().long())

    def _guarded(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        """Apply the rule; keep outlier channels out of the state."""
        if self.outlier_limit is None:
            return self.rule(mean, var, batch, update)
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        guard = OutlierGuard(self.outlier_limit, self.eps, *running, self.method_state["outliers"])
        fits = guard.admits(mean, var, update)
        chosen = self.rule(mean, torch.where(fits, var, torch.nan), batch, update)
        if self.num_statistics != self.num_features:
            fits = fits.unflatten(-1, (self.num_statistics, -1)).all(-1)
            assert mean is not None
            mean, var = backends.pool_channels(mean, var, self.num_statistics)
        return chosen.where(fits, mean, var, batch_weight=1.0)

    def _enough(self, counts: Tensor) -> Tensor:
        """Mark where there are values enough for statistics."""
        shared = self.num_features // self.num_statistics
        return counts * shared > 1 if self.centered else counts > 0

    def _run_pooled(
        self, step: StepMemory, moments: Moments, cut: Partition, values: int, update: bool
    ) -> Statistics:
        """Run the rule on the statistics of all micro-batches of an optimizer step."""
        mean, var, counts = moments
        count = cut.sizes[0] * values if counts is None else counts
        mean, var, seen = step.pool(mean, var, count, update)
        batch = Batch(cut.sizes, values, seen, counts)
        if counts is None:
            return self._guarded(mean, var, batch, update)
        return self._guarded_where(self._enough(seen.total), mean, var, batch, update).of(counts)

    def _guarded_where(
        self, enough: Tensor, mean: Tensor | None, var: Tensor, batch: Batch, update: bool
    ) -> Statistics:
        """Apply the rule where there are enough values; remembered statistics elsewhere."""
        var = torch.where(enough, var, torch.nan)  # which no state takes
        remembered = self._fallback(var.dtype)
        chosen = self._guarded(mean, var, batch, update)
        return chosen.where(enough, *remembered, batch_weight=0.0)

    def _fallback(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies of the remembered mean and variance, a number a channel group."""
        mean, var = (row.to(dtype, copy=True) for row in self.remembered())
        if self.num_statistics != self.num_features:
            return backends.pool_channels(mean, var, self.num_statistics)
        return mean, var

    def memory_of_backward(
        self, chosen: Statistics, count: int, update: bool
    ) -> BackwardMemory | None:
        """The memory of the backward statistics of so many values, which counts optimizer steps."""
        inner = self.backward_memory(chosen, update)
        if self.step is None or inner is None:
            return inner
        values = count if chosen.counts is None else chosen.counts
        return StepBackward(self, self.step, inner, values, update)

    def _moments(self, x: Tensor, sizes: tuple[int, ...], source: ReductionScope | None) -> Moments:
        """Mean and variance of each group; with a source, of so many values."""
        if source is not None:
            return Moments(*source.moments(x, sizes, self.centered))
        if recorded.is_transformed():
            mean, var = recorded.moments(x.to(backends.statistics_dtype(x)), sizes)
            mean, var = (mean[0], var[0]) if len(sizes) == 1 else (mean, var)
            return Moments(mean, var) if self.centered else Moments(None, var + mean.square())
        if self.centered:
            return Moments(*backends.moments(x, sizes))
        return Moments(None, backends.second_moment(x, sizes))

    def _lacks_values(self, cut: Partition, values: int) -> bool:
        """True where some groups have one value each, and therefore no statistics."""
        several_each = values * (self.num_features // self.num_statistics) > 1
        return self.centered and not several_each and min(cut.sizes) < 2
