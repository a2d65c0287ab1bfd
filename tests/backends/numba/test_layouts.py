"""The compiled kernels on every layout, size, thread count and group, against the ATen passes."""

import concurrent.futures
import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anybatch.backends import use_fused
from anybatch.backends.numba.backend import layout_obstacle, memory_obstacle
from anybatch.core.norm_layer import NormLayer
from method_cases import NAMES, make, state, step
from tolerances import tolerance

pytest.importorskip("numba")
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _small_batches_take_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("anybatch.backends.numba.threads._GRAIN", 16)
    yield
    use_fused("auto")
    torch.set_num_threads(1)


def drift(shape: tuple[int, ...], dtype: torch.dtype, last: bool, seed: int) -> Tensor:
    """A batch whose channels differ, far from zero; `last` puts channels last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    x = (x * (1 + 0.1 * (channel % 7)) + channel % 5 + 2).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def trained(
    layer: NormLayer,
    choice: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool,
    steps: int,
) -> list[Tensor]:
    """Everything that some steps of training give."""
    use_fused(choice)
    found: list[Tensor] = []
    for seed in range(steps):
        x, dy = (drift(shape, dtype, last, seed + away) for away in (0, 100))
        x, dy = x.to(layer.weight.dtype), dy.to(layer.weight.dtype)
        served = not (memory_obstacle(x, (layer.running_var,)) or layout_obstacle(x, "rule"))
        assert served == (choice == "auto")
        found += step(layer, x, dy)
    found += [p.grad for p in layer.parameters() if p.grad is not None]
    return found + list(state(layer).values())


def check(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    last: bool = False,
    steps: int = 5,
    **options: object,
) -> None:
    """The compiled path agrees with the other one in float64: outputs, gradients and state."""
    first = make(name, shape[1], max(len(shape) - 2, 1), dtype=dtype, eps=1e-2, **options)
    second = copy.deepcopy(first).double()
    ours = trained(first, "auto", shape, dtype, last, steps)
    theirs = trained(second, "never", shape, dtype, last, steps)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        b = b.double()
        difference = float((a.double() - b).abs().max()) if b.numel() else 0.0
        assert difference <= tolerance(dtype, b), f"{number}: off by {difference:.3g}"


SHAPES = [
    (2, 32, 7, 7),  # planes
    (9, 5, 101),
    (33, 16, 7, 11),
    (13, 6, 4, 4),  # short planes, taken in rows
    (131, 12),
    (3, 4, 5, 3, 7),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost", "bgn", "l1", "range"])
def test_loops_over_channels_last_serve_large_batches(
    name: str, shape: tuple[int, ...], last: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    check(name, shape, last=last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost", "bgn", "l1", "range"])
def test_loops_over_channels_last_are_exact_in_float32(name: str, last: bool) -> None:
    torch.set_num_threads(2)
    check(name, (17, 24, 41, 29), torch.float32, last, 3)


@pytest.mark.families
@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["bn", "ghost", "l1", "range", "fs"])
def test_outputs_past_the_caches(name: str, last: bool, dtype: torch.dtype) -> None:
    """They are stored by other instructions, unless a row is no whole number of lines."""
    from anybatch.backends.numba.streaming_stores import last_cache

    if last_cache() > 2**26:
        pytest.skip("so large a cache takes too large a batch")
    torch.set_num_threads(2)
    for channels, side in ((64, 32), (20, 31)):
        size = torch.finfo(dtype).bits // 8
        examples = last_cache() // 2 // (channels * side * side * size) + 3
        x = drift((examples, channels, side, side), dtype, last, 0)
        dy, layer = drift(x.shape, dtype, last, 1), make(name, channels, 2, dtype=dtype)
        exact = copy.deepcopy(layer).double()
        use_fused("auto")
        found = step(layer, x, dy)
        use_fused("never")
        for ours, theirs in zip(found, step(exact, x.double(), dy.double()), strict=True):
            assert ours.stride() == x.stride()
            assert float((ours.double() - theirs).abs().max()) <= tolerance(dtype, theirs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ghost", {"ghost_size": 4}),
        ("ghost", {"ghost_size": 1}),
        ("ghost", {"ghost_size": 4, "norm_batch_size": 9}),
        ("bgn", {"num_groups": 3, "examples_per_group": 5}),
        ("bgn", {"num_groups": 4, "examples_per_group": 3, "norm_batch_size": 7}),
        ("bgn", {"num_groups": 12, "examples_per_group": 2}),
        ("bn", {"norm_batch_size": 4}),
        ("mbn", {"norm_batch_size": 2}),
        ("mabn", {"norm_batch_size": 3}),
        ("brn", {"norm_batch_size": 6}),
        ("mabn", {"forward_stats": "sma", "backward_stats": "ema"}),
        ("mabn", {"forward_stats": "batch", "backward_stats": "batch"}),
        ("mabn", {"momentum": None, "backward_stats": "ema"}),
        ("mabn", {"momentum_warmup": 3, "backward_stats": "ema", "norm_batch_size": 3}),
        ("bn", {"momentum": None}),
        ("ghost", {"momentum_warmup": 3, "ghost_size": 4}),
        ("l1", {"norm_batch_size": 4}),
        ("l1", {"momentum": None}),
        ("range", {"norm_batch_size": 5}),
        ("range", {"momentum": None, "norm_batch_size": 3}),
    ],
    ids=str,
)
def test_loops_over_channels_last_serve_groups_and_successive_batches(
    name: str, options: dict[str, object], last: bool
) -> None:
    torch.set_num_threads(2)
    for shape in ((17, 12, 5, 7), (23, 12, 2, 3)):
        check(name, shape, last=last, steps=6, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 19),
    c=st.sampled_from([1, 2, 3, 16, 37]),
    space=st.lists(st.integers(1, 41), min_size=0, max_size=2),
    last=st.booleans(),
    threads=st.integers(1, 2),
)
def test_loops_over_channels_last_serve_any_shape(
    name: str, n: int, c: int, space: list[int], last: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    if name != "cbn":  # its loops are for small contiguous batches
        check(name, (n, c, *space), last=last, steps=2)


def test_sums_of_the_loops_keep_the_difference_of_large_numbers() -> None:
    x = torch.randn(64, 8, 40, 40) + 4096
    truth = x.double()
    expected = (truth - truth.mean((0, 2, 3), True)) / (
        truth.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    for last in (False, True):
        given_x = x.contiguous(memory_format=torch.channels_last) if last else x
        y = make("bn", 8).requires_grad_(False)
        y.weight.fill_(1)
        y.bias.zero_()
        assert (y(given_x) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost", "bgn"])
def test_loops_over_channels_last_keep_values_that_are_not_finite_out_of_the_state(
    name: str, value: float, last: bool
) -> None:
    torch.set_num_threads(2)
    layer = make(name, 8, **({"num_groups": 4} if name == "bgn" else {}))
    for bad in (False, True, False):
        x = drift((10, 8, 11, 13), torch.float32, last, 3)
        if bad:
            x[7, 3, 5, 2] = value
        y, _ = step(layer, x)
        assert bool(y.isfinite().all()) != bad
        assert bool(y[:, 6:].isfinite().all())
        assert all(bool(tensor.isfinite().all()) for tensor in state(layer).values())


def test_threads_of_python_may_share_the_loops() -> None:
    """Layers of their own in several threads, each with a team of threads of its own."""
    torch.set_num_threads(2)

    def train(seed: int) -> list[Tensor]:
        layer = make("bn", 16)
        with torch.no_grad():
            layer.weight.fill_(1.5)
            layer.bias.fill_(0.5)
        found: list[Tensor] = []
        for number in range(6):
            last = (seed + number) % 2 == 1
            x, dy = (drift((9, 16, 11, 13), torch.float32, last, s) for s in (seed, number))
            found += step(layer, x, dy)
        return found

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(6)))
    for seed, found in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(found, train(seed), strict=True))


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_wait_for_threads() -> None:
    """As in a data loader's workers. Torch's own operators would wait, so none are used."""
    code = (
        "import os, signal, torch, anybatch\n"
        "torch.set_num_threads(2)\n"
        "dy = torch.randn(8, 16, 64, 64)\n"
        "inputs = [torch.randn(8, 16, 64, 64, requires_grad=True) for _ in range(2)]\n"
        "norm = anybatch.BatchNorm2d(16)\n"
        "norm(inputs[0]).backward(dy)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    norm(inputs[1]).backward(dy)\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "7", done.stderr


def test_results_of_the_loops_do_not_depend_on_runs() -> None:
    torch.set_num_threads(3)
    for last in (False, True):
        x = drift((13, 16, 11, 29), torch.float32, last, 0)
        first, second = (make("bn", 16) for _ in range(2))
        second.load_state_dict(first.state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(step(first, x, x), step(second, x, x), strict=True)
        )


@pytest.mark.parametrize("last", [False, True])
def test_memory_kept_for_backward_is_that_of_torch(last: bool) -> None:
    x = drift((4, 8, 31, 37), torch.float32, last, 0).requires_grad_()
    for name in ("bn", "mbn", "mabn", "brn", "ghost", "bgn"):
        layer, kept = make(name, 8), []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            layer(x)
        large = [tensor for tensor in kept if tensor.numel() > 100 * 8]
        assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]
