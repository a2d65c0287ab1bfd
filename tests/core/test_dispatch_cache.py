"""A layer remembers how a batch went through the loops: what changes since then is seen."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends import use_fused
from anybatch.core.norm_layer import NormLayer
from layer_changes import CHANGES
from method_cases import batch, make, same, state, step

pytest.importorskip("numba")
NAMES = ["bn", "mbn", "mabn", "brn", "ghost", "bgn", "l1", "range"]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    use_fused("auto")
    yield
    use_fused("auto")


def outcome(layer: NormLayer, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(3)
    found = list(step(layer, x))
    return [*found, *(p.grad for p in layer.parameters() if p.grad is not None)], state(layer)


def narrowed(layer: NormLayer, way: str) -> NormLayer:
    """The layer with a mask, or in micro-batches."""
    if way == "mask":
        layer.mask = torch.arange(4) < 3
    elif way == "micro-batches":
        anybatch.accumulate(layer, 2)
    return layer


@pytest.mark.parametrize("way", ["plain", "mask", "micro-batches"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_change_between_two_batches_is_seen(name: str, change: str, way: str) -> None:
    """The layer does what a copy does that has no memory of how batches went."""
    accumulates = "micro-batches" if change != "accumulated" else way
    if way == accumulates and name in ("l1", "range"):
        pytest.skip("they do not accumulate")
    if (way, change) == ("micro-batches", "small batches"):
        pytest.skip("micro-batches are not cut")
    layer = narrowed(make(name), way)
    x = batch(4)
    for _ in range(3):
        step(layer, x)
    grouped = way == "micro-batches" and name in ("ghost", "bgn")  # which the loops do not serve
    assert layer._plans or grouped, "it remembers"
    layer.zero_grad()
    fresh = copy.deepcopy(layer)
    assert not fresh._plans
    for one in (layer, fresh):
        CHANGES[change](one)
    x = x.double() if change == "double" else x
    for _ in range(2):
        mine, theirs = outcome(layer, x), outcome(fresh, x)
        fresh.__dict__.pop("_plans", None)
        for a, b in zip(mine[0], theirs[0], strict=True):
            assert torch.equal(a, b)
        assert same(mine[1], theirs[1])


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:3],
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:0],
        lambda x: torch._neg_view(x),
        lambda x: x.expand(4, *x.shape[1:]),
    ],
)
def test_another_batch_goes_its_own_way(other: Callable[[Tensor], Tensor]) -> None:
    layer, x = make("brn"), batch(4)
    for _ in range(2):
        step(layer, x)
    fresh, y = copy.deepcopy(layer), other(x)
    mine, theirs = layer(y), fresh(y)
    assert torch.equal(mine, theirs)
    assert mine.dtype == y.dtype
    assert same(state(layer), state(fresh))


def test_modes_around_a_forward_are_seen() -> None:
    layer, x = make("mabn"), batch(4).requires_grad_()
    step(layer, x)
    fresh = copy.deepcopy(layer)
    with anybatch.no_update():
        y = layer(x)
    assert same(state(layer), state(fresh))
    assert torch.equal(y, fresh(x))
    before = layer.method_state["step"].item()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    checkpoint(layer, x, use_reentrant=True).sum().backward()
    assert layer.method_state["step"].item() == before + 2  # a forward that runs again counts once
    layer.eval()
    fixed = torch.func.functional_call(layer, {"weight": torch.zeros(6)}, (x,))
    assert torch.equal(fixed, layer.bias.view(-1, 1, 1).expand_as(fixed))


def test_swapped_parameters_are_those_of_the_call() -> None:
    layer, x = make("bn"), batch(4)
    for _ in range(2):
        step(layer, x)
    own = {"weight": torch.zeros(6), "bias": torch.arange(6.0)}
    y = torch.func.functional_call(layer, own, (x,))
    assert torch.equal(y, own["bias"].view(-1, 1, 1).expand_as(y))


@pytest.mark.parametrize("way", ["plain", "mask", "micro-batches"])
def test_a_tensor_that_outlived_a_transform_is_a_tensor(way: str) -> None:
    layer, x, kept = narrowed(make("bn"), way), batch(4), []
    for _ in range(2):
        step(layer, x)
    fresh = copy.deepcopy(layer)

    def leaky(z: Tensor) -> Tensor:
        kept.append(z)
        return z.sum()

    torch.func.grad(leaky)(x)
    assert torch.equal(layer(kept[0]), fresh(x))
    assert same(state(layer), state(fresh))


def test_masks_of_successive_batches_leave_what_is_remembered() -> None:
    """A mask is part of a batch, and not a setting."""
    layer, x = make("mabn"), batch(4)
    for number in range(3):
        with anybatch.masked(layer, torch.arange(4) != number):
            step(layer, x)
    known = layer._plans
    assert known
    with anybatch.masked(layer, torch.arange(4) > 1):
        step(layer, x)
        assert layer._plans is known
    step(layer, x)  # nothing is left of the mask
    assert layer._plans is known
    assert len(known) == 2
    fresh = copy.deepcopy(layer)
    with anybatch.masked(layer, torch.zeros(4, dtype=torch.bool)):
        mine = layer(x)
    with anybatch.masked(fresh, torch.zeros(4, dtype=torch.bool)):
        assert torch.equal(mine, fresh(x))
    assert same(state(layer), state(fresh))


def test_many_shapes_do_not_pile_up() -> None:
    layer = make("bn")
    for length in range(2, 60):
        step(layer, torch.randn(2, 6, length, 3))
        assert layer._plans is not None
        assert len(layer._plans) <= 16
    assert pickle.loads(pickle.dumps(layer))._plans is None


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_a_compiler_comes_after_batches_without_one() -> None:
    torch._dynamo.reset()
    layer, x = make("brn"), batch(4)
    for _ in range(2):
        step(layer, x)
    fresh = copy.deepcopy(layer)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        mine, theirs = step(run, x, torch.ones_like(x)), step(fresh, x, torch.ones_like(x))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
