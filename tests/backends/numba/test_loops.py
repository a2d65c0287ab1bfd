"""When CPU batches take the compiled path, and that nothing needs it."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import anybatch
from anybatch.backends import use_fused
from anybatch.backends.numba.backend import SERIAL, NumbaBackend
from anybatch.backends.protocol import CrossIterationSpec, MethodSpec, NormCall, SampleSpec
from method_cases import NAMES, make, state, step

numba = pytest.importorskip("numba")
RULE, SAMPLE = MethodSpec(), SampleSpec((), {})
WINDOW = CrossIterationSpec(True, {}, (), None, 16, False, None, 0)


def obstacle(
    x: torch.Tensor, *rows: torch.Tensor | None, spec: Any = RULE, examples: int | None = None
) -> str | None:
    """Why the loops do not serve a batch of a layer of such rows."""
    examples = x.shape[0] if examples is None else examples
    sizes = (examples,) * (x.shape[0] // examples)
    cut = sizes, (1,) * len(sizes), sizes
    return NumbaBackend().supports(NormCall(cut, 4, 1e-5, True, spec), x, rows)


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    use_fused("auto")


DENSE = {
    "channels": torch.zeros(2, 4, 3),
    "flat": torch.zeros(2, 4),
    "transposed": torch.zeros(2, 3, 4).transpose(1, 2),
    "channels_last": torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last),
    "large": torch.zeros(2, 4, SERIAL),
}


@pytest.mark.parametrize("layout", DENSE)
def test_a_dense_batch_qualifies(layout: str) -> None:
    x, row = DENSE[layout], torch.zeros(4)
    assert obstacle(x, row, row) is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", DENSE)
def test_a_dense_batch_of_another_type_qualifies(layout: str) -> None:
    x, row = DENSE[layout], torch.zeros(4)
    assert obstacle(x.double(), row.double(), row.double()) is None
    for low in (x.bfloat16(), x.half()):
        assert obstacle(low, row, row) is None
        assert obstacle(low, row, row, spec=SAMPLE) == obstacle(x, row, row, spec=SAMPLE)
        assert obstacle(low, row.to(low.dtype), row.to(low.dtype))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 4, 3, dtype=torch.float8_e5m2),
        torch.zeros(2, 4, 3, dtype=torch.float64),
        torch.zeros(2, 4, 3, device="meta"),
        torch.zeros(2, 4, 5)[:, :, ::2],
        torch.zeros(1, 4, 3).expand(2, 4, 3),
        torch._neg_view(torch.zeros(2, 4, 3)),
        torch.nn.Parameter(torch.zeros(2, 4)),
    ],
    ids=["float8", "other type", "meta", "strided", "expanded", "neg", "subclass"],
)
def test_other_batches_do_not_qualify(x: torch.Tensor) -> None:
    row = torch.zeros(4)
    assert obstacle(x, row, row)
    assert obstacle(torch.zeros(2, 4), None, row)
    assert obstacle(torch.zeros(2, 4), row, None)


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(8)[::2],
        torch.zeros(1).expand(4),
        torch.zeros(4, device="meta"),
        torch.zeros(5),
        torch.zeros(4, dtype=torch.float64),
        torch._neg_view(torch.zeros(4)),
        torch.zeros(4).as_subclass(type("Own", (torch.Tensor,), {})),
        None,
    ],
    ids=["strided", "expanded", "meta", "longer", "other type", "neg", "subclass", "none"],
)
def test_a_layer_whose_rows_are_not_plain_memory_does_not(row: torch.Tensor | None) -> None:
    x, plain = torch.zeros(2, 4, 3), torch.nn.Parameter(torch.zeros(4))
    assert obstacle(x, plain, plain, plain, plain) is None
    assert obstacle(x, plain, plain, plain, plain, spec=SAMPLE) is None
    for place in range(4):
        rows = [plain] * 4
        rows[place] = row
        assert obstacle(x, *rows)
        assert obstacle(x, *rows, spec=SAMPLE)


@pytest.mark.parametrize("choice", ["auto", "never"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_plain_memory_give_the_same(name: str, choice: str) -> None:
    """Addresses of parameters are taken only where these are dense."""
    use_fused(choice)
    x, dy, found = torch.randn(5, 4, 3).double(), torch.randn(5, 4, 3).double(), []
    for strided in (False, True):
        layer = make(name, 4, 1).double()
        with torch.no_grad():
            for row in (layer.weight, layer.bias):
                row.copy_(torch.arange(1.0, 5.0))
        if strided:
            for own in ("weight", "bias"):
                row = torch.stack([getattr(layer, own).detach(), torch.zeros(4).double()], 1)[:, 0]
                setattr(layer, own, torch.nn.Parameter(row))
            assert not layer.weight.is_contiguous()
        found.append(step(layer, x, dy))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


def test_a_gradient_of_zeros_without_memory() -> None:
    layer = anybatch.BatchNorm1d(4)
    x = torch.randn(6, 4, requires_grad=True)
    layer(x).backward(torch._efficientzerotensor((6, 4)))
    assert x.grad is not None
    assert not x.grad.any()


def test_loops_for_small_batches_do_not_get_large_ones() -> None:
    row = torch.zeros(4)
    assert obstacle(torch.zeros(2, 4, SERIAL), row, row, spec=WINDOW)
    assert obstacle(torch.zeros(2, 3, 4).transpose(1, 2), row, row, spec=WINDOW) is None


def test_loops_for_small_batches_get_a_large_one_in_small_parts() -> None:
    row = torch.zeros(4)
    assert obstacle(torch.zeros(4, 4, SERIAL // 4), row, row, spec=WINDOW, examples=1) is None


def test_it_can_be_switched_off() -> None:
    x, row = torch.zeros(2, 4, 3), torch.zeros(4)
    use_fused("never")
    assert obstacle(x, row, row)
    with pytest.raises(ValueError, match="choice='no': give 'auto', 'always' or 'never'"):
        use_fused("no")


@pytest.mark.few(4)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 5),
    c=st.sampled_from([1, 2, 7]),
    length=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_loops_and_operators_agree(name: str, n: int, c: int, length: int, seed: int) -> None:
    results = []
    for choice in ("auto", "never"):
        use_fused(choice)
        torch.manual_seed(seed)
        layer = make(name, c, 1).double()
        outputs = [step(layer, torch.randn(n, c, length).double() + 3) for _ in range(9)]
        results.append((outputs, state(layer), [p.grad for p in layer.parameters()]))
    (first, first_state, first_grads), (second, second_state, second_grads) = results
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-9)
        assert torch.allclose(a[1], b[1], atol=1e-9)
    for a, b in zip(first_grads, second_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    for key, value in first_state.items():
        assert torch.allclose(value, second_state[key], atol=1e-9), key


@pytest.mark.parametrize("name", NAMES)
def test_what_overflows_the_state_is_not_remembered(name: str) -> None:
    """Sums run in float64: what is finite there may be infinite in float32 memory."""
    layer = make(name, 4, 1)
    for value in (1.0, 1e20, 1.0, 1.0):
        x = torch.randn(2, 4, 3)
        x[0, 1] = value
        step(layer, x)
        assert all(bool(tensor.isfinite().all()) for tensor in state(layer).values())


@pytest.mark.parametrize("example", [0, 1, -1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_loops_keep_values_that_are_not_finite_out_of_the_state(
    name: str, dtype: torch.dtype, value: float, example: int
) -> None:
    for shape in ((16, 4), (16, 4, 3), (3, 4, 70)):
        layer = make(name, 4, 1).to(dtype)
        for number in range(3):
            x = torch.randn(shape, dtype=dtype)
            if number == 1:
                x[example, 1].view(-1)[-1] = value
            step(layer, x)
        assert all(torch.isfinite(t).all() for t in state(layer).values())


@pytest.mark.parametrize("name", ["l1", "range"])
def test_equal_ends_share_a_gradient(name: str) -> None:
    """Of a few whole numbers, many are the largest, the smallest, or the mean."""
    for shape, last in (((16, 3, 4, 5), False), ((4, 3, 9, 9), False), ((6, 3, 4, 5), True)):
        x = torch.randint(-1, 2, shape).double()
        x[0] = x[1]
        x = x.to(memory_format=torch.channels_last) if last else x
        dy, found = torch.randn_like(x), []
        for choice in ("auto", "never"):
            use_fused(choice)
            torch.manual_seed(0)
            found.append(step(make(name, 3, 2).double(), x, dy))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_tracer_sees_operators(name: str) -> None:
    layer, x = make(name, 4, 1), torch.randn(2, 4, 3)
    with anybatch.no_update():
        traced = make_fx(lambda z: layer(z))(x)
        assert torch.allclose(traced(x), layer(x), atol=1e-5)


def test_batched_gradients_of_the_loops_are_those_of_the_operators() -> None:
    layer, x = anybatch.BatchNorm1d(4), torch.randn(2, 4, 3, requires_grad=True)
    y, dy = layer(x), torch.randn(3, 2, 4, 3)
    (together,) = torch.autograd.grad(y, x, dy, retain_graph=True, is_grads_batched=True)
    apart = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in dy]
    assert torch.allclose(together, torch.stack(apart), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_parametrized_weight(name: str) -> None:
    layer = make(name, 4, 1)
    parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    assert step(layer, torch.randn(2, 4, 3))[0].isfinite().all()


@pytest.mark.parametrize("choice", ["auto", "never"])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_forward_between_inference_and_its_backward(name: str, choice: str) -> None:
    use_fused(choice)
    layer, dy = make(name, 4, 1), torch.randn(2, 4, 3)
    grads = []
    for between in (False, True):
        x = torch.arange(24.0).view(2, 4, 3).requires_grad_()
        y = layer.eval()(x)
        if between:
            layer.train()(torch.randn(2, 4, 3))
        y.backward(dy)
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.exhaustive
def test_everything_works_without_numba() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch, anybatch\n"
        "norm = anybatch.MovingAverageBatchNorm1d(4)\n"
        "norm(torch.randn(2, 4, requires_grad=True)).backward(torch.randn(2, 4))\n"
        "print(int(norm.num_batches_tracked))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
