"""bfloat16 and float16 in the compiled loops: every word of 16 bits, and every pass."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.backends import use_fused
from method_cases import make, state, step

numba = pytest.importorskip("numba")
TYPES = [torch.bfloat16, torch.float16]
RULES = ["bn", "mbn", "mabn", "brn", "ghost", "bgn"]
OTHERS = ["l1", "range", "bs", "fs", "ns"]


@pytest.fixture(autouse=True)
def _small_batches_take_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("anybatch.backends.numba.threads._GRAIN", 16)
    yield
    use_fused("auto")
    torch.set_num_threads(1)


def words(values: Tensor) -> np.ndarray:
    """A tensor's memory as compiled code is told of it."""
    from anybatch.backends.numba.arrays import LIKE

    return values.view(torch.int16).numpy().view(LIKE[values.dtype].dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_word_is_read_and_every_number_rounded_as_torch_does(dtype: torch.dtype) -> None:
    from anybatch.backends.numba.compile import OPTIONS
    from anybatch.backends.numba.low_precision import as_numbers

    @numba.njit(**OPTIONS)
    def convert(low, wide, single, rounded):
        low, rounded = as_numbers(low), as_numbers(rounded)
        for i in range(low.shape[0]):
            wide[i] = low[i]
        for i in range(single.shape[0]):
            rounded[i] = single[i]

    low = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = low.float()[low.isfinite()].sort().values
    ties = (exact[1:] + exact[:-1]) / 2  # halfway between neighbours
    beside = [torch.nextafter(ties, torch.tensor(away)) for away in (-torch.inf, torch.inf)]
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -7e4, 1e-45])
    single = torch.cat([exact, ties, *beside, odd, torch.randn(10001)])
    wide, rounded = torch.empty(low.numel()), torch.empty(single.numel(), dtype=dtype)
    convert(words(low), wide.numpy(), single.numpy(), words(rounded))
    torch.testing.assert_close(wide, low.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rounded, single.to(dtype), rtol=0, atol=0, equal_nan=True)
    differ = (rounded.signbit() != single.to(dtype).signbit()) & ~single.isnan()
    assert single[differ].tolist() == []


