"""Networks made on the meta device, and loads that replace, lack or pass over a layer's state."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.layers.weight_centralization import is_centralized
from method_cases import NAMES, batch, make, same, state, train

METHODS = [name for name in NAMES if name != "sync"]


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    )


def _converted(name: str) -> nn.Module:
    options = {"num_virtual": 1} if anybatch.registry.METHODS[name].wraps else {}
    if name == "bgn":
        options = {"num_groups": 2}
    return anybatch.convert(
        _network(), name, batch_size=2 if name in ("mbn", "cbn") else None, **options
    )


def _train(net: nn.Module, steps: int = 3) -> None:
    for _ in range(steps):
        net(torch.randn(2, 3, 9, 9)).pow(2).sum().backward()


@pytest.mark.parametrize("name", METHODS)
def test_a_network_made_on_meta_trains_after_an_assigning_load(name: str) -> None:
    source = _converted(name)
    _train(source)
    kept = source.state_dict()
    before = copy.deepcopy(kept)
    with torch.device("meta"):
        net = _converted(name)
    assert [type(m) for m in net.modules()] == [type(m) for m in source.modules()]
    net.load_state_dict(kept, assign=True)
    assert same(state(net), before)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(copy.deepcopy(net).eval()(x), source.eval()(x))
    source.train()
    y, wanted = net(x), copy.deepcopy(source)(x)
    assert torch.equal(y, wanted)
    _train(net)
    assert all(not t.is_meta for t in net.state_dict().values())
    assert same(
        {k: v for k, v in kept.items() if "running" in k},
        {k: v for k, v in before.items() if "running" in k},
    )


@pytest.mark.parametrize("name", METHODS)
def test_what_a_batch_norms_checkpoint_lacks_starts_fresh_beside_the_parameters(name: str) -> None:
    plain = _network()
    _train(plain)
    kept = plain.state_dict()
    before = copy.deepcopy(kept)
    with torch.device("meta"):
        net = _converted(name)
    centred = pytest.warns(UserWarning, match="centred") if name == "mabn" else nullcontext()
    with centred:
        net.load_state_dict(kept, assign=True)
    assert all(not t.is_meta for t in net.state_dict().values())
    x = torch.randn(2, 3, 9, 9)
    if name != "bgn":
        torch.testing.assert_close(net.eval()(x), copy.deepcopy(plain).eval()(x))
    net.train()
    _train(net)
    assert same(dict(kept), before)  # nothing of the caller's was written


@pytest.mark.parametrize("name", METHODS)
def test_to_empty_leaves_a_fresh_state(name: str) -> None:
    with torch.device("meta"):
        net = _converted(name)
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    _train(net)
    assert all(bool(t.float().isfinite().all()) for t in net.state_dict().values())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_load_without_the_layers_keys_touches_nothing(name: str, assign: bool) -> None:
    net = nn.Sequential(make(name), nn.Linear(3, 2))
    train(net[0], 4, 4)
    net[0].num_batches_tracked.fill_(7)
    before = state(net[0])
    head = {"1.weight": torch.zeros(2, 3)}
    net.load_state_dict(head, strict=False, assign=assign)
    assert same(state(net[0]), before)


def test_loading_a_batch_norm_into_mabn_by_assignment_leaves_the_callers_tensors() -> None:
    plain = nn.BatchNorm2d(6)
    plain.running_mean.normal_()
    for kept in (plain.state_dict(), plain.state_dict(keep_vars=True)):
        before = copy.deepcopy(kept)
        nets = [anybatch.MovingAverageBatchNorm2d(6) for _ in range(2)]
        for net in nets:
            net.load_state_dict(kept, assign=True)
        assert same(dict(kept), dict(before))
        x = batch(4)
        for net in nets:
            torch.testing.assert_close(net.eval()(x), copy.deepcopy(plain).eval()(x))


def test_the_keys_of_cbn_are_there_from_conversion_on() -> None:
    net = anybatch.convert(_network(), "cbn")
    fresh = copy.deepcopy(net)
    keys = list(net.state_dict())
    _train(net)
    assert list(net.state_dict()) == keys
    fresh.load_state_dict(net.state_dict())
    assert same(state(fresh), state(net))
    net.load_state_dict(anybatch.convert(_network(), "cbn").state_dict())  # of a fresh server
    assert not net[1].method_state["mean"].any()
    _train(net)
    large = anybatch.convert(_network(), "cbn")
    keys = list(large.state_dict())
    large(torch.randn(16, 3, 9, 9)).sum().backward()
    assert list(large.state_dict()) == keys


def test_a_checkpoint_with_impossible_counters_empties_the_window() -> None:
    net = anybatch.convert(_network(), "cbn", batch_size=2)
    _train(net)
    kept = state(net)
    kept["1.position"].fill_(10**9)
    kept["4.entries"].fill_(-5)
    net.load_state_dict(kept)
    assert net[1].method_state["position"] == 0
    assert net[4].method_state["entries"] == 0
    _train(net)


def test_cbn_is_not_bound_to_a_layer_of_unknown_size() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy layers
        lazy = nn.LazyConv2d(6, 3)
        net = nn.Sequential(lazy, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match="number of inputs is not known yet"):
        anybatch.CrossIterationBatchNorm2d(6, window=3).bind(lazy)
    anybatch.convert(net, "cbn", batch_size=2)
    assert type(net[1]) is nn.BatchNorm2d
    assert isinstance(net[3], anybatch.CrossIterationBatchNorm2d)
    _train(net)


def test_micro_batches_of_a_network_made_on_meta() -> None:
    source = _converted("mabn")
    anybatch.accumulate(source, 2)
    _train(source)
    with torch.device("meta"):
        net = _converted("mabn")
        anybatch.accumulate(net, 2)
    net.load_state_dict(source.state_dict(), assign=True)
    x: Tensor = torch.randn(2, 3, 9, 9)
    assert torch.equal(net(x), source(x))
    _train(net)


def test_a_trained_plain_checkpoint_in_a_centred_network_stays_exact() -> None:
    plain = _network()
    _train(plain)
    x = torch.randn(2, 3, 9, 9)
    wanted = copy.deepcopy(plain).eval()(x)
    for kept in (plain.state_dict(), dict(plain.state_dict())):  # with and without metadata
        net = anybatch.convert(_network(), "mabn")
        with pytest.warns(UserWarning, match="its weights are no longer centred"):
            net.load_state_dict(kept)
        torch.testing.assert_close(net.eval()(x), wanted)
        resumed = anybatch.convert(_network(), "mabn")
        resumed.load_state_dict(net.state_dict())  # which says so itself: no warning
        torch.testing.assert_close(resumed.eval()(x), wanted)


def test_a_centred_checkpoint_in_an_uncentred_network_stays_exact() -> None:
    source = anybatch.convert(_network(), "mabn")
    _train(source)
    plain = _network()
    _train(plain)
    net = anybatch.convert(_network(), "mabn")
    with pytest.warns(UserWarning, match="no longer centred"):
        net.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 9, 9)
    net.load_state_dict(source.state_dict())
    assert torch.equal(net.eval()(x), source.eval()(x))
    trained = anybatch.convert(plain, "mabn")
    trained.load_state_dict(source.state_dict())
    assert torch.equal(trained.eval()(x), source.eval()(x))
    unknown = nn.Sequential(plain[0], copy.deepcopy(trained[1]), *plain[2:])
    unknown[1].__dict__["_feeder"] = ()
    with pytest.warns(UserWarning, match="which are not centred here"):
        unknown.load_state_dict(source.state_dict(), strict=False)


def test_an_untrained_checkpoint_leaves_the_weights_centred() -> None:
    net = anybatch.convert(_network(), "mabn")
    net.load_state_dict(_network().state_dict())
    assert is_centralized(net[0])


def test_a_cross_iteration_norm_trains_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    net = anybatch.convert(net, "cbn", batch_size=2)
    for _ in range(3):
        net(torch.randn(2, 3, 9, 9, device="meta")).sum().backward()


@pytest.mark.parametrize("way", ["recalibrate", "diagnose", "eval_norm", "tune_example_weight"])
def test_what_reads_values_refuses_a_network_without_any(way: str) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    more = (2,) if way == "eval_norm" else ()
    with pytest.raises(ValueError, match="it has tensors on the meta device"):
        getattr(anybatch, way)(net, [(torch.randn(4, 4), torch.arange(4) % 3)] * 3, *more)
