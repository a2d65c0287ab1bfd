"""The one autograd function: every method, every backend."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from anybatch.backends import ATEN, is_plain, is_traced
from anybatch.backends.aten import recorded
from anybatch.backends.protocol import (
    Backend,
    BackwardMemory,
    Formula,
    KernelFailure,
    NormCall,
    Scope,
    Statistics,
)
from anybatch.core.kernel_guard import refuse
from anybatch.core.statistics import stack


class WithBackwardMemory(Protocol):
    """A layer, as a gradient by torch's operators needs it."""

    def memory_of_backward(
        self, chosen: Statistics, count: int, update: bool
    ) -> BackwardMemory | None:
        """Averages that stand in for the batch's statistics in the backward pass."""


class Pass(NamedTuple):
    """One forward pass, and what its backward pass needs beside tensors.

    Attributes:
        backend: Serves both.
        call: How the layer goes through the batch.
        layer: The layer; None for torch's operators.
        state: Running mean, running variance and number of batches, and what a method adds; () for
            torch's operators.
        relu: Whether a ReLU follows.
        contexts: Takes what the backend keeps of the forward; None where nobody asks.
    """

    backend: Backend
    call: NormCall
    layer: WithBackwardMemory | None = None
    state: tuple[Any, ...] = ()
    relu: bool = False
    contexts: list[Any] | None = None


class Normalize(torch.autograd.Function):
    """Normalization by a backend, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        how: Pass,
        *traced: Tensor | None,
    ) -> Tensor:
        """Normalize; `traced` is the state where a compiler has to see it."""
        backend, call, layer, state, relu, contexts = how
        y, saved, context = backend.forward(call, x, weight, bias, residual, traced or state, relu)
        ctx.save_for_backward(x, weight, *saved)
        ctx.how = backend, call, layer, context, len(traced)
        if contexts is not None:
            contexts.append(context)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, scale, shift and residual."""
        x, weight, *saved = ctx.saved_tensors
        backend, call, layer, context, traced = ctx.how
        needs = ctx.needs_input_grad
        if dy.dtype != x.dtype:
            dy = dy.to(x.dtype)
        again = torch.is_grad_enabled()
        if not (again or traced or is_traced()) and is_plain(dy):
            try:
                return *backend.backward(call, context, dy, x, weight, saved, needs), None
            except KernelFailure as failure:
                refuse(backend, call, x, layer, failure)
        if traced or torch.compiler.is_compiling():
            if again:
                refuse_derivative("create_graph=True", "a compiler traces its gradient")
            grads = backend.backward(call, context, dy, x, weight, saved, needs)
            return *grads, *(None,) * (1 + traced)
        if call.statistics is None:
            for y in saved:  # of a ReLU
                dy = dy.masked_fill(y <= 0, 0)
            statistics = statistics_of(backend, call, context, x)
            assert layer is not None
            memory = layer.memory_of_backward(statistics, x.numel() // x.shape[1], call.update)
            call = call._replace(statistics=statistics, memory=memory)
        residual = dy if needs[3] else None
        if again or is_batched(dy):
            reason = recorded.obstacle(call)
            if reason is not None:
                how = "create_graph=True" if again else "a batch of gradients"
                refuse_derivative(how, reason)
            return *recorded.gradients(dy, x, weight, call, needs), residual, None
        dx, dw, db, _ = ATEN.backward(call, None, dy, x, weight, (), needs)
        return dx, dw, db, residual, None


# `Normalize.apply` without what `Function.apply` looks for first, which costs a small batch as much
# as most of the loops: transforms, of which there is none where a batch is served, and tensors that
# outlived one.
apply_plain: Callable[..., Tensor] = super(torch.autograd.Function, Normalize).apply


def normalize_by(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    statistics: Statistics,
    eps: float,
    memory: BackwardMemory | None = None,
    scope: Scope | None = None,
    formula: Formula | None = None,
) -> Tensor:
    """Normalize ``x`` by given statistics, with torch's operators.

    Args:
        x: ``(N, C, ...)``.
        weight: Scale, ``(C,)`` or None.
        bias: Shift, ``(C,)`` or None.
        sizes: Examples in each group; they sum to N.
        statistics: Those to normalize by.
        eps: Added to the variance.
        memory: Averages of the backward statistics, or None for the batch's own.
        scope: Which elements contribute to the statistics; None for all of the batch.
        formula: The method's own gradient, or None for that of all.

    Returns:
        A tensor of the shape, type and memory format of ``x``.
    """
    batch_weight = statistics.batch_weight
    if torch.compiler.is_compiling() and not isinstance(batch_weight, Tensor) and batch_weight == 1:
        # To a compiler of dynamic shapes a tuple's default is a variable, which backward lacks.
        statistics = statistics.weighted(1.0)
    call = NormCall(
        (sizes, (len(sizes),), (sum(sizes),)),
        statistics.var.shape[-1],
        eps,
        False,
        formula=formula,
        statistics=statistics,
        memory=memory,
        scope=scope,
    )
    if recorded.is_transformed():
        reason = recorded.obstacle(call)
        if reason is not None:
            refuse_derivative("torch.func or forward-mode differentiation", reason)
        return recorded.normalize(x, weight, bias, call)
    y: Tensor = Normalize.apply(x, weight, bias, None, Pass(ATEN, call))  # type: ignore[no-untyped-call]
    return y


def statistics_of(backend: Backend, call: NormCall, context: Any, like: Tensor) -> Statistics:
    """The statistics of a forward as one table."""
    parts = backend.statistics(call, context, like)
    return parts[0] if len(parts) == 1 else stack(parts)


def is_batched(dy: Tensor) -> bool:
    """True if a gradient is one of a batch of gradients (``is_grads_batched``, ``jacobian``)."""
    legacy = torch._C._functorch.is_legacy_batchedtensor(dy)
    return bool(legacy or torch._C._functorch.is_batchedtensor(dy))


def refuse_derivative(how: str, reason: str) -> NoReturn:
    """Raise for a derivative that a method does not have.

    Args:
        how: What asks for it.
        reason: Why the method has none.
    """
    raise RuntimeError(
        f"{how}: this anybatch layer has no such derivative here, as {reason}; freeze its "
        "statistics (anybatch.freeze, or evaluation mode with running statistics), or convert to "
        '"bn", "ghost", "brn", "bgn" or "mbn"'
    )
