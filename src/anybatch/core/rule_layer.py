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
from anybatch.core.norm_batch import Batch
from anybatch.core.outliers import OutlierGuard
from anybatch.core.reduction_scope import Source, several
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
            value = self.new_memory(*kept.shape(self))
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

    def meet(self, examples: int) -> None:
        """Take notice of a batch that is about to change the state, as of its size.

        Args:
            examples: Examples in its first normalization batch.
        """

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
            fallen = self._fallback(part_var.dtype)
            part = self._guarded(None if mean is None else mean[one], part_var, batch, update)
            parts.append(self._with_fallback(enough, part, fallen).of(counts[one]))
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
        """Apply the rule; keep outlier channels out of the state."""
        if self.outlier_limit is None:
            return self.rule(mean, var, batch, update)
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        guard = OutlierGuard(self.outlier_limit, self.eps, *running, self.memory["outliers"])
        fits = guard.admits(mean, var, update)
        chosen = self.rule(mean, torch.where(fits, var, torch.nan), batch, update)
        if self.columns != self.num_features:
            fits = fits.unflatten(-1, (self.columns, -1)).all(-1)
            assert mean is not None
            mean, var = backends.pool_channels(mean, var, self.columns)
        return guard.without(fits, chosen, mean, var)

    def _enough(self, counts: Tensor) -> Tensor:
        """Mark where there are values enough for statistics."""
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
        fallen = self._fallback(var.dtype)
        return self._with_fallback(enough, self._guarded(mean, var, batch, update), fallen)

    def _fallback(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies of the remembered mean and variance, a number a channel group."""
        mean, var = (row.to(dtype, copy=True) for row in self.remembered())
        if self.columns != self.num_features:
            return backends.pool_channels(mean, var, self.columns)
        return mean, var

    def _with_fallback(
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
        """Mark the groups that have statistics, of more than one value each; None for all."""
        if not self.centered or values * (self.num_features // self.columns) > 1:
            return None
        live = tuple(size > 1 for size in cut.sizes)
        return None if all(live) else live
