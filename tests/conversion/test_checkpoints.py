"""Checkpoints between methods, through files of both kinds."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import anybatch
from anybatch.layers.weight_centralization import CENTRED
from anybatch.registry import METHODS

KEEPING = [name for name, method in METHODS.items() if method.exact_eval and not method.wraps]
OPTIONS = {
    "mbn": {"batch_size": 4},
    "mabn": {"warmup_steps": 1, "window": 2, "renorm_warmup_steps": 1},
    "cbn": {"window": 3, "burn_in": 0.0},
    **{name: {"ratio": 1 / 2} for name in ("ns", "bs", "fs", "points")},
}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3))


def trained(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = anybatch.convert(network(), method, **OPTIONS.get(method, {}))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    return model


def written(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Through a file, of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_file(state, path)
        return load_file(path)
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.few(2)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("method", [*KEEPING, "bgn"])
def test_training_goes_on_from_a_file_bit_for_bit(method: str, suffix: str, tmp_path: Path) -> None:
    model = trained(method)
    fresh = anybatch.convert(network(), method, **OPTIONS.get(method, {}))
    fresh.load_state_dict(written(model.state_dict(), tmp_path / f"weights{suffix}"))
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        outputs = [net.train()(x) for net in (model, fresh)]
        assert torch.equal(*outputs)
        for net, y in zip((model, fresh), outputs, strict=True):
            net.zero_grad()
            y.square().mean().backward()
        for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize("into", KEEPING)
def test_a_batch_norm_s_checkpoint_keeps_its_outputs(into: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network()
    for _ in range(3):
        model(2 * torch.randn(4, 3, 6, 6) + 1)
    other = network()
    other.load_state_dict(written(model.state_dict(), tmp_path / "bn.safetensors"))
    anybatch.convert(other, into, **OPTIONS.get(into, {}))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("first", KEEPING)
def test_from_any_method_to_any_other(first: str) -> None:
    model = trained(first).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x).detach()
    for second in KEEPING:
        other = anybatch.convert(network(), first, **OPTIONS.get(first, {}))
        other.load_state_dict(model.state_dict())
        anybatch.convert(other, second, **OPTIONS.get(second, {}))
        torch.testing.assert_close(other.eval()(x), expected, rtol=1e-4, atol=1e-5)
        plain = anybatch.to_batchnorm(other)
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        target = network()
        target.load_state_dict(plain.state_dict())
        torch.testing.assert_close(target.eval()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["mbn", "mabn", "cbn", "fs"])
def test_another_method_s_memory_is_refused_by_name(first: str) -> None:
    state = trained(first).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*1\."):
        anybatch.convert(network(), "bn").load_state_dict(state)


# --- centred weights ---------------------------------------------------------------


def fine_tuned(**options: object) -> nn.Module:
    """A batch norm's network that goes on as mabn, whose weights are not centred."""
    torch.manual_seed(1)
    model = network()
    model(torch.randn(8, 3, 6, 6) + 1)
    return step(anybatch.convert(model, "mabn", **options))


def from_scratch(**options: object) -> nn.Module:
    torch.manual_seed(2)
    return step(anybatch.convert(network(), "mabn", **options))


def step(model: nn.Module) -> nn.Module:
    model.train()(torch.randn(8, 3, 6, 6)).square().mean().backward()
    return model


