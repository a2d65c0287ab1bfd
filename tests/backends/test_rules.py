"""Rules: one source in torch's operators, Numba's loops and Triton's interpreter."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.backends import use_fused
from anybatch.core.grouping import partition
from anybatch.core.norm_layer import NormLayer
from anybatch.core.rule import (
    Average,
    Counter,
    Number,
    Row,
    State,
    Window,
    chosen,
    clamp,
    lerp,
    maximum,
    method_of,
    minimum,
    rule,
    sqrt,
    where,
)
from interpreter import cpu_batches_take_gpu_kernels
from method_cases import make

# Numbers that are not finite are meant; numpy tells of them where it interprets.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SLOWEST = 0.9  # a number of the module, which a rule may use


@rule
def trusted(step, warmup_steps, trust):
    """How much of the batch's statistics is used."""
    return where(step > warmup_steps, minimum(trust, SLOWEST), 1.0)


class Steady2d(NormLayer):
    """A method that the library does not have: slow averages take a part of each statistic."""

    dims = 2
    state = State(
        slow_mean=Average(("mean",), "slow"), slow_var=Average(("var",), "slow"), step=Counter()
    )

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, **common)
        self.slow, self.trust, self.warmup_steps = 0.2, 0.6, 2
        self.declare_state()

    @rule
    def choose(mean, var, old_slow_mean, old_slow_var, step, warmup_steps, trust):
        batch_weight = trusted(step, warmup_steps, trust)
        return chosen(
            lerp(old_slow_mean, mean, batch_weight),
            lerp(old_slow_var, var, batch_weight),
            batch_weight=batch_weight,
        )


class Recent2d(NormLayer):
    """Windows, a row, a number, r and d, and a counter of complete steps."""

    dims = 2
    needs_running_stats = True
    state = State(
        means=Window(("mean",), "length"),
        variances=Window(("var",), "length"),
        last=Row(("applied_var",)),
        step=Counter(complete=True),
        scale=Number(),
    )

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, **common)
        self.length, self.most = 3, 1.5
        self.declare_state()
        self.method_state["scale"].fill_(0.9)

    @rule
    def choose(
        mean,
        var,
        running_mean,
        running_var,
        means_mean,
        variances_var,
        variances_full,
        old_last,
        step,
        scale,
        length,
        most,
        eps,
    ):
        late = step > length
        applied_mean = where(late, where(variances_full, means_mean, mean), mean)
        used = where(late, where(variances_full, variances_var, var), var)
        before = where(step > 1, old_last, used)
        r = clamp(sqrt((used + eps) / (maximum(before, running_var) + eps)), 1 / most, most) * scale
        d = clamp((applied_mean - running_mean) / sqrt(running_var + eps), -most, most)
        return chosen(applied_mean, used, r=r, d=d)


class Psi2d(NormLayer):
    """The uncentered form, with an average of the backward pass from the third step on."""

    dims = 2
    centered = False
    needs_running_stats = True
    state = State(
        running="used", step=Counter(), backward_psi=Row(("psi",)), backward_step=Counter()
    )

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, **common)
        self.part = 0.75
        self.declare_state()

    @rule
    def choose(mean, var, running_var, step):
        return chosen(mean, maximum(var, 0.5 * running_var), use_batch_stats=step < 3)

    @rule
    def average(psi, old_backward_psi, backward_step, part):
        return lerp(psi, old_backward_psi, where(backward_step > 1, part, 0.0))


