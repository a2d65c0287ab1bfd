"""Batch norms that end in an activation, as timm has them: a stand-in of the same kind."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.conversion import convert, fold, plan, to_batchnorm
from anybatch.conversion.norm_with_activation import apply_activation
from anybatch.registry import METHODS
from zoo.listing import randomize


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm, dropout, activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), AddOne()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        affine = (self.weight, self.bias)
        x = F.batch_norm(x, *statistics, *affine, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class FrozenBatchNormAct2d(nn.Module):
    """Constants in place of parameters and statistics, dropout, activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))
        self.drop, self.act = nn.Dropout(0.5), AddOne()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return self.act(self.drop(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)))


class GroupNormAct(nn.GroupNorm):
    """Group norm, dropout, activation."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self._fast_norm
        return self.act(self.drop(super().forward(x)))


TIMM = types.ModuleType("timm.layers.norm_act")
for _kind in (BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct):
    _kind.__module__ = TIMM.__name__
    setattr(TIMM, _kind.__name__, _kind)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins in the place of timm's module."""
    monkeypatch.setitem(sys.modules, TIMM.__name__, TIMM)


class AddOne(nn.Module):
    """An activation with a parameter, which shows how often it was applied."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slope.view(1)) + 1.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), BatchNormAct2d(6),
        nn.Conv2d(6, 4, 3), BatchNormAct2d(4), nn.Flatten(1), nn.Linear(64, 2),
    )  # fmt: skip


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_activation_of_a_converted_norm_stays(method: str) -> None:
    model, x = randomize(network()).eval(), images()
    before, keys, act = model(x), list(model.state_dict()), model[1].act
    convert(model, method, example_inputs=x)
    assert type(model[1]) is METHODS[method].layer(2)
    assert model[1].act is act
    if METHODS[method].exact_eval:
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        assert set(keys) <= set(model.state_dict())
    reference = copy.deepcopy(model)
    for norm in (reference[1], reference[3]):
        for key in [k for k, h in norm._forward_hooks.items() if h is apply_activation]:
            del norm._forward_hooks[key]
    h = reference[1](reference[0](x))
    h = act(h)
    torch.testing.assert_close(model[1](model[0](x)), h)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["bn", "mabn", "brn", "cbn"])
def test_a_norm_with_activation_goes_back_to_what_it_was(method: str) -> None:
    model, x = randomize(network()).eval(), images()
    keys = list(model.state_dict())
    convert(model, method, example_inputs=x)
    model.train()(images(4)).sum().backward()
    model.eval()
    after = model(x)
    to_batchnorm(model)
    torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)
    assert type(model[1]) is BatchNormAct2d
    assert list(model.state_dict()) == keys
    assert not model[1]._forward_hooks
    model.train()(images(4))  # its own training still works


def frozen_network() -> nn.Sequential:
    model = network()
    for number, channels in ((1, 6), (3, 4)):
        model[number] = FrozenBatchNormAct2d(channels)
        for tensor in model[number].buffers():
            nn.init.uniform_(tensor, 0.5, 2.0)
    return model.eval()


@pytest.mark.every_case
@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("frozen_by", ["anybatch", "timm"])
@pytest.mark.parametrize("then", ["mabn", "cbn", "gn", "frozen", "to_batchnorm", "fold"])
def test_a_frozen_norm_with_activation_goes_on(frozen_by: str, then: str) -> None:
    x = images()
    if frozen_by == "timm":
        model = frozen_network()
    else:
        model = convert(randomize(network()).eval(), "frozen")
    before, act = model(x), model[1].act
    if then == "fold":
        model = fold(model, x)
        assert model[1][1] is act
    elif then == "to_batchnorm":
        to_batchnorm(model)
        assert not model[1]._forward_hooks
    else:
        convert(model, then, example_inputs=x)
        assert model[1].act is act
        frozen = then == "frozen"
        assert all(p.requires_grad is not frozen for p in (model[1].weight, model[1].bias))
    if then != "gn":
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    if then in ("mabn", "cbn"):
        model.train()(images(4)).sum().backward()
        after = model.eval()(x)
        to_batchnorm(model)
        assert type(model[1]) is BatchNormAct2d
        torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("timm")
def test_a_refused_conversion_leaves_a_frozen_norm_with_activation_alone() -> None:
    model, x = frozen_network(), images()
    before = model(x)
    plan(model, "mabn")
    with pytest.raises(ValueError, match="nothing was converted"):
        convert(model.append(nn.LazyBatchNorm1d()), "mabn")
    assert type(model[1]) is FrozenBatchNormAct2d
    assert not model[1]._forward_hooks
    torch.testing.assert_close(model[:-1](x), before)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("first", [None, "mabn"])
@pytest.mark.parametrize("method", ["gn", "ln", "in"])
def test_group_norms_with_activation_are_timms_own(method: str, first: str | None) -> None:
    model, x = randomize(network()).eval(), images()
    keys = [key for key in model.state_dict() if "running" not in key and "tracked" not in key]
    if first is not None:
        convert(model, first)
    act = model[1].act
    convert(model, method)
    assert type(model[1]) is GroupNormAct
    assert not model[1]._forward_hooks
    assert list(to_batchnorm(model).state_dict()) == keys
    plain = F.group_norm(h := model[0](x), model[1].num_groups, model[1].weight, model[1].bias)
    torch.testing.assert_close(model[1](h), act(plain))
    with anybatch.masked(model[1], torch.ones(2, dtype=torch.bool)):
        torch.testing.assert_close(model[1](h), act(plain))
    assert "anybatch" not in str([vars(module) for module in model.modules()])


def test_the_activation_is_applied_once_after_two_conversions() -> None:
    model, x = randomize(network()).eval(), images()
    before = model(x)
    for method in ("mabn", "brn", "cbn", "bn"):
        convert(model, method, example_inputs=x)
        assert len([h for h in model[1]._forward_hooks.values() if h is apply_activation]) == 1
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [None, "mbn"])
def test_folding_leaves_the_activation(method: str | None) -> None:
    model, x = randomize(network()).eval(), images()
    if method is not None:
        convert(model, method)
    before, act = model(x), model[1].act
    fold(model, x)
    assert model[1][1] is act
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_the_plan_names_the_activation() -> None:
    rows = plan(network(), "mabn").having("convert")
    assert [row.feeder for row in rows] == ["0", "2"]
    assert all("keeps its activation" in row.reason for row in rows)


def test_dropout_acts_in_training_only() -> None:
    model = convert(network(), "bn")
    model[1].act = nn.Identity()
    y = model.train()[1](model[0](images()))
    assert 0.3 < float((y == 0).float().mean()) < 0.7
    assert not (model.eval()[1](model[0](images())) == 0).any()


@pytest.mark.exhaustive
def test_a_norm_with_activation_compiles_without_a_break() -> None:
    model, x = convert(randomize(network()).eval(), "brn"), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_another_class_of_that_name_is_refused() -> None:
    stranger = type("BatchNormAct2d", (BatchNormAct2d,), {"__module__": "somewhere"})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), stranger(4))
    with pytest.raises(ValueError, match=r"1: somewhere\.BatchNormAct2d"):
        convert(model, "bn")


def test_a_conversion_that_fails_leaves_no_hook() -> None:
    model = network().append(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="nothing was converted"):
        convert(model, "mabn")
    assert type(model[1]) is BatchNormAct2d
    assert not model[1]._forward_hooks
