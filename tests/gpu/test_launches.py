"""What only a GPU shows of its kernels: real sizes, graphs, long offsets, and the compiler."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import anybatch
from anybatch.backends import use_fused
from method_cases import NAMES, make, state, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KNOWN = ["bn", "mbn", "mabn", "brn", "ghost", "bgn"]
SHAPES = [(2, 64, 56, 56), (2, 512, 7, 7), (32, 64, 56, 56), (4, 256, 100, 152), (128, 16, 32, 32)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    use_fused("auto")
    yield
    use_fused("auto")


def sized(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    """A batch whose channels differ, and a cotangent."""
    column = torch.arange(float(shape[1])).view(1, -1, 1, 1)
    x = (torch.randn(shape) * (1 + 0.1 * (column % 7)) + column % 5).to(dtype)
    dy = torch.randn(shape).to(dtype)
    form = torch.channels_last if last else torch.contiguous_format
    return x.contiguous(memory_format=form), dy.contiguous(memory_format=form)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_that_of_float64(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool
) -> None:
    """On a CPU; of large batches in torch's operators on the GPU, where a CPU takes minutes."""
    options: dict[str, Any] = {"num_groups": 8} if name == "bgn" else {}
    where = "cpu" if math.prod(shape) < 2**20 else "cuda"
    layer = make(name, shape[1], **options)
    truth = copy.deepcopy(layer).double().to(where)
    layer = layer.cuda()
    for _ in range(2):
        x, dy = sized(shape, dtype, last)
        use_fused("auto")
        ours = step(layer, x.cuda(), dy.cuda())
        use_fused("never")
        theirs = step(truth, x.to(where).double(), dy.to(where).double())
        for a, b in zip(ours, theirs, strict=True):
            assert (a.to(where).double() - b).norm() <= TOLERANCE[dtype] * b.norm()
    for a, b in zip(layer.parameters(), truth.parameters(), strict=True):
        assert (a.grad.to(where).double() - b.grad).norm() <= 1e-4 * b.grad.norm().clamp(min=1)
    known = state(truth)
    for key, value in state(layer).items():
        a, b = value.to(where).double(), known[key].double()
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1), key


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (32, 64, 56, 56)], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_the_kernels_take_batches_on_a_device(
    name: str, shape: tuple[int, ...], last: bool
) -> None:
    layer = make(name, shape[1], **({"num_groups": 8} if name == "bgn" else {})).cuda()
    x, _ = sized(shape, torch.bfloat16, last)
    assert layer(x.cuda()).grad_fn.how[0].name == "triton"


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(4, 8, 7, 5), (32, 64, 56, 56)], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_a_cuda_graph_is_the_steps_it_replays(
    name: str, shape: tuple[int, ...], last: bool
) -> None:
    layer = make(name, shape[1], **({"num_groups": 4} if name == "bgn" else {})).cuda()
    x, dy = (t.cuda() for t in sized(shape, torch.float32, last))
    inner = x.clone(memory_format=torch.preserve_format).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            layer.zero_grad()
            inner.grad = None
            layer(inner).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    twin = copy.deepcopy(layer)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    inner.grad = None
    with torch.cuda.graph(graph):
        y = layer(inner)
        y.backward(dy)
    for _ in range(7):
        x, _ = sized(shape, torch.float32, last)
        with torch.no_grad():
            inner.copy_(x)
        graph.replay()
        twin.zero_grad()
        for a, b in zip((y, inner.grad), step(twin, x.cuda(), dy), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    for key, value in state(layer).items():
        assert torch.equal(value, state(twin)[key]), key


@pytest.mark.parametrize("name", ["bn", "mabn", "ghost"])
def test_results_of_launches_do_not_depend_on_runs(name: str) -> None:
    first = make(name, 64).cuda()
    second = copy.deepcopy(first)
    for shape in SHAPES[:1] + SHAPES[2:3]:
        x, dy = (t.cuda() for t in sized(shape, torch.float32, True))
        for _ in range(20):
            pairs = zip(step(first, x, dy), step(second, x, dy), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(v, state(second)[k]) for k, v in state(first).items())


@pytest.mark.parametrize("name", KNOWN)
def test_many_layers_at_once(name: str) -> None:
    """Counters count each step once, however many programs read them."""
    layers = [make(name, 2048, **({"num_groups": 64} if name == "bgn" else {})) for _ in range(4)]
    layers = [layer.cuda() for layer in layers]
    x = torch.randn(2, 2048, 7, 7, device="cuda")
    for _ in range(50):
        for layer in layers:
            step(layer, x, x)
    for layer in layers:
        assert layer.num_batches_tracked == 50
        assert all(
            int(layer.method_state[k]) == 50 for k in ("step", "count") if k in layer.method_state
        )


@pytest.mark.parametrize("name", ["bn", "mabn"])
@pytest.mark.parametrize("last", [False, True])
def test_more_values_than_32_bits_count(name: str, last: bool) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    shape = (33, 64, 1024, 1024)  # 2.2e9 values
    layer = make(name, 64).cuda()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    x = torch.randn(33, 64, 1, 1, device="cuda", dtype=torch.float16).repeat(1, 1, 1024, 1024)
    assert x.shape == shape
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = layer(x.requires_grad_())
    assert y.grad_fn.how[0].name == "triton"
    for c in (0, 1, 63):
        column = x.detach()[:, c, 0, 0].double()  # every value of an example is the same
        mean = column.mean() if name == "bn" else 0.0
        var = (column - mean).square().mean()
        expected = (column - mean) / (var + layer.eps).sqrt() * weight[c] + bias[c]
        for place in ((0, 0), (1023, 1023), (511, 700)):
            assert (y[(slice(None), c, *place)].double() - expected).abs().max() < 1e-2
    dy = torch.zeros_like(y)
    dy[32, 63, 1023, 1023] = 1.0
    y.backward(dy)
    assert layer.bias.grad.count_nonzero() == 1
    assert layer.bias.grad[63] == 1
    assert x.grad[:, :63].count_nonzero() == 0
    assert x.grad[32, 63, 1023, 1023] != 0


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_on_a_gpu(name: str) -> None:
    layer = make(name).cuda()
    twin = copy.deepcopy(layer)
    run = torch.compile(twin, fullgraph=True)
    for _ in range(3):
        x, dy = (torch.randn(4, 6, 5, 3, device="cuda") for _ in range(2))
        for a, b in zip(step(layer, x, dy), step(run, x, dy), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    for key, value in state(layer).items():
        assert torch.allclose(value, state(twin)[key], atol=1e-4), key


@pytest.mark.parametrize("name", KNOWN)
def test_autocast_and_a_scaler(name: str) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), make(name), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 1)
    ).cuda()
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(3):
        with torch.autocast("cuda", torch.float16):
            loss = net(torch.randn(4, 3, 8, 8, device="cuda")).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    with anybatch.no_update():
        assert net(torch.randn(4, 3, 8, 8, device="cuda")).isfinite().all()
