"""Each method against the reference, step by step, across every warm-up and window boundary."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from anybatch.backends import use_fused
from anybatch.registry import METHODS
from tolerances import tolerance

STEPS = 44
MABN = {"window": 4, "warmup_steps": 7, "renorm_warmup_steps": 15, "momentum": 0.1, "clip": 1.3}
BRN = {"warmup_steps": 12, "max_r": 1.2, "max_d": 0.3, "momentum": 0.1}
CASES: dict[str, tuple[str, type[reference.Layer], dict[str, Any]]] = {
    "bn": ("bn", reference.BatchNorm, {}),
    "bn cumulative": ("bn", reference.BatchNorm, {"momentum": None}),
    "bn norm 2": ("bn", reference.BatchNorm, {"norm_batch_size": 2}),
    "mbn": ("mbn", reference.MomentumBatchNorm, {"batch_size": 3, "ideal_batch_size": 20}),
    "mbn cumulative": ("mbn", reference.MomentumBatchNorm, {"batch_size": 3, "momentum": None}),
    "mbn norm 2": ("mbn", reference.MomentumBatchNorm, {"batch_size": 2, "norm_batch_size": 2}),
    "brn": ("brn", reference.BatchRenorm, BRN),
    "brn smooth": ("brn", reference.BatchRenorm, {**BRN, "smooth": True}),
    "brn norm 2": ("brn", reference.BatchRenorm, {**BRN, "norm_batch_size": 2}),
    "brn cumulative": ("brn", reference.BatchRenorm, {**BRN, "momentum": None}),
    "mabn": ("mabn", reference.MovingAverageBatchNorm, MABN),
    "mabn cumulative": ("mabn", reference.MovingAverageBatchNorm, {**MABN, "momentum": None}),
    "mabn window over warm-up": (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "window": 9, "warmup_steps": 3, "renorm_warmup_steps": 12},
    ),
    "mabn warm-up over renorm": (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "warmup_steps": 15, "renorm_warmup_steps": 7},
    ),
    "mabn norm 2": ("mabn", reference.MovingAverageBatchNorm, {**MABN, "norm_batch_size": 2}),
    "mabn centered norm 2": (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "centered": True, "norm_batch_size": 2},
    ),
    "ghost 2": ("ghost", reference.GhostBatchNorm, {"ghost_size": 2}),
    "ghost cumulative": (
        "ghost",
        reference.GhostBatchNorm,
        {"ghost_size": 2, "momentum": None},
    ),
    "ghost 4 norm 5": ("ghost", reference.GhostBatchNorm, {"ghost_size": 4, "norm_batch_size": 5}),
    "bgn 3": ("bgn", reference.BatchGroupNorm, {"num_groups": 3}),
    "bgn 2 of 3": ("bgn", reference.BatchGroupNorm, {"num_groups": 2, "examples_per_group": 3}),
    "bgn 6": ("bgn", reference.BatchGroupNorm, {"num_groups": 6}),
    "bgn norm 3": ("bgn", reference.BatchGroupNorm, {"num_groups": 3, "norm_batch_size": 3}),
}
for _name, _kind in (("l1", reference.L1BatchNorm), ("range", reference.RangeBatchNorm)):
    CASES[_name] = (_name, _kind, {})
    CASES[f"{_name} norm 2"] = (_name, _kind, {"norm_batch_size": 2})
    CASES[f"{_name} cumulative"] = (_name, _kind, {"momentum": None})
_S = reference.SampledBatchNorm
for _name, _sample, _options in (
    ("ns", "naive", {"ratio": 0.4}),
    ("ns", "naive", {"size": 2}),
    ("bs", "batch", {"ratio": 0.4, "seed": 3}),
    ("bs", "batch", {"size": 2, "seed": 4, "norm_batch_size": 3}),
    ("bs", "batch", {"ratio": 0.5, "seed": 5, "momentum": None}),
    ("fs", "feature", {"ratio": 0.3, "seed": 6}),
    ("fs", "feature", {"size": 2, "seed": 7}),
    ("fs", "feature", {"ratio": 0.01, "seed": 8, "norm_batch_size": 2}),
    ("points", "points", {"ratio": 0.4, "seed": 9}),
    ("points", "points", {"size": 3, "seed": 10, "norm_batch_size": 3}),
    ("vdn", "virtual", {"num_virtual": 2}),
    ("fs+vdn", "feature+virtual", {"num_virtual": 1, "ratio": 0.3, "seed": 11}),
    ("bs+vdn", "batch+virtual", {"num_virtual": 2, "size": 2, "mix": 0.3, "seed": 12}),
):
    CASES[f"{_name} {_options}"] = (_name, _S, _options)
for _centered, _forward, _backward in product((False, True), *(("ema", "sma", "batch"),) * 2):
    CASES[f"mabn {'centered ' * _centered}{_forward} {_backward}"] = (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "centered": _centered, "forward_stats": _forward, "backward_stats": _backward},
    )
CHANNELS = 6
SHAPES = {"(N, C)": (), "(N, C, L)": (5,), "(N, C, H, W)": (3, 2), "(N, C, D, H, W)": (2, 1, 3)}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def pair(
    case: str, dims: int, dtype: torch.dtype, eps: float = 1e-5
) -> tuple[Any, reference.Layer]:
    """The library's layer and the reference's, with the same settings and parameters."""
    name, kind, options = CASES[case]
    options = {**options, "eps": eps}
    layer = METHODS[name].build(CHANNELS, dims, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(CHANNELS) + 0.5)
        layer.bias.copy_(torch.randn(CHANNELS))
    theirs = {"ghost_size" if k == "examples_per_group" else k: v for k, v in options.items()}
    if "sample" in METHODS[name].fixed:
        theirs["sample"] = METHODS[name].fixed["sample"]
    if name == "mbn" and "momentum" in options:
        theirs["auto_momentum"] = False
    weight, bias = (p.detach().double() for p in (layer.weight, layer.bias))
    return layer, kind(CHANNELS, weight, bias, **theirs)


def drifting(step: int, shape: tuple[int, ...]) -> Tensor:
    """Inputs whose mean and spread move, in size too: 3, 5 or 4 examples."""
    x = torch.randn((3, 5, 4)[step % 3], CHANNELS, *shape, dtype=torch.float64)
    channel = torch.arange(CHANNELS, dtype=torch.float64).view(1, -1, *(1,) * len(shape))
    return x * (1 + 0.02 * step + 0.2 * channel) + 0.3 * channel - 0.02 * step


def flat(x: Tensor) -> Tensor:
    """As the reference sees it: (N, C, L)."""
    return x.detach().double().reshape(x.shape[0], x.shape[1], -1)


def check(actual: Tensor, expected: Any, dtype: torch.dtype, what: str) -> None:
    """Assert that two tensors agree."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.detach().double().reshape(expected.shape)
    difference = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance(dtype, expected), f"{what}: off by {difference:.3g}"


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


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_layer_is_the_papers_equations(
    case: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    run(case, shape, dtype)


@pytest.mark.parametrize("case", CASES)
def test_channels_last_is_the_papers_equations(case: str) -> None:
    run(case, SHAPES["(N, C, H, W)"], torch.float64, last=True)
    run(case, SHAPES["(N, C, D, H, W)"], torch.float64, last=True)


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


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("mabn")])
def test_the_gradient_is_exact(case: str) -> None:
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
        layer.memory["step"].zero_()
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