def reference_steady(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and gradients of `Steady2d`, straight from its definition."""
    slow_mean = slow_var = torch.zeros(())
    for step, (x, dy) in enumerate(data(steps), 1):
        x = x.double().requires_grad_()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        batch_weight = 0.6 if step > 2 else 1.0
        applied_mean = batch_weight * mean + (1 - batch_weight) * slow_mean
        applied_var = batch_weight * var + (1 - batch_weight) * slow_var
        shape = (1, -1, 1, 1)
        y = (x - applied_mean.view(shape)) / (applied_var.view(shape) + 1e-5).sqrt()
        (gradient,) = torch.autograd.grad(y, x, dy.double())
        speed = 1.0 if step == 1 else 0.2
        slow_mean = (slow_mean + speed * (mean - slow_mean)).detach()
        slow_var = (slow_var + speed * (var - slow_var)).detach()
        yield y.detach(), gradient


def reference_recent(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and gradients of `Recent2d`, straight from its definition."""
    shape = (1, -1, 1, 1)
    means: list[Tensor] = []
    variances: list[Tensor] = []
    running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
    last = torch.zeros(3).double()
    for step, (x, dy) in enumerate(data(steps), 1):
        x, dy = x.double(), dy.double()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        means, variances = [*means, mean][-3:], [*variances, var][-3:]
        late = step > 3
        applied_mean = torch.stack(means).mean(0) if late else mean
        applied_var = torch.stack(variances).mean(0) if late else var
        before = last if step > 1 else applied_var
        limit = torch.maximum(before, running_var) + 1e-5
        r = ((applied_var + 1e-5) / limit).sqrt().clamp(1 / 1.5, 1.5) * 0.9
        d = ((applied_mean - running_mean) / (running_var + 1e-5).sqrt()).clamp(-1.5, 1.5)
        inverse = (applied_var + 1e-5).rsqrt().view(shape)
        z = (x - applied_mean.view(shape)) * inverse
        g = dy * r.view(shape)
        mean_g, psi = (g.mean((0, 2, 3), keepdim=True), (g * z).mean((0, 2, 3), keepdim=True))
        yield z * r.view(shape) + d.view(shape), (g - mean_g - z * psi) * inverse
        last, count = applied_var, x.numel() // x.shape[1]
        running_mean = running_mean + 0.1 * (mean - running_mean)
        running_var = running_var + 0.1 * (var * count / (count - 1) - running_var)


def reference_psi(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and gradients of `Psi2d`, straight from its definition."""
    average, running = torch.zeros(3).double(), torch.ones(3).double()
    for step, (x, dy) in enumerate(data(steps), 1):
        x, dy = x.double(), dy.double()
        used = torch.maximum(x.square().mean((0, 2, 3)), 0.5 * running)
        inverse = (used + 1e-5).rsqrt().view(1, -1, 1, 1)
        psi = (dy * x * inverse).mean((0, 2, 3))
        average = psi + 0.75 * (average - psi) if step > 1 else psi
        used_psi = psi if step < 3 else average
        yield x * inverse, (dy - x * inverse * used_psi.view(1, -1, 1, 1)) * inverse
        running = running + 0.1 * (used - running)


REFERENCES = {Steady2d: reference_steady, Recent2d: reference_recent, Psi2d: reference_psi}


def data(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches and gradients of their outputs."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x, dy = (torch.randn(4, 3, 3, 2, generator=generator) for _ in range(2))
        yield x * (1 + step / 4) + step / 3, dy


@pytest.fixture(params=["aten", "numba", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that serves batches."""
    if request.param != "aten":
        module = pytest.importorskip(request.param)
        old = tuple(map(int, module.__version__.split(".")[:2])) < (3, 3)
        if request.param == "triton" and old:
            pytest.skip("the interpreter of Triton 3.2 stores where a mask is false")
    use_fused("never" if request.param == "aten" else "auto")
    try:
        if request.param == "triton":
            with cpu_batches_take_gpu_kernels():
                yield request.param
        else:
            yield request.param
    finally:
        use_fused("auto")


@pytest.mark.few(4)
@pytest.mark.parametrize("layer_class", REFERENCES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.exhaustive)]
)
def test_a_method_of_a_user_is_right_in_every_backend(
    layer_class: type[NormLayer], dtype: torch.dtype, backend: str
) -> None:
    layer = layer_class(3, dtype=dtype)
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if exact else {"rtol": 2e-4, "atol": 2e-5}
    for (x, dy), (wanted, gradient) in zip(data(7), REFERENCES[layer_class](7), strict=True):
        x = x.to(dtype).requires_grad_()
        y = layer(x)
        y.backward(dy.to(dtype))
        torch.testing.assert_close(y.detach().double(), wanted, **tolerance)
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), gradient, **tolerance)
    if backend != "aten":
        plan = layer._plans[x.shape]
        assert plan.backend.name == backend
    layer.load_state_dict(pickle.loads(pickle.dumps(layer)).state_dict())


@pytest.mark.few(1)
@pytest.mark.parametrize("layer_class", REFERENCES)
def test_a_step_that_is_not_finite_moves_no_state_of_its_channel(
    layer_class: type[NormLayer], backend: str
) -> None:
    layer = layer_class(3)
    for number, (x, dy) in enumerate(data(4)):
        if number == 2:
            x[0, 1, 0, 0] = torch.inf
        x.requires_grad_()
        layer(x).backward(dy)
    for name, tensor in layer.state_dict().items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost", "bgn"])
def test_every_method_of_a_rule_describes_itself_to_kernels(name: str) -> None:
    layer = make(name, 8)
    assert not isinstance(layer.method_spec(torch.ones(4, 8), partition(4)), str)


def test_a_rule_is_plain_python_on_numbers() -> None:
    mean, var, r, d, batch_weight, own = Steady2d.choose(1.0, 2.0, 3.0, 4.0, 3, 2, 0.5)
    assert (mean, var, r, d, batch_weight, own) == (2.0, 3.0, None, None, 0.5, None)


def test_a_rule_that_no_backend_can_run_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="uses 'print': it may use the functions sqrt"):

        class Prints(NormLayer):
            @rule
            def choose(mean, var):
                print(mean)
                return chosen(mean, var)

    with pytest.raises(TypeError, match="7 options; kernels have room for 6"):

        class Asks(NormLayer):
            @rule
            def choose(mean, var, a, b, c, d, e, f, g):
                return chosen(mean * a * b * c * d * e * f * g, var)

    around = 1.0
    with pytest.raises(TypeError, match="no variable of a function around it"):

        @rule
        def closed(mean, var):
            return chosen(mean + around, var)

    with pytest.raises(TypeError, match="recent: a window needs a Counter"):
        method_of(None, None, State(recent=Window(("var",), "length")))


class Tuned2d(NormLayer):
    """A number that may change between steps."""

    dims = 2
    needs_running_stats = True
    state = State(scale=Number())

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, **common)
        self.declare_state()

    @rule
    def choose(mean, var, scale):
        return chosen(mean, var * scale)


def test_a_number_is_read_at_each_step() -> None:
    found = []
    for choice in ("auto", "never"):
        use_fused(choice)
        layer, seen = Tuned2d(3), []
        for step, (x, dy) in enumerate(data(4), 1):
            layer.method_state["scale"].fill_(1.0 + step)
            x = x.requires_grad_()
            y = layer(x)
            y.backward(dy)
            seen += [y.detach(), x.grad]
        found.append(seen)
    use_fused("auto")
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
