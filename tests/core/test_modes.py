"""Tensors made while torch traces a call never reach a call that nothing traces."""

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends import use_fused
from anybatch.backends.aten import patches, scalars
from method_cases import NAMES, batch, make, same, state, step

SHAPE = 4, 6, 5, 7


def run_fake(layer: nn.Module, x: Tensor) -> None:
    """Train on tensors without data, with and without gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(*x.shape, requires_grad=True)
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)


MODES = {
    "FakeTensorMode": run_fake,
    "make_fx": lambda layer, x: make_fx(layer)(x),
    "make_fx of fake tensors": lambda layer, x: make_fx(layer, tracing_mode="fake")(x),
    "functionalize": lambda layer, x: functionalize(layer)(x),
    "inference_mode": torch.inference_mode()(lambda layer, x: layer(x)),
}


@pytest.fixture(autouse=True)
def _operators_without_constants() -> Iterator[None]:
    """On torch operators, whose constants and positions are kept; none yet, as in a new process."""
    use_fused("never")
    scalars._keep.cache_clear()
    patches._kept.cache_clear()
    yield
    use_fused("auto")


def run(mode: str, layer: nn.Module) -> None:
    """Run a layer in a mode; some refuse a layer whose state they do not know."""
    with contextlib.suppress(RuntimeError, AssertionError):
        MODES[mode](layer, torch.randn(SHAPE))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_traced_layer_leaves_no_tensor_to_an_untraced_one(name: str, mode: str) -> None:
    x, dy = batch(4), torch.randn(4, 6, 4, 3)
    reference, fresh, traced = make(name), make(name), make(name)
    fresh.load_state_dict(reference.state_dict())
    run(mode, traced)
    found = step(fresh, x, dy)
    scalars._keep.cache_clear()
    expected = step(reference, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same(state(fresh), state(reference))


def train_checkpointed(layer: nn.Module) -> Tensor:
    x = torch.linspace(-1, 2, 4 * 6 * 35).view(SHAPE).requires_grad_()
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_ran_on_fake_tensors_trains_on_real_ones(name: str) -> None:
    reference, layer = make(name), make(name)
    layer.load_state_dict(reference.state_dict())
    with anybatch.no_update():
        run_fake(layer, torch.randn(SHAPE))
    assert torch.equal(train_checkpointed(layer), train_checkpointed(reference))
    assert same(state(layer), state(reference))


def traced_tensors() -> list[Tensor]:
    gc.collect()
    # Of its type: isinstance asks for __class__, which a weak reference to a dead object refuses.
    return [t for t in gc.get_objects() if issubclass(type(t), FakeTensor | FunctionalTensor)]


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_no_fake_tensor_outlives_its_call(name: str) -> None:
    before = {id(t) for t in traced_tensors()}
    layer = make(name)
    run_fake(layer, torch.randn(SHAPE))
    layer.zero_grad()
    assert not [t for t in traced_tensors() if id(t) not in before]
