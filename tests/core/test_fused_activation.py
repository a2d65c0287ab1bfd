"""relu(norm(x)) and relu(norm(x) + residual) in the norm's own pass."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends import use_fused
from anybatch.core.norm_layer import NormLayer
from method_cases import NAMES, batch, make, same, state

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Both sides do the same sums; what is added before the ReLU may be added in another order.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6}
each_name = pytest.mark.parametrize("name", NAMES)
each_residual = pytest.mark.parametrize("adds", [False, True], ids=["relu", "add"])


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    use_fused("auto")


def apart(layer: nn.Module, x: Tensor, residual: Tensor | None, **given: Any) -> Tensor:
    """The same by operators behind the layer."""
    y = layer(x, **given)
    return torch.relu(y if residual is None else y + residual)


def together(layer: nn.Module, x: Tensor, residual: Tensor | None, **given: Any) -> Tensor:
    y: Tensor = layer(x, residual=residual, activation="relu", **given)
    return y


def course(
    way: Callable[..., Tensor],
    layer: NormLayer,
    shape: tuple[int, ...],
    adds: bool,
    dtype: torch.dtype,
    form: torch.memory_format = torch.contiguous_format,
    steps: int = 8,
    **given: Any,
) -> list[Tensor]:
    """Outputs, gradients and state along some steps of training."""
    torch.manual_seed(3)
    found = []
    for _ in range(steps):
        x, r, dy = (torch.randn(shape, dtype=dtype).contiguous(memory_format=form) for _ in "xrd")
        x, r = (2 * x + 1).requires_grad_(), r.requires_grad_()
        layer.zero_grad()
        y = way(layer, x, r if adds else None, **given)
        y.backward(dy)
        assert x.grad is not None
        assert y.stride() == x.stride()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        found += [y.detach(), x.grad, *grads, *([r.grad] if adds else [])]
    return [*found, *(tensor.double() for tensor in state(layer).values())]


def layers(name: str, dtype: torch.dtype, **options: Any) -> tuple[NormLayer, NormLayer]:
    """Two that are the same."""
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(make(name, 6, 2, **options).to(dtype))
    return found[0], found[1]


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, as a share of the largest value."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


# Like the operators behind a layer


@each_name
@each_residual
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", [(5, 7), (3, 3), (9, 8)], ids=str)
def test_compiled_loops_do_what_operators_do(
    name: str, adds: bool, form: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    one, two = layers(name, dtype)
    shape = (9 if size == (3, 3) else 4, 6, *size)
    ours = course(together, one, shape, adds, dtype, FORMATS[form])
    theirs = course(apart, two, shape, adds, dtype, FORMATS[form])
    assert largest(ours, theirs) <= CLOSE[dtype]


@each_name
@each_residual
def test_without_the_loops_it_is_the_operators_to_the_bit(name: str, adds: bool) -> None:
    use_fused("never")
    one, two = layers(name, torch.float32)
    ours = course(together, one, (4, 6, 5, 5), adds, torch.float32)
    theirs = course(apart, two, (4, 6, 5, 5), adds, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@each_residual
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["bn", "mabn", "ghost", "bgn"])
@pytest.mark.parametrize("form", FORMATS)
def test_large_batches_on_several_threads(name: str, adds: bool, threads: int, form: str) -> None:
    torch.set_num_threads(threads)
    one, two = layers(name, torch.float64)
    shape = (6, 6, 40, 61)
    ours = course(together, one, shape, adds, torch.float64, FORMATS[form], 2)
    theirs = course(apart, two, shape, adds, torch.float64, FORMATS[form], 2)
    assert largest(ours, theirs) <= CLOSE[torch.float64]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    channels=st.sampled_from([1, 2, 6, 7, 33]),
    length=st.integers(1, 70),
    cut=st.sampled_from([None, 1, 2, 3]),
    last=st.booleans(),
    adds=st.booleans(),
    name=st.sampled_from(["bn", "ghost", "bgn", "brn", "mabn"]),
)
def test_relu_is_fused_for_any_shape(
    n: int, channels: int, length: int, cut: int | None, last: bool, adds: bool, name: str
) -> None:
    found = []
    for way in (together, apart):
        torch.manual_seed(n)
        layer = make(name, channels, 1, norm_batch_size=cut).double()
        x, r, dy = (torch.randn(n, length, channels).double().transpose(1, 2) for _ in "xrd")
        x, r, dy = ((t if last else t.contiguous()) for t in (x, r, dy))
        x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
        y = way(layer, x, r if adds else None)
        y.backward(dy)
        grads = [x.grad, layer.weight.grad, layer.bias.grad, *([r.grad] if adds else [])]
        found.append([y.detach(), *grads, *(t.double() for t in state(layer).values())])
    assert largest(found[0], found[1]) <= 1e-10  # of two values that nearly coincide


@each_residual
@pytest.mark.parametrize("name", ["bn", "ghost", "bgn"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_gradient_is_that_of_the_output(name: str, adds: bool, form: str) -> None:
    layer = make(name, 4, 2).double()
    x, r = (
        torch.randn(3, 4, 2, 3).double().contiguous(memory_format=FORMATS[form]).requires_grad_()
        for _ in "xr"
    )

    def function(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with anybatch.no_update():
            parameters = {"weight": weight, "bias": bias}
            given = {"activation": "relu", "residual": r if adds else None}
            found: Tensor = torch.func.functional_call(layer, parameters, (x,), given)
        return found

    with torch.no_grad():
        close = function(x, r, layer.weight, layer.bias)
    assert float(close[close > 0].min()) > 1e-4  # no kink within reach of a finite difference
    assert torch.autograd.gradcheck(function, (x, r, layer.weight, layer.bias))


# What is kept for backward


def kept(forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that a forward keeps."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


@each_name
@each_residual
@pytest.mark.parametrize("form", FORMATS)
def test_the_fused_relu_keeps_no_more_than_the_operators(name: str, adds: bool, form: str) -> None:
    one, two = layers(name, torch.float32)
    x, r = (torch.randn(4, 6, 8, 8).contiguous(memory_format=FORMATS[form]) for _ in "xr")
    x.requires_grad_(), r.requires_grad_()
    residual = r if adds else None
    ours, theirs = (
        kept(lambda w=w, n=n: w(n, x, residual)) for w, n in [(together, one), (apart, two)]
    )
    assert ours <= theirs
    assert ours >= 2 * x.nbytes  # input and output, which no mask could replace


def test_what_is_kept_may_not_be_written_over() -> None:
    layer, x = anybatch.BatchNorm2d(6), torch.randn(4, 6, 5, 5, requires_grad=True)
    y = layer(x, activation="relu")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# What is not finite, what needs no gradient, what has another format


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@each_residual
@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost", "cbn"])
def test_what_is_not_finite_is_as_behind_the_layer(name: str, adds: bool, value: float) -> None:
    found = []
    for way in (together, apart):
        layer = layers(name, torch.float32)[0]
        course(way, layer, (4, 6, 3, 3), adds, torch.float32, steps=3)
        x, r = batch(4), torch.randn(4, 6, 4, 3)
        x[1, 2, 0, 0] = value
        x.requires_grad_()
        y = way(layer, x, r if adds else None)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), x.grad, state(layer)))
    (y, dx, one), (expected, expected_dx, two) = found
    assert torch.allclose(y, expected, atol=1e-5, equal_nan=True)
    assert torch.allclose(dx, expected_dx, atol=1e-5, equal_nan=True)
    assert all(bool(tensor.float().isfinite().all()) for tensor in one.values())
    assert same(one, two) or all(torch.allclose(one[k].double(), two[k].double()) for k in one)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("needs", ["x", "r", "weight", "nothing"])
def test_only_wanted_gradients_are_made(needs: str, form: str) -> None:
    found = []
    for way in (together, apart):
        torch.manual_seed(0)
        layer = anybatch.BatchNorm2d(6)
        x, r = (torch.randn(4, 6, 5, 5).contiguous(memory_format=FORMATS[form]) for _ in "xr")
        layer.requires_grad_(needs == "weight")
        x.requires_grad_(needs == "x"), r.requires_grad_(needs == "r")
        y = way(layer, x, r)
        assert y.requires_grad is (needs != "nothing")
        if needs != "nothing":
            y.backward(torch.randn(y.shape))
        found.append((y.detach(), x.grad, r.grad, layer.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_residual_may_lie_otherwise_in_memory(form: str) -> None:
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=FORMATS[form])
    others = [
        torch.randn(4, 6, 5, 5),
        torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(1, 6, 1, 1).expand(4, 6, 5, 5),
        torch.randn(4, 6, 10, 5)[:, :, ::2],
        torch._neg_view(torch.randn(4, 6, 5, 5)),
        x,
    ]
    for residual in others:
        one, two = layers("bn", torch.float32)
        y = together(one, x, residual)
        assert y.stride() == x.stride()
        assert torch.allclose(y, apart(two, x, residual), atol=1e-6)


# In all the ways in which a layer can be called


@each_name
@each_residual
def test_inference_is_the_operators(name: str, adds: bool) -> None:
    one, two = layers(name, torch.float32)
    for layer in (one, two):
        course(apart, layer, (4, 6, 3, 3), adds, torch.float32, steps=3)
        layer.eval()
    x, residual = batch(3), torch.randn(3, 6, 4, 3) if adds else None
    assert torch.equal(together(one, x, residual), apart(two, x, residual))
    anybatch.freeze(nn.Sequential(one)), anybatch.freeze(nn.Sequential(two))
    one.train(), two.train()
    assert torch.equal(together(one, x, residual), apart(two, x, residual))


@each_name
@each_residual
def test_masked_empty_and_accumulated_batches(name: str, adds: bool) -> None:
    one, two = layers(name, torch.float32)
    mask = torch.rand(4, 5, 5) > 0.3
    if not name.endswith("vdn"):
        ours = course(together, one, (4, 6, 5, 5), adds, torch.float32, steps=4, mask=mask)
        theirs = course(apart, two, (4, 6, 5, 5), adds, torch.float32, steps=4, mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    residual = torch.randn(0, 6, 5, 5) if adds else None
    assert together(one, torch.randn(0, 6, 5, 5), residual).shape == (0, 6, 5, 5)
    if one.pools:
        anybatch.accumulate(nn.Sequential(one), 2), anybatch.accumulate(nn.Sequential(two), 2)
        ours = course(together, one, (4, 6, 5, 5), adds, torch.float32, steps=4)
        theirs = course(apart, two, (4, 6, 5, 5), adds, torch.float32, steps=4)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("adds", [False, True], ids=["relu", "add"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bn", "mabn", "mbn", "brn", "bs", "l1"])
def test_a_checkpointed_forward_counts_once(name: str, reentrant: bool, adds: bool) -> None:
    plain, checked = layers(name, torch.float64)
    for _ in range(3):
        x, r = (torch.randn(4, 6, 5, 5).double().requires_grad_() for _ in "xr")
        dy, found = torch.randn(4, 6, 5, 5).double(), []
        for layer, way in ((plain, together), (checked, checkpointed(reentrant))):
            x.grad = r.grad = None
            layer.zero_grad()
            y = way(layer, x, r if adds else None)
            y.backward(dy)
            found.append([y.detach(), x.grad, layer.weight.grad, *([r.grad] if adds else [])])
        assert largest(found[0], found[1]) <= 1e-10
    one, two = state(plain), state(checked)
    assert all(torch.allclose(one[key].double(), two[key].double(), atol=1e-12) for key in one)


def checkpointed(reentrant: bool) -> Callable[..., Tensor]:
    def way(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = checkpoint(together, layer, x, residual, use_reentrant=reentrant)
        return y

    return way


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@each_name
@each_residual
def test_layers_compile_whole(name: str, adds: bool) -> None:
    torch._dynamo.reset()
    one, two = layers(name, torch.float32)
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    use_fused("never")  # the compiler sees operators
    if one.example_weight or name in ("mbn", "cbn"):
        course(apart, one, (4, 6, 5, 5), adds, torch.float32, steps=1)  # reads the batch size
        course(apart, two, (4, 6, 5, 5), adds, torch.float32, steps=1)
    ours = course(compiled, one, (4, 6, 5, 5), adds, torch.float32, steps=2)
    theirs = course(apart, two, (4, 6, 5, 5), adds, torch.float32, steps=2)
    assert largest(ours, theirs) <= 1e-5


def test_inference_exports_as_ordinary_operators() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = anybatch.BatchNorm2d(6)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            y: Tensor = self.norm(x, residual=r, activation="relu")
            return y

    x = torch.randn(2, 6, 4, 4)
    program = torch.export.export(Block().eval(), (x, x))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name.split(".")[1] for name in called] == ["batch_norm", "add", "relu"]


def test_batched_gradients_of_the_fused_relu() -> None:
    layer = anybatch.BatchNorm2d(4)
    x, r = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in "xr")
    y, dy = together(layer, x, r), torch.randn(3, 2, 4, 3, 3)
    batched = torch.autograd.grad(y, (x, r), dy, retain_graph=True, is_grads_batched=True)
    apart = [torch.autograd.grad(y, (x, r), one, retain_graph=True) for one in dy]
    for ours, theirs in zip(batched, zip(*apart, strict=True), strict=True):
        assert torch.allclose(ours, torch.stack(theirs), atol=1e-5)


# What is refused


def test_there_is_no_second_derivative_of_averaged_backward_statistics() -> None:
    layer, x = make("mabn"), batch(4).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(together(layer, x, x).sum(), x, create_graph=True)


def test_bad_input_is_refused() -> None:
    layer, x = anybatch.BatchNorm2d(6), torch.randn(4, 6, 5, 5)
    with pytest.raises(ValueError, match="activation='gelu': give 'relu' or None"):
        layer(x, activation="gelu")
    with pytest.raises(ValueError, match="activation=None: give 'relu' with a residual"):
        layer(x, residual=x)
    with pytest.raises(ValueError, match=r"residual of shape \(4, 6, 5, 1\): give one of the inpu"):
        layer(x, residual=x[..., :1], activation="relu")
    with pytest.raises(TypeError, match=r"residual of type torch.float64: .*torch.float32"):
        layer(x, residual=x.double(), activation="relu")
    with pytest.raises(TypeError, match="residual of type int"):
        layer(x, residual=1, activation="relu")
    assert int(layer.num_batches_tracked) == 0