def close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    """Activations are off by one rounding at most, what is float32 by its own."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        unit = torch.finfo(dtype).eps if a.dtype == dtype else 1e-4
        apart = float((a.double() - b.double()).abs().max())
        assert apart <= unit * max(float(b.double().abs().max()), 1), f"{number}: {apart}"


def batches(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> list[Tensor]:
    form = torch.channels_last if last else torch.contiguous_format
    return [(torch.randn(shape) + 1).to(dtype).contiguous(memory_format=form) for _ in range(2)]


SHAPES = [(2, 32, 7, 7), (13, 6, 4, 4), (5, 3, 23, 9)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES + OTHERS)
def test_loops_serve_activations_of_16_bits(
    name: str, shape: tuple[int, ...], last: bool, dtype: torch.dtype
) -> None:
    torch.set_num_threads(2)
    options = {"num_groups": 1} if name == "bgn" else {}
    layer = make(name, shape[1], eps=1e-2, **options)
    exact, found = copy.deepcopy(layer).double(), []
    x, dy = batches(shape, dtype, last)
    for ours, choice, kind in ((layer, "auto", dtype), (exact, "never", torch.float64)):
        use_fused(choice)
        assert (ours(x.to(kind).requires_grad_()).grad_fn.how[0].name == "numba") == (kind == dtype)
        results = [t for _ in range(3) for t in step(ours, x.to(kind), dy.to(kind))]
        found.append([*results, ours.weight.grad, ours.bias.grad, *state(ours).values()])
    assert all(t.stride() == x.stride() and t.dtype == dtype for t in found[0][:6])
    close(*found, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", ["bn", "bs"])
def test_a_relu_in_the_same_pass_in_16_bits(
    name: str, added: bool, last: bool, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        layer = make(name, shape[1], eps=1e-2)
        exact, found = copy.deepcopy(layer).double(), []
        x, dy = batches(shape, dtype, last)
        more = batches(shape, dtype, last)[0]
        for ours, choice, kind in ((layer, "auto", dtype), (exact, "never", torch.float64)):
            use_fused(choice)
            inner, residual = (t.detach().to(kind).requires_grad_() for t in (x, more))
            y = ours(inner, residual=residual if added else None, activation="relu")
            y.backward(dy.to(kind))
            assert (y > 0).any()
            assert (y == 0).any()
            results = [y.detach(), inner.grad, *([residual.grad] if added else [])]
            found.append([*results, ours.weight.grad, ours.bias.grad])
        # What is next to zero may be on either side of it.
        sides = (found[0][0] > 0) == (found[1][0] > 0)
        assert float(sides.double().mean()) > 0.99
        if bool(sides.all()):
            close(*found, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["bn", "l1", "range", "bs"])
def test_outputs_of_16_bits_past_the_caches(name: str, last: bool, dtype: torch.dtype) -> None:
    from anybatch.backends.numba.streaming_stores import last_cache

    if last_cache() > 2**26:
        pytest.skip("so large a cache takes too large a batch")
    layer = make(name, 64, eps=1e-2)
    exact = copy.deepcopy(layer).double()
    x, dy = batches((last_cache() // 2 // (64 * 32 * 32 * 2) + 3, 64, 32, 32), dtype, last)
    ours = step(layer, x, dy)
    use_fused("never")
    close(list(ours), list(step(exact, x.double(), dy.double())), dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
def test_networks_in_16_bits_and_under_autocast_take_the_loops(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), anybatch.BatchNorm2d(4))
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", dtype):
        y = net(x)
    assert y.dtype == dtype
    assert y.grad_fn.how[0].name == "numba"
    y = net.to(dtype)(x.to(dtype))
    assert y.grad_fn.how[0].name == "numba"
    assert net[1].running_var.dtype == net[1].weight.dtype == torch.float32


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sample", [None, 16])
@pytest.mark.parametrize("autocast", [False, True])
def test_cross_iteration_in_16_bits(
    autocast: bool, sample: int | None, last: bool, dtype: torch.dtype
) -> None:
    """A network in 16 bits, or under autocast, whose norm takes the loops, beside float64."""
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=sample is None, groups=2)
    net = nn.Sequential(conv, nn.BatchNorm2d(6, eps=1e-2))
    anybatch.convert(net, "cbn", window=3, gradient_sample=sample, norm_batch_size=2)
    net[0].weight.data = net[0].weight.to(dtype).float()
    exact, form = copy.deepcopy(net).double(), torch.channels_last
    if not autocast:
        net[0].to(dtype)
    for _ in range(5):
        x = (torch.randn(4, 4, 5, 7) + 0.5).to(dtype)
        x = x.contiguous(memory_format=form if last else torch.contiguous_format)
        use_fused("auto")
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = net(x)
        assert y.grad_fn.how[0].name == "numba"
        dy = torch.randn(y.shape).to(dtype)
        y.backward(dy)
        use_fused("never")
        wanted = exact(x.double())
        wanted.backward(dy.double())
        # The convolution rounds its output; the gradient of the variance is of few products.
        assert torch.allclose(y.double(), wanted, atol=60 * torch.finfo(dtype).eps)
    for name, found in net[1].state_dict().items():
        known = exact[1].state_dict()[name]
        assert torch.allclose(found.double(), known.double(), atol=0.05, rtol=0.05), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
def test_cross_iteration_behind_a_linear_layer_under_autocast(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    anybatch.convert(net, "cbn", window=3, gradient_sample=None, burn_in=0.0)
    twin = copy.deepcopy(net)
    use_fused("auto")
    for _ in range(3):
        x = torch.randn(4, 4)
        with torch.autocast("cpu", dtype):
            y = net(x)
        assert y.grad_fn.how[0].name == "numba"
        assert torch.allclose(y.float(), twin(x), atol=0.2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("last", [False, True])
def test_cross_iteration_of_16_bits_is_that_of_their_values(last: bool) -> None:
    """In float32, the same values give the same statistics."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    anybatch.convert(net, "cbn", window=3, gradient_sample=16, order=1)
    twin = copy.deepcopy(net)
    use_fused("auto")
    for _ in range(4):
        x = torch.randn(2, 3, 6, 6).bfloat16()
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        with torch.autocast("cpu", torch.bfloat16):
            out = net[0](x)
        y = net[1](out)
        twin[0](x.float())
        feed = twin[1]._flow.feed
        twin[1]._flow.feed = feed._replace(output=out.float())
        wanted = twin[1](twin[1]._flow.feed.output)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, wanted.bfloat16())
    for name, found in net[1].state_dict().items():
        torch.testing.assert_close(found, twin[1].state_dict()[name], rtol=1e-6, atol=1e-6)
