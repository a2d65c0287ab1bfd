"""A layer's training forward: by compiled kernels where some serve the batch, else by its rule."""

from typing import Any

import torch
from torch import Tensor

from anybatch.backends import BACKENDS, choice, is_traced
from anybatch.backends.aten import recorded
from anybatch.backends.protocol import Backend, Contribution, NormCall, Spec
from anybatch.core.activation_checkpointing import in_backward, may_run_again, runs_once
from anybatch.core.autograd import apply_plain, statistics_of
from anybatch.core.dispatch import ExecutionPlan, Refusal, find_plan, only_aten, run_plan, with_plan
from anybatch.core.fused_activation import Activation
from anybatch.core.graphs import refuse_trace
from anybatch.core.grouping import Partition, partition
from anybatch.core.inference import InferenceLayer
from anybatch.core.norm_batch import updates
from anybatch.core.reduction_scope import ReductionScope, active_group
from anybatch.core.rule import spec_of
from anybatch.core.rule_layer import RuleLayer
from anybatch.core.transforms import check_state

_MASKED = "a mask decides which elements contribute"
_ACCUMULATED = "gradient accumulation joins the statistics of micro-batches"


class DispatchedLayer(InferenceLayer):
    """A layer that asks the backends, and remembers by shape and layout which one serves.

    Attributes:
        norm_batch_size: Examples of a normalization batch; None for all.
        memories: Memories that the normalization batches take in turn.
        asked: The backends that are asked before torch's operators; a trial of kernels sets them.
    """

    asked: tuple[Backend, ...] = BACKENDS[:-1]
    norm_batch_size: int | None
    memories: int = 1
    steady: bool = True  # whether `method_spec` changes with nothing but attributes

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        """The method as compiled kernels take it, or why they do not.

        Args:
            x: A batch.
            cut: Its normalization batches.
        """
        if type(self).rule is not RuleLayer.rule:
            return f"{type(self).__name__} has a rule of torch's operators"
        spec = spec_of(self, self.method)
        if isinstance(spec, str) or self.outlier_limit is None:
            return spec
        return spec._replace(
            limit=float(self.outlier_limit), outliers=self.method_state["outliers"]
        )

    def _normalize_batch(
        self,
        x: Tensor,
        training: bool,
        source: ReductionScope | None = None,
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
            obstacle = self._obstacle(cut, values, source, update)
            if obstacle is None:
                y = self._run_compiled(x, cut, update, then, again, source)
                if y is not None:
                    return y
            else:
                only_aten(obstacle)
        first = self._recent.find(x, _leading(cut)) if recomputed else None
        if first is None:
            with torch.no_grad():
                chosen = self._choose(x.detach(), cut, values, update, source)
            if again and not recomputed:
                self._recent.note(x, chosen, source, update)
            update = update or recomputed
        else:
            chosen, source, update = first
        # Under a compiler this makes them outputs of its graph: saved for backward, and not
        # computed again from memory that has moved on since.
        if torch.compiler.is_compiling():
            self._last = chosen
        elif self._last is not None:  # setting an attribute drops plans
            self._last = None
        memory = None
        if training:
            count = cut.sizes[0] * values
            memory = self.memory_of_backward(chosen, count, update)
        y = self._apply_statistics(x, cut, chosen, memory, source)
        return y if then is None else then.of(y, fresh=True)

    def _obstacle(
        self, cut: Partition, values: int, source: ReductionScope | None, update: bool
    ) -> str | None:
        """The reason for torch's operators alone in training, whatever the batch; None if none."""
        together = self._group is not None and active_group(self.process_group) is not None
        if together:  # a process that the loops cannot serve would round state another way
            return "a process group decides which elements contribute"
        if any(t is None for t in self._buffers.values()):
            return "a running statistic was set to None"
        if not self.track_running_stats:
            return "track_running_stats=False: running statistics stay as they are"
        if self.step is not None and (self.group_size is not None or not update):
            return _ACCUMULATED
        if self._lacks_values(cut, values):
            return "groups of one value per channel have no statistics"
        return None

    def _run_compiled(
        self,
        x: Tensor,
        cut: Partition,
        update: bool,
        then: Activation | None,
        again: bool,
        source: ReductionScope | None,
    ) -> Tensor | None:
        """The forward in compiled kernels, where some can serve a batch."""
        if update:
            self.meet(cut.batches[0])
        if torch.compiler.is_compiling() and choice.selected != "always":
            return None  # compilers see torch's operators
        plan = self._plan_for(x, cut, source)
        if plan is None:
            return None
        contexts: list[Any] | None = [] if again else None
        y = self._serve(plan, x, cut, update, then, contexts, source)
        if contexts and y is not None:
            call = plan.calls[update]
            chosen = statistics_of(plan.backend, call, contexts[0], x)
            self._recent.note(x, chosen, source, update)
        return y

    def _serve(
        self,
        plan: ExecutionPlan,
        x: Tensor,
        cut: Partition,
        update: bool,
        then: Activation | None,
        contexts: list[Any] | None,
        source: ReductionScope | None,
    ) -> Tensor | None:
        """The forward by a plan; None where it cannot serve the values that contribute."""
        given, step = None, self.step
        if source is not None or step is not None:
            counts = (source or ReductionScope()).counts(x, cut.sizes)
            if min(counts) < 2:
                only_aten("too few valid values for statistics")
                return None
            given = Contribution(counts, source, self, step)
        aside = {} if step is None else step.rewind(self, "", update)
        try:
            how = self._kernel_state(x), update, then, contexts, given
            return run_plan(plan, x, self._rows(), self, *how)
        finally:
            if step is not None:
                step.leave(self, "", aside, update)

    def _plan_for(
        self, x: Tensor, cut: Partition, source: ReductionScope | None
    ) -> ExecutionPlan | None:
        """The plan by which compiled kernels serve a batch; None if they do not."""
        beyond, rows = self._beyond(source is not None), self._rows()
        key: Any = (x.shape, beyond) if beyond else x.shape
        if not beyond and self.outlier_limit is not None:
            beyond = f"outlier_limit={self.outlier_limit}: channels are compared with the state"
        remembers = not is_traced() and self._group is None and self.steady
        known = self._plans.get(key) if remembers and self._plans is not None else None
        if known is not None and known.fits(x, rows):
            return known if isinstance(known, ExecutionPlan) else None
        call, plan = self._call(x, cut), None
        if isinstance(call, str):
            only_aten(call)
        else:
            plan = find_plan(call._replace(beyond=beyond), x, rows, self)
        if remembers:
            self._plans = with_plan(self._plans, key, plan or Refusal.of(x))
        return plan

    def _call(self, x: Tensor, cut: Partition) -> NormCall | str:
        """The call by which kernels go through a batch, or the reason why they do not."""
        spec = self.method_spec(x, cut)
        if isinstance(spec, str):
            return spec
        formula = self.formula(x, cut, None)
        how = (cut, self.num_statistics, self.eps, True, spec)
        return NormCall(*how, update_weight=self._number(), formula=formula)

    def _beyond(self, masked: bool) -> str:
        """Reason why not simply all values of the batch contribute to statistics; "" if they do."""
        return _MASKED if masked else "" if self.step is None else _ACCUMULATED

    def _run_cached_plan(
        self, x: Tensor, then: Activation | None, mask: Tensor | None
    ) -> Tensor | None:
        """Run the cached plan, if shape, layout and settings still match."""
        plans = self._plans  # which another thread may take away
        if plans is None or self.memories > 1 or torch.compiler.is_compiling():
            return None  # with several memories plans are of the part that one of them takes
        beyond = mask is not None or self.step is not None
        plan = plans.get((x.shape, self._beyond(mask is not None)) if beyond else x.shape)
        if not isinstance(plan, ExecutionPlan) or not runs_once():
            return None
        rows = weight, bias, mean, var = self._rows()
        if not plan.fits(x, rows):
            return None
        if beyond:
            if self.step is not None and not updates.enabled:
                return None
            cut = partition(x.shape[0], self.norm_batch_size, self.group_size)
            source = None if mask is None else self._source(x, mask, True)
            return self._serve(plan, x, cut, updates.enabled, then, None, source)
        inside = then is not None
        if inside and not (plan.takes_relu and then.is_plain()):  # type: ignore[union-attr]
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


def _leading(cut: Partition) -> tuple[int, ...]:
    return () if len(cut.sizes) == 1 else (len(cut.sizes),)
