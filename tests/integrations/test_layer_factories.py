"""Layers for code that builds its own: ``norm_layer=``, MONAI's factory, timm's functions."""

import copy
import functools
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.integrations.timm import norm_act_layer
from anybatch.layers.weight_centralization import is_centralized
from anybatch.registry import METHODS

BUILT = [name for name, method in METHODS.items() if not method.binds]


class Residual(nn.Module):
    """Built as torchvision's ResNet is: it calls and keeps its ``norm_layer``."""

    def __init__(self, norm_layer: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self._norm_layer = norm_layer
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), norm_layer(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), norm_layer(4, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(x))).relu()


@pytest.mark.parametrize("name", BUILT)
def test_a_constructor_builds_what_convert_makes(name: str) -> None:
    layer = anybatch.norm_layer(name)
    built, converted = Residual(layer), anybatch.convert(Residual(), name)
    assert type(built.bn1) is type(converted.bn1)
    assert built.bn2.eps == 1e-3
    assert repr(built.bn1).replace("in=", "") == repr(converted.bn1).replace("in=", "")
    again = pickle.loads(pickle.dumps(built))
    assert type(copy.deepcopy(again).bn1) is type(built.bn1)
    if not METHODS[name].wraps:
        built(torch.randn(2, 3, 8, 8)).square().mean().backward()
        assert built.bn1.weight.grad is not None


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_constructor_takes_dims_and_options(dims: int) -> None:
    norm = anybatch.norm_layer("ghost", dims, ghost_size=4)(6)
    assert norm(torch.randn(8, 6, *[4] * dims)).shape[1] == norm.num_features == 6
    assert norm.ghost_size == 4
    assert type(anybatch.norm_layer("frozen", dims)(6)).__name__ == f"FrozenBatchNorm{dims}d"


@pytest.mark.parametrize("make", [anybatch.norm_layer, norm_act_layer])
def test_a_constructor_refuses_what_cannot_be_built_alone(make: Any) -> None:
    with pytest.raises(ValueError, match="follow the convolution"):
        make("cbn")
    with pytest.raises(ValueError, match="did you mean 'mabn'"):
        make("mabm")
    with pytest.raises(TypeError, match="widow"):
        make("mabn", widow=3)


def test_weights_before_layers_that_were_built_are_centralized_on_request() -> None:
    model = Residual(anybatch.norm_layer("mabn", window=4))
    before = model.bn1
    anybatch.convert(model, "mabn", window=4)
    assert not is_centralized(model.conv1)
    rows = anybatch.plan(model, "mabn", window=4, centralize=True).rows
    assert [row.decision for row in rows] == ["keep", "keep"]
    assert [row.centralizes for row in rows] == ["conv1", "conv2"]
    anybatch.convert(model, "mabn", window=4, centralize=True)
    assert is_centralized(model.conv1)
    assert is_centralized(model.conv2)
    assert model.bn1 is before
    other = anybatch.convert(Residual(), "mabn", window=4)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


# MONAI


def test_monai_builds_networks_of_methods() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    from monai.networks.layers import Norm

    from anybatch.integrations.monai import register

    names = register()
    assert register() == names
    assert "cbn" not in names
    for name in names:
        for dims in (1, 2, 3):
            norm = Norm[name, dims](num_features=8)
            assert isinstance(norm, METHODS[name].layer(dims))
    net = nets.BasicUNet(2, 1, 2, (4, 4, 4, 4, 4, 4), norm=("mabn", {"window": 8}))
    ours = [m for m in net.modules() if isinstance(m, anybatch.MovingAverageBatchNorm2d)]
    assert len(ours) == 18
    assert {m.window for m in ours} == {8}
    twin = nets.BasicUNet(2, 1, 2, (4, 4, 4, 4, 4, 4), norm="batch")
    x = torch.randn(2, 1, 32, 32)
    anybatch.convert(twin, "mabn", window=8).load_state_dict(
        anybatch.convert(net, "mabn", window=8, centralize=True).state_dict()
    )
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
    assert nets.SegResNet(norm=("ghost", {"ghost_size": 1}), init_filters=8) is not None
    assert nets.DynUNet(2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4] * 3, norm_name="gn")


# timm: its rules for `norm_layer`, and a stand-in of its layer


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        apply_act: bool = True,
        act_layer: type[nn.Module] = nn.ReLU,
        inplace: bool = True,
        drop_layer: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer(inplace=inplace) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def of_timm(norm_layer: Any, act_layer: Any) -> Any:
    """As timm.layers.get_norm_act_layer chooses."""
    assert isinstance(norm_layer, (type, str, types.FunctionType, functools.partial))
    arguments = {}
    if isinstance(norm_layer, functools.partial):
        arguments.update(norm_layer.keywords)
        norm_layer = norm_layer.func
    if isinstance(norm_layer, types.FunctionType):
        chosen = norm_layer
    else:
        assert norm_layer.__name__.lower().startswith("batchnorm"), "no equivalent"
        chosen = BatchNormAct2d
        arguments.setdefault("act_layer", act_layer)
    return functools.partial(chosen, **arguments) if arguments else chosen


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchNormAct2d, "__module__", "timm.layers.norm_act")
    layers = types.ModuleType("timm.layers")
    layers.BatchNormAct2d = BatchNormAct2d
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.layers", layers)


@pytest.mark.usefixtures("timm")
def test_timm_takes_a_function_where_it_would_choose_by_name() -> None:
    with pytest.raises(AssertionError, match="no equivalent"):
        of_timm(anybatch.MovingAverageBatchNorm2d, nn.SiLU)
    assert of_timm(anybatch.BatchNorm2d, nn.SiLU).func is BatchNormAct2d  # and no word
    with pytest.raises(AssertionError, match="no equivalent"):
        of_timm(anybatch.norm_layer("bn"), nn.SiLU)
    layer = of_timm(norm_act_layer("mabn", nn.SiLU, window=8), nn.SiLU)
    ours, theirs = layer(6, inplace=True), BatchNormAct2d(6, act_layer=nn.SiLU)
    assert isinstance(ours, anybatch.MovingAverageBatchNorm2d)
    assert (ours.window, type(ours.act)) == (8, nn.SiLU)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)
    assert type(layer(6, apply_act=False).act) is nn.Identity
    assert type(anybatch.to_batchnorm(nn.Sequential(ours))[0]) is BatchNormAct2d
