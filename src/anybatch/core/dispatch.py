"""The choice of the backend that serves a batch, remembered by shape and layout."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.backends import BACKENDS, choice
from anybatch.backends.native_memory import CheckedMemory
from anybatch.backends.protocol import Backend, Contribution, KernelFailure, NormCall, Rows
from anybatch.backends.torch_library import state_of
from anybatch.core.autograd import Normalize, Pass, WithBackwardMemory, apply_plain
from anybatch.core.fused_activation import Activation
from anybatch.core.kernel_guard import fault_of, refuse
from anybatch.core.transforms import is_wrapped

MOST_PLANS = 16  # shapes of batches that a layer remembers


class ExecutionPlan(NamedTuple):
    """The way in which batches of one shape and layout are served, while settings do not change.

    Attributes:
        backend: Serves them.
        calls: How the layer goes through them, without and with an update of its state.
        dtype: Type of the batches.
        strides: Of the batches.
        takes_relu: Whether the backend applies a ReLU too.
        rows: Those of the layer to which the backend had no objection.
    """

    backend: Backend
    calls: tuple[NormCall, NormCall]
    dtype: torch.dtype
    strides: tuple[int, ...]
    takes_relu: bool
    rows: CheckedMemory

    def fits(self, x: Tensor, rows: Rows) -> bool:
        """True if a batch of the same shape still is one of these."""
        if x.dtype is not self.dtype or x.stride() != self.strides or is_wrapped(x):
            return False
        if self.rows.find(rows) is not None:
            return self.backend.memory_obstacle(x, ()) is None
        if self.backend.memory_obstacle(x, rows) is not None:
            return False
        self.rows.keep(rows, True)
        return True


class Refusal(NamedTuple):
    """Batches of one shape and layout that torch's operators alone serve.

    Attributes:
        choice: Of backends, see `anybatch.use_fused`.
        dtype: Type of the batches.
        strides: Of the batches.
        negated: Whether they are yet to be negated, or zeros without memory.
    """

    choice: str
    dtype: torch.dtype
    strides: tuple[int, ...]
    negated: bool

    @classmethod
    def of(cls, x: Tensor) -> "Refusal":
        """For batches like this one."""
        return cls(choice.selected, x.dtype, x.stride(), x.is_neg() or x._is_zerotensor())

    def fits(self, x: Tensor, rows: Rows) -> bool:
        """True if a batch of the same shape still is one of these."""
        return self == Refusal.of(x)


# By shape, or by shape and what contributes beyond the batch.
Plans = dict[Any, ExecutionPlan | Refusal]
Choice = tuple[str, dict[str, str]]  # the backend, and why those asked before it do not serve


class _Listener(threading.local):
    choices: list[Choice] | None = None


_listener = _Listener()


@contextmanager
def choices_made() -> Iterator[list[Choice]]:
    """A context that lists the choices which forwards of this thread make anew."""
    before, found = _listener.choices, list[Choice]()
    _listener.choices = found
    try:
        yield found
    finally:
        _listener.choices = before


def only_aten(obstacle: str) -> None:
    """Say why only torch's operators serve a batch."""
    if not torch.compiler.is_compiling() and _listener.choices is not None:
        _listener.choices.append(("aten", {one.name: obstacle for one in BACKENDS[:-1]}))


def find_plan(call: NormCall, x: Tensor, rows: Rows, layer: Any) -> ExecutionPlan | None:
    """Ask the backends in turn; None where only torch's operators serve a batch.

    Args:
        call: How the layer would go through it.
        x: The batch.
        rows: Weight, bias, running mean and running variance of the layer.
        layer: The layer.
    """
    reasons: dict[str, str] = {}
    plan = None
    for backend in layer.asked:
        obstacle = call.beyond or None
        if obstacle is None or call.spec.family in backend.takes_scopes:
            obstacle = backend.supports(call, x, rows)
        if obstacle is None and not torch.compiler.is_compiling():
            obstacle = fault_of(backend, call, x, layer)
        if obstacle is None:
            call = backend.prepare(call, x)
            calls = call._replace(update=False), call._replace(update=True)
            takes_relu = call.spec.family in backend.takes_relu
            plan = ExecutionPlan(backend, calls, x.dtype, x.stride(), takes_relu, CheckedMemory())
            break
        reasons[backend.name] = obstacle
    if not torch.compiler.is_compiling() and _listener.choices is not None:
        _listener.choices.append(("aten" if plan is None else plan.backend.name, reasons))
    return plan


def with_plan(plans: Plans | None, key: Any, plan: ExecutionPlan | Refusal) -> Plans:
    """The plans with one more, or it alone where there are too many."""
    found = {} if plans is None or len(plans) >= MOST_PLANS else plans
    found[key] = plan
    return found


def run_plan(
    plan: ExecutionPlan,
    x: Tensor,
    rows: Rows,
    layer: WithBackwardMemory,
    state: tuple[Any, ...],
    update: bool,
    then: Activation | None = None,
    contexts: list[Any] | None = None,
    given: Contribution | None = None,
) -> Tensor | None:
    """Normalize a batch by a plan; None where its kernels fail, and state is as it was.

    Args:
        plan: The plan.
        x: A batch that fits it.
        rows: Weight, bias, running mean and running variance of the layer.
        layer: The layer.
        state: Running mean, running variance and number of batches, and what the method adds.
        update: Whether state may change.
        then: A ReLU that follows, or None.
        contexts: Takes what the backend keeps of the forward; None where nobody asks.
        given: What contributes to the statistics; None for all values of the batch.
    """
    inside = then is not None and plan.takes_relu and then.is_plain() and given is None
    residual = then.residual if then is not None and inside else None
    call = plan.calls[update]
    if given is not None:
        call, state = call._replace(scope=given.scope), (*state, given)
    if torch.compiler.is_compiling():
        how, traced = Pass(plan.backend, call), (*state, *state_of(call.spec))
        y = Normalize.apply(x, *rows[:2], residual, how, *traced)  # type: ignore[no-untyped-call]
    else:
        how = Pass(plan.backend, call, layer, state, inside, contexts)
        try:
            apply = Normalize.apply if is_wrapped(x) else apply_plain  # it outlived its transform
            y = apply(x, rows[0], rows[1], residual, how)
        except KernelFailure as failure:
            refuse(plan.backend, call, x, layer, failure)
            return None
    return y if then is None or inside else then.of(y, fresh=True)
