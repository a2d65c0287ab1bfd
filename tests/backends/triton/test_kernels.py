"""The GPU kernels against the equations: compiled where there is a GPU, else interpreted."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends import use_fused
from anybatch.backends.triton.backend import memory_obstacle
from anybatch.core.norm_layer import NormLayer
from interpreter import cpu_batches_take_gpu_kernels
from method_cases import make, state, step
from reference_cases import CASES, SHAPES, check, drifting, flat, pair

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3)
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if CUDA else []),
    pytest.mark.skipif(OLD and not CUDA, reason="its interpreter stores where a mask is false"),
    # Numbers that overflow or are not finite are meant; numpy tells where it interprets.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
NAMES = ["bn", "mbn", "mabn", "brn", "ghost", "bgn"]
# Memories so short that a few steps cross every boundary: interpreted steps are slow.
QUICK = {
    "mabn": {"window": 3, "warmup_steps": 4, "renorm_warmup_steps": 5},
    "mabn window over warm-up": {"window": 4, "warmup_steps": 2, "renorm_warmup_steps": 6},
    "mabn warm-up over renorm": {"window": 2, "warmup_steps": 5, "renorm_warmup_steps": 3},
    "brn": {"warmup_steps": 2},
}
STEPS = {"bn": 3, "mbn": 5, "mabn": 8, "brn": 5, "ghost": 3, "bgn": 3}
SOURCES = ["tile", "tiles", "parts"]


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    """Batches on the tests' device take the kernels."""
    with nullcontext() if CUDA else cpu_batches_take_gpu_kernels():
        yield


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    use_fused("auto")
    yield
    use_fused("auto")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes small batches take what larger ones take."""
    from anybatch.backends.triton import launch

    def take(name: str) -> None:
        if name == "tiles":
            monkeypatch.setattr(launch, "_TILE", 32)
        elif name == "parts":
            monkeypatch.setattr(launch, "_REACH", 0)
            monkeypatch.setattr(launch, "_FAR", 0)
            monkeypatch.setattr(launch, "_PART", 32)
            monkeypatch.setattr(launch, "processors", lambda _: 2)
        launch.plan_for.cache_clear()

    yield take
    launch.plan_for.cache_clear()


def cases(names: list[str]) -> list[str]:
    """The settings of methods that the kernels know."""
    return [case for case in CASES if case.split()[0] in names and "centered" not in case]


def like(x: Tensor, last: bool) -> Tensor:
    """A batch on the tests' device, channels last if so."""
    x = x.to(DEVICE)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def agrees(case: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool, steps: int) -> None:
    """Outputs, gradients and state of some steps are those of the equations."""
    eps = 1e-5 if dtype == torch.float64 else 1e-2
    layer, truth = pair(case, max(len(shape), 1), dtype, eps)
    layer = layer.to(DEVICE)
    truth.spatial = shape
    for number in range(steps):
        if number % 2 == 0 and hasattr(truth, "set_progress"):
            layer.set_progress(number // 2 + 2, 5)
            truth.set_progress(number // 2 + 2, 5)
        x = drifting(number, shape).to(dtype)
        dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
        inner = like(x, last).requires_grad_()
        layer.zero_grad()
        y = layer(inner)
        assert y.grad_fn.how[0].name == "triton"
        assert y.stride() == inner.stride()
        y.backward(dy.to(DEVICE))
        expected, backward = truth.forward(flat(x))
        dx, dw, db = backward(flat(dy))
        check(y.cpu(), expected.reshape(x.shape), dtype, f"output, step {number}")
        check(inner.grad.cpu(), dx.reshape(x.shape), dtype, f"input gradient, step {number}")
        check(layer.weight.grad.cpu(), dw, dtype, f"weight gradient, step {number}")
        check(layer.bias.grad.cpu(), db, dtype, f"bias gradient, step {number}")
        kept = layer.state_dict()
        for name, value in truth.state().items():
            check(kept[name].cpu(), value, dtype, f"{name}, step {number}")


@pytest.mark.few(2)
@pytest.mark.parametrize("case", cases(NAMES))
def test_every_rule_is_the_papers_equations(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, truth, options = CASES[case]
    short = QUICK.get(case, QUICK.get(name, {}))
    monkeypatch.setitem(CASES, case, (name, truth, {**options, **short}))
    agrees(case, (3, 2), torch.float64, True, STEPS[case.split()[0]])


@pytest.mark.few(1)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("case", ["bn", "mbn", "brn", "mabn", "ghost 4 norm 5", "bgn 2 of 3"])
def test_triton_is_exact_by_tile_tiles_and_parts(
    case: str, kind: str, last: bool, source: Callable[[str], None]
) -> None:
    source(kind)
    agrees(case, (5, 4), torch.float64, last, 2)
    agrees(case, (5, 4), torch.float32, last, 1)


@pytest.mark.parametrize("shape", [SHAPES["(N, C)"], SHAPES["(N, C, D, H, W)"]], ids=str)
@pytest.mark.parametrize("case", ["bn", "mabn", "bgn 3"])
def test_triton_is_exact_in_other_dimensions(case: str, shape: tuple[int, ...]) -> None:
    agrees(case, shape, torch.float32, len(shape) == 3, 2)


def both(
    name: str, x: Tensor, dy: Tensor, steps: int = 2, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """What training gives by the kernels, and by ATen in float64."""
    found = []
    layer = make(name, x.shape[1], max(x.dim() - 2, 1), eps=1e-2, **options).to(DEVICE)
    twin = copy.deepcopy(layer).double()
    for ours, choice in ((layer, "auto"), (twin, "never")):
        use_fused(choice)
        kind = x.dtype if choice == "auto" else torch.float64
        given_x, given_dy = (like(t.to(kind), not t.is_contiguous()) for t in (x, dy))
        results: list[Tensor] = []
        for _ in range(steps):
            results += step(ours, given_x, given_dy)
        found.append([*results, ours.weight.grad, ours.bias.grad, *state(ours).values()])
    return found[0], found[1]


@pytest.mark.exhaustive
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 7),
    c=st.sampled_from([1, 2, 7, 16, 24]),
    space=st.lists(st.sampled_from([1, 2, 5, 7, 8, 13]), max_size=2),
    last=st.booleans(),
    kind=st.sampled_from(SOURCES),
    options=st.sampled_from(
        [{}, {"norm_batch_size": 3}, {"momentum": None}, {"momentum_warmup": 3}]
    ),
)
def test_triton_serves_any_shape(
    name: str, n: int, c: int, space: list[int], last: bool, kind: str, options: dict[str, Any]
) -> None:
    from anybatch.backends.triton import launch

    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "tile": {},
            "tiles": {"_TILE": 64},
            "parts": {"_REACH": 0, "_FAR": 0, "_PART": 64, "processors": lambda _: 2},
        }[kind].items():
            patch.setattr(launch, key, value)
        launch.plan_for.cache_clear()
        torch.manual_seed(n)
        x = torch.randn(n, c, *space) + torch.arange(c).view(1, c, *(1,) * len(space))
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        for a, b in zip(*both(name, x, torch.randn_like(x), **options), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3)
    launch.plan_for.cache_clear()


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_triton_serves_activations_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """Statistics are float32: what differs is the rounding of the output and of the gradient."""
    unit = torch.finfo(dtype).eps
    x, dy = (torch.randn(4, 8, 3, 3).to(dtype) for _ in range(2))
    ours, theirs = both(name, x, dy)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close = unit if number < 4 else 1e-4
        assert (a.double() - b.double()).abs().max() <= close * b.abs().max().clamp(min=1)
        assert a.dtype == (dtype if number < 4 else b.dtype if b.dtype == torch.long else a.dtype)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_sums_of_triton_keep_the_difference_of_large_numbers(
    kind: str, last: bool, source: Callable[[str], None]
) -> None:
    source(kind)
    x = torch.randn(4, 4, 9, 7) + 4096
    truth = x.double()
    var, mean = torch.var_mean(truth, (0, 2, 3), correction=0, keepdim=True)
    layer = anybatch.BatchNorm2d(4).to(DEVICE)
    y = layer(like(x, last)).cpu()
    assert (y - (truth - mean) / (var + 1e-5).sqrt()).abs().max() < 1e-3
    expected = 0.9 + 0.1 * var.flatten() * 252 / 251
    assert torch.allclose(layer.running_var.cpu().double(), expected, rtol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_triton_keeps_values_that_are_not_finite_out_of_the_state(name: str, value: float) -> None:
    layer = make(name, 4, **({"num_groups": 2} if name == "bgn" else {})).to(DEVICE)
    for bad in (False, True, False, False):
        x = torch.randn(3, 4, 2, 2)
        if bad:
            x[2, 1, 1, 0] = value
        y, _ = step(layer, x.to(DEVICE))
        assert bool(y.isfinite().all()) != bad
        assert bool(y[:, 2:].isfinite().all())
        assert all(bool(tensor.isfinite().all()) for tensor in state(layer).values())


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
def test_only_the_parameters_or_only_the_input(name: str) -> None:
    full, other = make(name, 4).to(DEVICE), None
    other = copy.deepcopy(full)
    x, dy = torch.randn(3, 4, 2, 2, device=DEVICE), torch.randn(3, 4, 2, 2, device=DEVICE)
    _, dx = step(full, x, dy)
    other(x).backward(dy)
    assert torch.equal(other.weight.grad, full.weight.grad)
    other = copy.deepcopy(full)
    other.zero_grad()
    other.weight.requires_grad_(False)
    step(other, x, dy)
    assert other.weight.grad is None
    assert other.bias.grad is not None
    assert dx.shape == x.shape


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_does_not_count(name: str, reentrant: bool) -> None:
    layer = make(name, 4).to(DEVICE)
    twin = copy.deepcopy(layer)
    for _ in range(5):
        x, dy = (torch.randn(3, 4, 2, 2, device=DEVICE) for _ in range(2))
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(first).backward(dy)
        checkpoint(twin, second, use_reentrant=reentrant).backward(dy)
        assert torch.allclose(first.grad, second.grad, atol=1e-5)
    for key, value in state(layer).items():
        assert torch.allclose(value, state(twin)[key], atol=1e-6), key


@pytest.mark.exhaustive
def test_results_of_triton_do_not_depend_on_runs(source: Callable[[str], None]) -> None:
    for kind in SOURCES:
        source(kind)
        first = make("mabn", 4).to(DEVICE)
        second = copy.deepcopy(first)
        x = torch.randn(5, 4, 3, 3, device=DEVICE)
        for _ in range(3):
            pairs = zip(step(first, x, x), step(second, x, x), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_batched_gradients_of_triton_are_those_of_the_operators() -> None:
    layer = anybatch.BatchNorm1d(4).to(DEVICE)
    x = torch.randn(2, 4, 3, device=DEVICE, requires_grad=True)
    y, dy = layer(x), torch.randn(3, 2, 4, 3, device=DEVICE)
    (together,) = torch.autograd.grad(y, x, dy, retain_graph=True, is_grads_batched=True)
    apart = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in dy]
    assert torch.allclose(together, torch.stack(apart), atol=1e-5)


def launched(layer: NormLayer, x: Tensor) -> bool:
    """Whether a forward takes the kernels."""
    grad_fn = layer(x.to(DEVICE)).grad_fn
    how = getattr(grad_fn, "how", None)
    return how is not None and how[0].name == "triton"


def test_what_takes_the_kernels_and_what_does_not() -> None:
    layer, x = anybatch.BatchNorm2d(4).to(DEVICE), torch.randn(2, 4, 3, 3)
    assert launched(layer, x)
    assert launched(layer, x.half())
    assert launched(copy.deepcopy(layer), x)
    assert launched(pickle.loads(pickle.dumps(layer)), x)
    assert not launched(layer, x.double())
    assert not launched(layer, torch.randn(2, 4, 3, 6)[..., ::2])
    assert not launched(layer, torch.randn(1, 4, 1, 1))
    assert not launched(layer, torch.randn(0, 4, 3, 3))
    assert not launched(anybatch.BatchNorm2d(4, affine=False).to(DEVICE), x)
    assert not launched(anybatch.BatchNorm2d(4, outlier_limit=9.0).to(DEVICE), x)
    assert not launched(anybatch.MovingAverageBatchNorm2d(4, centered=True).to(DEVICE), x)
    assert not launched(layer.eval(), x)
    wide = anybatch.BatchGroupNorm2d(512, num_groups=1).to(DEVICE)
    assert not launched(wide, torch.randn(2, 512, 1, 1))
    use_fused("never")
    assert not launched(layer.train(), x)


def test_the_layers_state_and_parameters_must_lie_together() -> None:
    x, row = torch.zeros(2, 4, device=DEVICE), torch.zeros(4, device=DEVICE)
    assert memory_obstacle(x, (row,) * 4) is None
    for other in (row.to("meta"), row.double(), row[:1].expand(4), None):
        assert memory_obstacle(x, (row, other, row, row))
    assert memory_obstacle(x.to("meta"), (row,) * 4)
    assert memory_obstacle(x, (row, row, row, None))
    assert memory_obstacle(x.int(), (row,) * 4)


@pytest.mark.exhaustive
def test_without_update_state_stays() -> None:
    for name in NAMES:
        layer = make(name, 4).to(DEVICE)
        before = state(layer)
        with anybatch.no_update():
            step(layer, torch.randn(3, 4, 2, 2, device=DEVICE))
        assert all(torch.equal(before[key], value) for key, value in state(layer).items())


@pytest.mark.exhaustive
def test_everything_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, anybatch, anybatch.backends.triton.backend as kernels\n"
        "kernels.DEVICES = ('cpu',)\n"
        "norm = anybatch.BatchNorm1d(4)\n"
        "norm(torch.randn(2, 4, requires_grad=True)).backward(torch.randn(2, 4))\n"
        "print(int(norm.num_batches_tracked))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_graph_has_them_as_operators(name: str, last: bool) -> None:
    use_fused("always")
    torch._dynamo.reset()
    layer = make(name, 4, **QUICK.get(name, {})).to(DEVICE)
    compiled = copy.deepcopy(layer)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for number in range(STEPS[name]):
        torch.manual_seed(number)
        x, dy = (like(torch.randn(4, 4, 3, 2), last) for _ in "xy")
        mine, theirs = step(layer, x, dy), step(run, x, dy)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    known = state(layer)
    for key, value in state(compiled).items():
        torch.testing.assert_close(value, known[key], rtol=0, atol=0)