def assert_same_output(one: nn.Module, other: nn.Module, rtol: float = 0.0) -> None:
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "options", [{}, {"copies": 2, "share_affine": False}, {"centered": True}], ids=str
)
@pytest.mark.parametrize("into", [fine_tuned, from_scratch])
@pytest.mark.parametrize("saved", [fine_tuned, from_scratch])
def test_a_checkpoint_of_mabn_says_whether_its_weights_were_centred(
    saved, into, options: dict[str, object], suffix: str, tmp_path: Path
) -> None:
    model, other = saved(**options), into(**options)
    other.load_state_dict(written(model.state_dict(), tmp_path / f"weights{suffix}"))
    assert type(other[0]) is type(model[0])
    assert_same_output(model, other)
    again = torch.optim.SGD(other.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(4, 3, 6, 6)
    for net, optimizer in zip((other, model), again, strict=True):
        net.train().zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    assert_same_output(model, other)
    other.load_state_dict(model.state_dict())  # it tells of what it uses now
    assert_same_output(model, other)


@pytest.mark.parametrize("into", [*KEEPING, "bgn", "frozen"])
def test_a_network_that_leaves_mabn_is_one_of_plain_weights(into: str) -> None:
    if into == "mabn":
        pytest.skip("it stays")
    model, x = from_scratch(), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer.step()
    before, weight = model.eval()(x), model[0].weight
    options = {"num_groups": 4, "example_weight": 0.0} if into == "bgn" else {}
    anybatch.convert(model, into, **options)
    assert type(model[0]) is nn.Conv2d
    assert model[0].weight is weight
    if into != "bgn":
        torch.testing.assert_close(model.eval()(x), before, rtol=1e-4, atol=1e-5)
    step(model)
    optimizer.step()
    torch.manual_seed(3)
    fresh = network()
    if into == "frozen":
        fresh(torch.randn(8, 3, 6, 6))
    fresh = anybatch.convert(fresh, into, **options)
    if into == "cbn":
        step(fresh)
    fresh.load_state_dict(model.state_dict())
    assert_same_output(model, fresh)


class Untraceable(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) if len(x) < 1000 else x
        return x


def test_an_option_that_changes_leaves_it_to_the_norm_to_tell_of_centred_weights() -> None:
    model = Untraceable(*network())
    anybatch.convert(model, "mabn", example_inputs=torch.randn(4, 3, 6, 6))
    keys = list(model.state_dict())
    with pytest.warns(anybatch.NoEffectWarning, match="cannot be traced"):
        anybatch.convert(model, "mabn", window=4)
    assert list(model.state_dict()) == keys
    assert "1.centred_weights" in keys
    anybatch.convert(model, "bn")
    assert type(model[0]) is nn.Conv2d


def test_a_conversion_that_fails_keeps_centred_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_scratch()
    model.append(nn.BatchNorm1d(3))
    weight = model[0].weight.clone()

    def fail(layer: nn.Module, module: nn.Module) -> None:
        assert type(model[0]) is nn.Conv2d  # it is under way
        raise OSError("no memory")

    monkeypatch.setattr(anybatch.MovingAverageBatchNorm1d, "follow", fail)
    with pytest.raises(OSError, match="no memory"):
        anybatch.convert(model, {"1": "bn", "*": "mabn"})
    assert type(model[0]).__name__ == "CentralizedConv2d"
    assert torch.equal(model[0].weight, weight)
    assert "1.centred_weights" in model.state_dict()


def test_centred_weights_that_no_norm_tells_of_are_not_taken_for_others() -> None:
    by_hand = nn.Sequential(
        anybatch.weight_centralization(nn.Conv2d(3, 8, 3)),
        anybatch.MovingAverageBatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    asked_for = anybatch.convert(network(), "bn", centralize=True)
    kept = anybatch.convert(from_scratch(), "brn", centralize=True)
    for model in (by_hand, asked_for, kept):
        step(model)
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.centralized"'):
            model.load_state_dict({k: v for k, v in model.state_dict().items() if k[2:] != CENTRED})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.centralized"'):
        network().load_state_dict(asked_for.state_dict())
    again = anybatch.convert(network(), "bn", centralize=True)
    again.load_state_dict(asked_for.state_dict())
    assert_same_output(asked_for, again)
    plain = network()
    plain.load_state_dict(anybatch.plain_state_dict(asked_for))
    assert_same_output(asked_for, plain, 1e-5)
    back = anybatch.convert(kept, "mabn")
    assert not any(key.endswith(CENTRED) for key in back.state_dict())
    assert back[1].feeder is back[0]


def test_centring_is_told_once_after_every_conversion() -> None:
    several = anybatch.convert(network(), "mabn", copies=2)
    anybatch.convert(several, "brn", where="1.copies.0", centralize=True)
    assert [key for key in several.state_dict() if "centr" in key] == ["1.copies.1.centred_weights"]
    model = from_scratch()
    anybatch.weight_centralization(model[0])  # again, which is nothing
    assert [key for key in model.state_dict() if "centr" in key] == ["1.centred_weights"]
    plain = anybatch.to_batchnorm(fine_tuned())
    again = anybatch.convert(plain, "bn", centralize=True)
    assert "0.centralized" in again.state_dict()
    one = anybatch.keep_copy(anybatch.convert(network(), "mabn", copies=2), 1)
    assert [key for key in one.state_dict() if "centr" in key] == ["1.centred_weights"]


def test_entries_of_centred_weights_are_numbers_like_others() -> None:
    for model in (from_scratch(), anybatch.convert(network(), "bn", centralize=True)):
        state = model.state_dict()
        apart = {key: value - value for key, value in state.items()}
        assert len(apart) == len(state)
    own = {key: value for key, value in state.items() if not key.startswith("1.")}
    x = torch.randn(4, 3, 6, 6)
    torch.func.functional_call(model, own, (x,))
    meta = {key: value.to("meta") for key, value in from_scratch().state_dict().items()}
    fine_tuned().to("meta").load_state_dict(meta, assign=True)


def as_fully_shard_does(layer: nn.Module) -> None:
    layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})


