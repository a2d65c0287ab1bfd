"""outlier_limit: what is out of all proportion enters no memory, unless it stays."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.core.norm_layer import NormLayer
from method_cases import NAMES, batch, make, same, state, step, train

COUNTERS = ("step", "num_batches_tracked", "outliers", "draw", "entries", "position")
LIMIT = 100.0


def settled(name: str, **options: object) -> NormLayer:
    layer = make(name, outlier_limit=LIMIT, **options)
    train(layer, 30, 4)
    return layer


def memories(layer: NormLayer) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in state(layer).items()
        if not key.startswith("backward") and not key.endswith(COUNTERS)
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_wild_batch_enters_no_memory(name: str) -> None:
    layer = settled(name)
    before = memories(layer)
    y, dx = step(layer, 1e4 * batch(4))
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert y.abs().max() < 1e3  # by its own statistics
    assert same(before, memories(layer))
    assert (layer.state_dict()["outliers"] == 1).all()
    step(layer, batch(4))
    assert not same(before, memories(layer))
    assert (layer.state_dict()["outliers"] == 0).all()


@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost", "bs", "l1"])
def test_a_wild_channel_is_left_out_alone(name: str) -> None:
    layer = settled(name)
    twin = copy.deepcopy(layer)
    x = batch(4)
    wild = x.clone()
    wild[:, 2] *= 1e4
    y, expected = layer(wild), twin(x)
    others = torch.arange(6) != 2
    torch.testing.assert_close(y[:, others], expected[:, others], rtol=1e-4, atol=1e-5)
    for key, value in layer.state_dict().items():
        if value.dim() and value.shape[-1] == 6 and key != "outliers":
            assert torch.equal(value[..., others], twin.state_dict()[key][..., others]), key
    assert layer.state_dict()["outliers"].tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_change_that_stays_is_followed(name: str) -> None:
    layer = settled(name)
    before = layer.running_var.clone()
    for _ in range(10):
        step(layer, 100 * batch(4))
    assert torch.equal(layer.running_var, before)
    for _ in range(20):
        step(layer, 100 * batch(4))
    assert (layer.running_var > 100 * before).all()


def test_the_first_batches_settle_what_is_in_proportion() -> None:
    layer = anybatch.BatchNorm2d(6, outlier_limit=LIMIT)
    layer(1e4 * batch(4))  # far from the running variance of 1 that it starts with
    assert (layer.running_var > 1e3).all()


@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "cbn", "brn", "fs"])
@pytest.mark.parametrize("how", ["norm_batch_size", "accumulated", "masked", "checkpointed"])
def test_an_outlier_limit_works_with_all_other_options(name: str, how: str) -> None:
    options = {"norm_batch_size": 2} if how == "norm_batch_size" else {}
    layer = settled(name, **options)
    if how == "accumulated":
        anybatch.accumulate(layer, 2)
    before = memories(layer)
    x = batch(4).requires_grad_()
    wild = torch.cat([1e4 * x[:2], x[2:]]) if how == "norm_batch_size" else 1e4 * x
    if how == "masked":
        y = layer(wild, mask=torch.rand(4, *x.shape[2:]) < 0.7)
    elif how == "checkpointed":
        y = checkpoint(layer, wild, use_reentrant=False)
    else:
        y = layer(wild)
    y.backward(torch.randn_like(y))
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    for key, value in memories(layer).items():
        within_step = key.startswith("step.")  # gone with it
        assert within_step or not value.is_floating_point() or value.abs().max() < 1e3, key
    if how in ("masked", "checkpointed"):
        assert same(before, memories(layer))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["bn", "mabn", "mbn", "brn"])
@pytest.mark.filterwarnings("ignore")
def test_a_layer_with_an_outlier_limit_compiles_whole(name: str) -> None:
    layer = settled(name)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for factor in (1.0, 1e4, 1.0):
        x, dy = factor * batch(4), torch.randn_like(batch(4))
        for one, other in zip(step(compiled, x, dy), step(twin, x, dy), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_checkpoints_pass_with_and_without_an_outlier_limit() -> None:
    layer, plain = settled("mabn"), make("mabn")
    step(layer, 1e4 * batch(4))
    other = make("mabn", outlier_limit=LIMIT)
    other.load_state_dict(layer.state_dict())
    assert same(state(other), state(layer))
    train(plain, 8)
    other.load_state_dict(plain.state_dict())
    assert (other.state_dict()["outliers"] == 0).all()
    kept = {key: value for key, value in state(other).items() if key != "outliers"}
    assert same(kept, state(plain))
    other.state_dict()["outliers"].fill_(3)
    other.reset_running_stats()
    assert (other.state_dict()["outliers"] == 0).all()


def test_an_outlier_limit_holds_on_a_whole_network() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6))
    net = anybatch.convert(net, "mabn", outlier_limit=50)
    assert net[1].outlier_limit == 50
    assert "outlier_limit=50" in repr(net)


@pytest.mark.parametrize("limit", [1.0, 0, -3, float("nan")])
def test_an_outlier_limit_refuses_wrong_arguments(limit: float) -> None:
    with pytest.raises(ValueError, match=f"outlier_limit={limit!r}: give a number above 1"):
        anybatch.BatchNorm2d(3, outlier_limit=limit)
    with pytest.raises(ValueError, match="leave track_running_stats True"):
        anybatch.BatchNorm2d(3, track_running_stats=False, outlier_limit=5)
