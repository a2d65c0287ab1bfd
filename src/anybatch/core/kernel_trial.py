"""Trials: kernels of a backend beside torch's operators, on small batches of fixed numbers.

A layer trains for some steps by the kernels, by torch's operators in the same type, and by these in
float64. Kernels agree if no error of theirs against float64 (of output, gradients and state) is
more than twice that of torch's operators, or than rounding of the statistics explains.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch.backends import statistics_dtype
from anybatch.backends.protocol import Backend
from anybatch.core.method import Average, Counter, Number, Row, Window

MARGIN = 2.0  # times the error of torch's operators
ROUNDING = 32.0  # units in the last place of the statistics, below which no error is compared
STEPS = 2  # with fresh state; then as many beyond every warm-up


class Outcome(NamedTuple):
    """The result of a trial.

    Attributes:
        errors: By what was compared: the kernels' error, and the most that it may be.
        fault: What disagrees or fails; None if nothing does.
    """

    errors: dict[str, tuple[float, float]]
    fault: str | None


def try_kernels(
    make: Callable[[], Any], backend: Backend, shape: tuple[int, ...], like: Tensor, last: bool
) -> Outcome:
    """Compare the kernels of a backend with torch's operators.

    It runs in a thread of its own: modes, hooks and gradients of the caller's play no part.

    Args:
        make: Gives a layer in training mode, the same with every call.
        backend: The backend; it must serve such batches.
        shape: Of a batch.
        like: A tensor of the batch's type and device.
        last: Whether channels are last in memory.

    Returns:
        The errors, and the fault if there is one.
    """
    stream = torch.cuda.current_stream(like.device) if like.is_cuda else None

    def run() -> Outcome:
        with torch.cuda.stream(stream):
            given = _batches(shape, like, last)
            torchs = _train(make(), (), given)
            exact = _train(make().double(), (), [(x.double(), dy.double()) for x, dy in given])
            try:
                found = _train(make(), (backend,), given)
            except Exception as error:
                return Outcome({}, f"{type(error).__name__}: {first_line(error)}")
        rounding = ROUNDING * torch.finfo(statistics_dtype(like)).eps
        errors = {
            name: (_apart(found[name], value), max(MARGIN * _apart(torchs[name], value), rounding))
            for name, value in exact.items()
        }
        wrong = [
            f"{n}: error {e:.2g}, at most {m:.2g}" for n, (e, m) in errors.items() if not e <= m
        ]
        return Outcome(errors, "; ".join(wrong) or None)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def twin_of(layer: Any) -> Any:
    """A layer with the settings of another, and parameters and state of its own."""
    twin, chance = copy.copy(layer), torch.Generator().manual_seed(1)

    def fresh(like: Tensor) -> nn.Parameter:
        values = torch.rand(like.shape, generator=chance, dtype=torch.float64) + 0.5
        return nn.Parameter(values.to(like))

    of, kept, method_state = layer._parameters, layer._buffers, layer.method_state
    twin.__dict__["_parameters"] = {n: None if p is None else fresh(p) for n, p in of.items()}
    twin.__dict__["_buffers"] = {n: None if t is None else t.clone() for n, t in kept.items()}
    twin.__dict__["method_state"] = {name: tensor.clone() for name, tensor in method_state.items()}
    nn.modules.batchnorm._NormBase.reset_running_stats(twin)
    for name, one in twin.method.state.kept:
        if not isinstance(one, Number):  # which schedules and batch sizes set
            twin.method_state[name].zero_()
    return twin


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def _batches(shape: tuple[int, ...], like: Tensor, last: bool) -> list[tuple[Tensor, Tensor]]:
    """Inputs and gradients of outputs; examples side by side differ by more than chance."""
    chance, found = torch.Generator().manual_seed(0), []
    sign = torch.tensor([1.0, -1.0]).repeat(-(-shape[0] // 2))[: shape[0]]
    for _ in range(2 * STEPS):
        x, dy = (torch.randn(shape, generator=chance) for _ in range(2))
        x = 0.5 * x + sign.view(-1, *(1,) * (len(shape) - 1)) + 2
        found.append((_placed(x, like, last), _placed(dy, like, last)))
    return found


def _placed(values: Tensor, like: Tensor, last: bool) -> Tensor:
    values = values.to(like)
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if last else values


def _train(
    layer: Any, backends: tuple[Backend, ...], given: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Outputs, gradients and state of all steps, by name, in float64 on the CPU."""
    found: dict[str, list[Tensor]] = {}
    layer.asked = backends
    for number, (x, dy) in enumerate(given):
        if number == STEPS:
            _advance(layer)
        x = x.detach().requires_grad_()
        layer.zero_grad()
        y = layer.forward(x)
        if backends and y.grad_fn.how[0] is not backends[0]:
            raise RuntimeError(f"{backends[0].name} does not serve the batch")
        y.backward(dy)
        parameters = dict(layer.named_parameters())
        step = {"output": y, "input gradient": x.grad}
        step |= {f"{name} gradient": p.grad for name, p in parameters.items()}
        step |= {name: t for name, t in layer.state_dict().items() if name not in parameters}
        for name, value in step.items():
            found.setdefault(name, []).append(value.detach().double().cpu().flatten().clone())
    return {name: torch.cat(values) for name, values in found.items()}


def _advance(layer: Any) -> None:
    """State of the method as after a long training, so that no warm-up hides a term of the rule."""
    chance = torch.Generator().manual_seed(2)
    for name, kept in layer.method.state.kept:
        tensor = layer.method_state[name]
        if isinstance(kept, Counter):
            tensor.fill_(10**6)
        elif isinstance(kept, (Row, Average, Window)):
            tensor.copy_(torch.rand(tensor.shape, generator=chance, dtype=torch.float64) + 0.5)


def _apart(values: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, in proportion where the values are above 1."""
    scale = exact.square().mean().sqrt().clamp(min=1)
    return float((values - exact).square().mean().sqrt() / scale)