def test_a_layer_whose_class_another_tool_changed_is_told_of_rightly() -> None:
    model, other = from_scratch(), fine_tuned()
    centred, plain = (copy.deepcopy(one.state_dict()) for one in (model, other))
    for one in (model, other):
        as_fully_shard_does(one[0])
    assert model.state_dict()["1.centred_weights"] == 1
    assert other.state_dict()["1.centred_weights"] == 0
    with pytest.raises(RuntimeError, match="FSDPCentralizedConv2d cannot be switched"):
        model.load_state_dict(plain, strict=False)
    with pytest.raises(RuntimeError, match="FSDPConv2d cannot be switched"):
        other.load_state_dict(centred, strict=False)
    with pytest.raises(ValueError, match="made FSDPCentralizedConv2d"):
        anybatch.to_batchnorm(model)
    anybatch.convert(model, "bn")  # which leaves the layer to tell of itself
    assert "0.centralized" in model.state_dict()


def test_a_target_network_takes_over_whether_weights_are_centred() -> None:
    source = from_scratch()
    target = copy.deepcopy(source)
    source.load_state_dict(fine_tuned().state_dict())
    anybatch.update_target(target, source, 1.0)
    assert_same_output(target, source)


# --- torch.distributed.checkpoint ------------------------------------------------


@pytest.mark.few(8)
@pytest.mark.skipif(torch.__version__ < "2.7", reason="it looks entries up as attributes alone")
@pytest.mark.parametrize("way", ["plain", "accumulated", "memories", "outliers", "frozen"])
@pytest.mark.parametrize("method", [*KEEPING, "bgn"])
def test_torch_s_own_state_dict_of_a_distributed_checkpoint_is_the_network_s(
    method: str, way: str
) -> None:
    given = {"memories": {"norm_batch_size": 2, "memories": 2}, "outliers": {"outlier_limit": 99.0}}
    if (method, way) in {("l1", "accumulated"), ("range", "accumulated"), ("sync", "memories")}:
        pytest.skip("the method does not do that")
    options = {**OPTIONS.get(method, {}), **given.get(way, {})}
    groups = {"num_groups": 4} if method == "bgn" else {}
    make = partial(anybatch.convert, method=method, **options, **groups)
    models = [make(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))) for _ in range(2)]
    for number, model in enumerate(models):
        if way == "accumulated":
            anybatch.accumulate(model, 4)
        for _ in range(3 - number):  # the other one is elsewhere
            model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        if way == "frozen":
            anybatch.freeze(model)
    model, other = models
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    set_model_state_dict(other, copy.deepcopy(state))
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
