"""`fold`: norms merged into the layers before them, the output the same, or all as it was."""

import copy
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch import NoEffectWarning
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.weight_centralization import is_centralized
from anybatch.registry import METHODS
from conversion.networks import PreActivation, Tabular, convnet
from zoo.listing import randomize

FOLDING = [name for name, method in METHODS.items() if method.folds]
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pair(layer: nn.Module, dims: int, channels: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(layer, NORMS[dims](channels), nn.ReLU())).double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_convolution_takes_its_norm_in(
    dims: int, groups: int, transposed: bool, bias: bool
) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    model = pair(kind(4, 6, 3, stride=2, groups=groups, bias=bias), dims)
    x = torch.randn(2, 4, *(7,) * dims, dtype=torch.float64)
    before = model(x)
    anybatch.fold(model)
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_takes_its_norm_in(bias: bool) -> None:
    model, x = pair(nn.Linear(5, 6, bias), 1), torch.randn(3, 5, dtype=torch.float64)
    before = model(x)
    torch.testing.assert_close(anybatch.fold(model)(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", FOLDING)
def test_every_method_that_folds_does(method: str) -> None:
    model, x = randomize(convnet()), torch.randn(2, 3, 12, 12)
    anybatch.convert(model, method, centralize=True).eval()
    before, weight = model(x).detach(), model[0].weight
    anybatch.fold(model, x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert model[0].weight is weight
    assert not any(isinstance(m, NormLayer) or is_centralized(m) for m in model)


def test_a_norm_without_scale_and_shift_folds() -> None:
    norm = randomize(nn.BatchNorm2d(4, affine=False))
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval(), torch.randn(1, 3, 5, 5)
    before = model(x)
    torch.testing.assert_close(anybatch.fold(model)(x), before, rtol=1e-5, atol=1e-5)


# What stays


def test_norms_that_no_layer_feeds_alone_stay_and_are_named() -> None:
    model, x = randomize(PreActivation()).eval(), torch.randn(2, 3, 8, 8)
    before = model(x)
    with pytest.warns(NoEffectWarning, match=r"left 2 of 4 norms:\n  norms.0: .*\n  norms.2: fed"):
        anybatch.fold(model, x)
    assert [type(m).__name__ for m in model.norms] == ["BatchNorm2d", "Identity"] * 2
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1), value=2.0))


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("layer", "norm", "reason"),
    [
        (Padded(4, 4, 3), nn.BatchNorm2d(4), "in its own way"),
        (hooked(), nn.BatchNorm2d(4), "hooks on it or on '0'"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
            nn.BatchNorm2d(4),
            "'0': its weight is parametrized: call torch.*remove_parametrizations",
        ),
        (nn.Linear(4, 4), nn.BatchNorm2d(4), "its channels are not those of '0'"),
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), "track_running_stats"),
        (nn.Conv2d(4, 4, 3), anybatch.BatchNorm2d(4, example_weight=0.2), "example_weight=0.2"),
        (nn.Conv2d(4, 4, 3), anybatch.BatchGroupNorm2d(4, num_groups=2), "example_weight=0.5"),
        (nn.ReLU(), nn.BatchNorm2d(4), "pre-activation: fed by relu"),
    ],
)
def test_pairs_that_cannot_be_merged_stay(layer: nn.Module, norm: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer, norm).eval()
    with pytest.warns(NoEffectWarning, match=f"1: .*{reason}"):
        anybatch.fold(model)
    assert model[1] is norm


def test_a_weight_of_two_layers_stays() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    model[2].weight = model[0].weight
    with pytest.warns(NoEffectWarning, match="1: '0' shares its weight with '2'"):
        anybatch.fold(model)


def test_a_network_without_batch_norm_is_a_warning() -> None:
    with pytest.warns(NoEffectWarning, match="the model has no batch norm"):
        anybatch.fold(nn.Sequential(nn.Linear(2, 2)).eval())


@pytest.mark.parametrize("whole", [True, False])
def test_training_mode_is_refused_with_the_remedy(whole: bool) -> None:
    model = convnet().eval()
    (model if whole else model[4]).train()
    what = "the model" if whole else "its layer '4'"
    with pytest.raises(ValueError, match=rf"{what} is in training mode.*call model.eval\(\) first"):
        anybatch.fold(model)


