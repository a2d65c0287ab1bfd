"""Each method against the reference, step by step, across every warm-up and window boundary."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from anybatch.backends import use_fused
from anybatch.registry import METHODS
from reference_cases import CASES, CHANNELS, LAST, SHAPES, check, drifting, flat, pair

STEPS = 44


def run(case: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> None:
    """Train both for STEPS steps, then infer with several example weights."""
    # Two values a statistic may nearly coincide, and 1 / sigma then magnifies float32's rounding
    # without a bound: there eps gives one.
    eps = 1e-2 if dtype == torch.float32 and not shape else 1e-5
    layer, truth = pair(case, max(len(shape), 1), dtype, eps)
    truth.spatial = shape
    for step in range(STEPS):
        if step % 10 == 0 and hasattr(truth, "set_progress"):
            layer.set_progress(step // 10 + 1, 5)
            truth.set_progress(step // 10 + 1, 5)
        # The reference gets the input as the layer sees it, rounded to its type.
        x = drifting(step, shape).to(dtype)
        dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
        if last:
            x = x.contiguous(memory_format=LAST[x.dim()])
        x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        expected, backward = truth.forward(flat(x))
        dx, dw, db = backward(flat(dy))
        check(y, expected.reshape(x.shape), dtype, f"output, step {step}")
        check(x.grad, dx.reshape(x.shape), dtype, f"input gradient, step {step}")
        check(layer.weight.grad, dw, dtype, f"weight gradient, step {step}")
        check(layer.bias.grad, db, dtype, f"bias gradient, step {step}")
        state, own = layer.state_dict(), truth.state()
        assert set(state) == {*own, "weight", "bias"}
        for name, value in own.items():
            check(state[name], value, dtype, f"{name}, step {step}")
    layer.eval()
    for alpha in (0.0, 0.3, 1.0):
        layer.example_weight = truth.example_weight = alpha
        x = drifting(STEPS, shape).to(dtype)
        if alpha == 1.0 and not shape:  # one value an example has no variance
            continue
        check(layer(x), truth.infer(flat(x)).reshape(x.shape), dtype, f"inference, {alpha}")


@pytest.fixture(params=["compiled", "aten"])
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small CPU batches take the compiled path where Numba is installed."""
    use_fused("auto" if request.param == "compiled" else "never")
    yield
    use_fused("auto")


@pytest.mark.few(16)
@pytest.mark.usefixtures("_path")
@pytest.mark.pairs("case", "_path")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_layer_is_the_papers_equations(
    case: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    run(case, shape, dtype)


@pytest.mark.few(4)
@pytest.mark.parametrize("case", CASES)
def test_channels_last_is_the_papers_equations(case: str) -> None:
    run(case, SHAPES["(N, C, H, W)"], torch.float64, last=True)
    run(case, SHAPES["(N, C, D, H, W)"], torch.float64, last=True)


@pytest.mark.few(12)
@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_inference_gradient_is_that_of_the_equations(case: str, alpha: float) -> None:
    layer, truth = pair(case, 2, torch.float64)
    truth.spatial = (3, 2)
    for step in range(20):
        x = drifting(step, (3, 2))
        layer(x)
        truth.forward(flat(x))
    layer.eval()
    layer.example_weight = truth.example_weight = alpha
    x = drifting(20, (3, 2)).requires_grad_()
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    same = flat(x).clone().requires_grad_()
    for parameter in (truth.weight, truth.bias):
        parameter.requires_grad_()
    truth.infer(same).backward(flat(dy))
    check(x.grad, same.grad.reshape(x.shape), torch.float64, "input gradient")
    check(layer.weight.grad, truth.weight.grad, torch.float64, "weight gradient")
    check(layer.bias.grad, truth.bias.grad, torch.float64, "bias gradient")


@pytest.mark.few(6)
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("mabn")])
def test_the_gradient_of_batch_statistics_is_exact(case: str) -> None:
    """r, d and old averages are constants, so they are held still while inputs are moved."""
    layer, _ = pair(case, 2, torch.float64)
    if case.startswith("mbn"):
        layer.set_progress(2, 3)
    for step in range(14):
        layer(drifting(step, (3, 2)))
    x = drifting(3, (3, 2)).requires_grad_()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        import anybatch

        parameters = {"weight": weight, "bias": bias}
        with anybatch.no_update():
            y: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return y

    if case.startswith("brn"):  # between its limits r and d move with the input
        layer.method_state["step"].zero_()
        layer.warmup_steps = 10**6
        layer.smooth = False
    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_batch_norm_is_torchs(dims: int, last: bool, dtype: torch.dtype) -> None:
    shape = (3, 4, 2)[:dims]
    kind = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)[dims - 1]
    ours, theirs = METHODS["bn"].build(CHANNELS, dims, dtype=dtype), kind(CHANNELS, dtype=dtype)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    for step in range(5):
        x = drifting(step, shape).to(dtype)
        if last and dims > 1:
            x = x.contiguous(memory_format=LAST[x.dim()])
        dy, grads = torch.randn_like(x), []
        for layer in (ours, theirs):
            inner = x.clone(memory_format=torch.preserve_format).requires_grad_()
            layer.zero_grad()
            y = layer(inner)
            y.backward(dy)
            grads.append([y, inner.grad, layer.weight.grad, layer.bias.grad])
        for a, b in zip(*grads, strict=True):
            close = 1e-5 if dtype == torch.float32 else 1e-12
            assert torch.allclose(a, b, rtol=close, atol=close)
            assert a.stride() == b.stride()
    for key, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, rtol=1e-6)