class Domains(nn.Module):
    """A convolution that feeds a norm of each domain; an attribute or argument says which."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3))
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(8), "b": nn.BatchNorm2d(8)})
        self.domain = "a"

    def forward(self, x: Tensor, domain: str | None = None) -> Tensor:
        y: Tensor = self.norms[domain or self.domain](self.body(x))
        return y


@pytest.mark.parametrize("traced", [True, False])
def test_a_layer_that_may_feed_a_norm_on_another_path_is_not_folded(traced: bool) -> None:
    model, x = randomize(Domains()).eval(), torch.randn(2, 3, 8, 8)
    before = {name: model(x, name) for name in model.norms}
    with pytest.warns(NoEffectWarning, match=r"'body.2' may feed 'norms.b' too, on a path that"):
        anybatch.fold(model, None if traced else {"x": x, "domain": "a"})
    assert type(model.body[1]) is nn.Identity
    for name, y in before.items():
        torch.testing.assert_close(model(x, name), y, rtol=1e-4, atol=1e-5)


class Auxiliary(nn.Module):
    """A head that is not called, and has a convolution of its own before its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()
        self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def test_a_head_that_is_not_called_keeps_nothing_else_from_folding() -> None:
    model = randomize(Auxiliary()).eval()
    with pytest.warns(NoEffectWarning, match="left 1 of 3 norms:\n  head.1: not called"):
        anybatch.fold(model)


@pytest.mark.skipif("bias" not in signature(nn.BatchNorm2d).parameters, reason="of torch 2.13 on")
def test_a_norm_with_a_scale_and_no_shift_folds() -> None:
    norm = randomize(nn.BatchNorm2d(4, bias=False))
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval(), torch.randn(1, 3, 5, 5)
    before = model(x)
    torch.testing.assert_close(anybatch.fold(model)(x), before, rtol=1e-5, atol=1e-5)


# Checked on example inputs


class Rows(nn.Module):
    """A linear layer whose output is (N, L, C), before a batch norm over L = C."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


@pytest.mark.parametrize("centralized", [True, False])
def test_a_fold_that_changes_the_output_is_undone_to_the_last_bit(centralized: bool) -> None:
    model = randomize(Rows()).eval()
    if centralized:
        anybatch.weight_centralization(model.linear)
    norm, bias, state = model.norm, model.linear.bias, copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="folding changed the output on example_inputs"):
        anybatch.fold(model, torch.randn(2, 4, 3))
    assert model.norm is norm
    assert model.linear.bias is bias
    assert is_centralized(model.linear) == centralized
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_example_inputs_that_do_not_fit_change_nothing() -> None:
    model: Any = Tabular().eval()
    with pytest.raises(ValueError, match="example_inputs: the model's forward failed"):
        anybatch.fold(model, torch.randn(2, 5))
    assert type(model.body[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("method", [None, "bn", "mbn"])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_a_norm_that_misses_a_statistic_is_not_folded(missing: str, method: str | None) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if method is not None:
        anybatch.convert(net, method)
    setattr(net[1], missing, None)
    kept, weight = net[1], net[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="1"):
        folded = anybatch.fold(net.eval())
    assert folded[1] is kept
    assert torch.equal(folded[0].weight, weight)


class OfTraining(nn.Module):
    """A norm that only training calls, on what evaluation returns as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 6)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.head(h) if self.training else h


class OfEachMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv1d(12, 6, 1), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.unsqueeze(2))
        return self.one(h) if self.training else self.two(h)


@pytest.mark.filterwarnings("ignore::anybatch.NoEffectWarning")
@pytest.mark.parametrize("method", [None, "bn", "mabn"])
@pytest.mark.parametrize("kind", [OfTraining, OfEachMode])
def test_what_another_mode_uses_otherwise_is_not_merged(
    kind: type[nn.Module], method: str | None
) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(8, 12)
    if method is not None:
        anybatch.convert(model, method)
    for _ in range(5):
        model(x * 2 + 1)
    before = model.eval()(x)
    torch.testing.assert_close(anybatch.fold(model)(x), before)
