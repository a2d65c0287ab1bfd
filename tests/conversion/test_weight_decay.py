"""Weight decay of scales and shifts: which norms, which groups, towards which target."""

import copy
import gc
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch import GammaDecay, MomentumBatchNorm2d, convert, decay_plan, freeze, param_groups
from anybatch.core.notices import NoEffectWarning
from conversion.networks import NETWORKS, Inception, convnet, vgg

# --- where decay acts: by hand ---------------------------------------------------

RESNET = [  # three norms a bottleneck block; the second stage begins with a norm in the shortcut
    "resnet.encoder.stages.1.layers.0.layer.2.normalization",
    "resnet.encoder.stages.1.layers.0.shortcut.normalization",
    "resnet.encoder.stages.1.layers.1.layer.2.normalization",
]
BY_HAND = {
    # Every branch of the last block goes straight to the head; those before pass the last block.
    "inception": ["blocks.1.one.norm", "blocks.1.three.1.norm", "blocks.1.pool.1.norm"],
    # The last norm of each block, and the stem's: all shortcuts are free of norms.
    "residual": ["stem.norm", "blocks.0.2", "blocks.1.2", "blocks.2.2"],
    "vgg": ["8"],
    # Pre-activation: the second norm of each branch is added to the way out.
    "pre-activation": ["norms.1", "norms.3"],
    "transformers resnet": RESNET,
    "transformers regnet": [
        "encoder.stages.1.layers.0.layer.3.normalization",
        "encoder.stages.1.layers.0.shortcut.normalization",
    ],
    "monai resnet 3d": ["layer4.0.bn2", "layer4.0.downsample.1"],
    # Every concatenation passes the first norm of a later layer, and norm5 at last.
    "monai densenet121": ["features.norm5"],
    "monai unet": ["model.2.0.adn.N"],
    # Linear bottlenecks: the last convolution and its norm come after all shortcuts.
    "transformers mobilenet v2": ["mobilenet_v2.conv_1x1.normalization"],
    "transformers efficientnet": ["encoder.top_bn"],
}
SLOW = {name for name in BY_HAND if NETWORKS[name].slow}
networks = pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in BY_HAND]
)


@networks
def test_decay_acts_where_a_path_is_free(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    made = decay_plan(model, network.inputs(2))
    assert sorted(made.decayed) == sorted(BY_HAND[name])
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [row.name for row in made.rows] == norms


class Hidden(nn.Module):
    """A network in a wrapper that cannot be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(torch.isfinite(x).all()) else x


@pytest.mark.parametrize("name", ["inception", "residual", "vgg", "pre-activation", "convnet"])
def test_a_recorded_forward_finds_what_a_trace_finds(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    traced = decay_plan(model)
    before = copy.deepcopy(model.state_dict())
    recorded = decay_plan(Hidden(model), network.inputs(2))
    assert recorded.decayed == [f"inner.{decayed}" for decayed in traced.decayed]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("recorded", [False, True])
def test_a_norm_that_is_given_constants_undoes_nothing(recorded: bool) -> None:
    model = convert(vgg(), "bn")
    freeze(model, where="8")
    seen = decay_plan(Hidden(model), torch.randn(2, 3, 8, 8)) if recorded else decay_plan(model)
    assert [name.rpartition(".")[2] for name in seen.decayed] == ["4", "8"]


class Writes(nn.Module):
    """Writes one norm's output into a part of a tensor, which then goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.written = nn.LayerNorm(4)
        self.shape_only = nn.LayerNorm(4)
        self.under = nn.GroupNorm(2, 4)
        self.unused = nn.LayerNorm(4)
        self.dead = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros((x.shape[0], 8))
        out[:, :4].copy_(self.written(x))
        rows = self.shape_only(x).shape[0]
        self.dead(x)
        late = nn.functional.layer_norm(self.under(x), (4,))
        return out + torch.cat([late, late], 1) * rows


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 4)], ids=["traced", "recorded"])
def test_all_kinds_of_norms_and_ways(inputs: Tensor | None) -> None:
    model = Writes() if inputs is None else Hidden(Writes())
    rows = {row.name.removeprefix("inner."): row for row in decay_plan(model, inputs).rows}
    assert {name for name, row in rows.items() if row.decision == "decay"} == {"written"}
    assert "layer_norm()" in rows["under"].reason
    assert rows["unused"].reason == "not called"
    assert "output does not depend on it" in rows["shape_only"].reason
    assert "output does not depend on it" in rows["dead"].reason


class RMSNorm(nn.Module):
    """A norm of someone's own, as many language models have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_norms_inside_torch_modules_and_of_other_makes_are_found() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    made = decay_plan(nn.Sequential(layer, RMSNorm(8)), torch.randn(2, 3, 8))
    assert [row.name for row in made.rows] == ["0.norm1", "0.norm2", "1"]
    assert made.decayed == ["1"]


def test_the_plan_is_data_and_a_table() -> None:
    made = decay_plan(convnet())
    data = json.loads(json.dumps(made.to_dict()))
    assert [row["decision"] for row in data["rows"]] == ["keep", "decay"]
    lines = str(made).splitlines()
    assert lines[0].split() == ["norm", "kind", "decision", "why"]
    assert "undone: every path meets 4" in lines[2]
    assert lines[-1] == "1 of 2 norms decayed."


def test_a_norm_alone_and_a_network_without_norms() -> None:
    assert decay_plan(nn.Linear(2, 2)).rows == ()
    assert decay_plan(nn.BatchNorm1d(3)).decayed == [""]
    assert [g["name"] for g in param_groups(nn.Linear(2, 2), 0.1)] == ["weights"]


# --- groups ----------------------------------------------------------------------


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    """The decay of each parameter, and that each is there once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], g["weight_decay"]) for g in groups for p in g["params"]]
    assert len(found) == len(names) == len(dict(found))
    return dict(found)


@networks
def test_every_parameter_is_in_one_group(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    groups = param_groups(model, 0.1, example_inputs=network.inputs(2))
    decays = by_name(model, groups)
    norms = {row.name for row in decay_plan(model, network.inputs(2)).rows}
    for parameter, decay in decays.items():
        owner = parameter.rpartition(".")[0]
        assert decay == (0.0 if owner in norms and owner not in BY_HAND[name] else 0.1)
    torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize(("asked", "given"), [(True, 0.1), (False, 0.0), (0.02, 0.02), (0, 0.0)])
def test_norm_decay_true_decays_all_norms(asked: float, given: float) -> None:
    model = vgg()
    decays = by_name(model, param_groups(model, 0.1, asked))
    norms = {f"{k}.{kind}" for k in (1, 4, 8) for kind in ("weight", "bias")}
    assert decays == {name: given if name in norms else 0.1 for name in decays}


@pytest.mark.parametrize(("asked", "given"), [(True, 0.1), (False, 0.0), (0.02, 0.02)])
def test_biases_decay_where_asked_for(asked: float, given: float) -> None:
    model = convnet()
    decays = by_name(model, param_groups(model, 0.1, bias_decay=asked))
    assert decays["3.bias"] == decays["8.bias"] == given
    assert decays["4.bias"] == decays["3.weight"] == 0.1


def test_shared_and_frozen_parameters_are_grouped_once() -> None:
    model = vgg()
    model[1].weight = model[8].weight = nn.Parameter(torch.ones(8))  # a tie of two norms
    model[8].bias = nn.Parameter(torch.zeros(8))
    model[12].requires_grad_(False)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    tied[1].weight = tied[0].weight
    assert by_name(model, param_groups(model, 0.1))["1.weight"] == 0.1
    assert by_name(tied, param_groups(tied, 0.1))["0.weight"] == 0.1
    assert by_name(model, param_groups(model, 0.1))["12.weight"] == 0.1


def test_layers_of_this_library_and_the_optimizer_of_a_converted_network() -> None:
    model = convert(Inception(), "mbn")
    assert isinstance(model.stem.norm, MomentumBatchNorm2d)
    assert sorted(decay_plan(model).decayed) == sorted(BY_HAND["inception"])
    groups = param_groups(model, 0.1)
    assert [group["name"] for group in groups] == ["weights", "norms", "without decay"]
    optimizer = torch.optim.SGD(groups, 0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[1]["name"] == "norms"


def test_a_wrapped_network_is_looked_into() -> None:
    model = nn.DataParallel(vgg())
    assert decay_plan(model).decayed == ["module.8"]
    assert by_name(model, param_groups(model, 0.1))["module.8.weight"] == 0.1


# --- towards 1 -------------------------------------------------------------------

Maker = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
COUPLED: dict[str, Maker] = {
    "sgd": lambda g: torch.optim.SGD(g, 0.1),
    "momentum": lambda g: torch.optim.SGD(g, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda g: torch.optim.Adam(g, 0.1),
    "rmsprop": lambda g: torch.optim.RMSprop(g, 0.1),
}
DECOUPLED: dict[str, Maker] = {
    "adamw": lambda g: torch.optim.AdamW(g, 0.1),
    "nadamw": lambda g: torch.optim.NAdam(g, 0.1, decoupled_weight_decay=True),
}


def trained(make: Maker, groups: list[dict[str, Any]], model: nn.Module, before_step) -> Tensor:
    optimizer = make(groups)
    for step in range(5):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().mul(0.01).backward()
        before_step(optimizer)
        optimizer.step()
    return model[8].weight.detach()


def parts(model: nn.Module) -> list[dict[str, Any]]:
    """The groups that a hand-written update uses."""
    gamma = model[8].weight
    rest = [p for p in model.parameters() if p is not gamma]
    return [{"params": rest, "weight_decay": 0.0}, {"params": [gamma], "weight_decay": 0.0}]


@pytest.mark.parametrize(
    "make", [*COUPLED.values(), *DECOUPLED.values()], ids=[*COUPLED, *DECOUPLED]
)
@torch.no_grad()
def test_decay_towards_one_is_the_update_written_by_hand(make: Maker) -> None:
    coupled = make in COUPLED.values()
    torch.manual_seed(0)
    model = vgg()
    model[8].weight.fill_(1.5)
    other = copy.deepcopy(model)
    groups = param_groups(model, 0.3, gamma_target=1.0)
    gammas = next(group for group in groups if group["name"] == "gammas")
    assert gammas["params"] == [model[8].weight]
    for group in groups:
        group["weight_decay"] = 0.0  # of the rest: the target alone is looked at

    def by_hand(optimizer: torch.optim.Optimizer) -> None:
        gamma = other[8].weight.data
        if coupled:
            other[8].weight.grad += 0.3 * (gamma - 1)
        else:
            gamma -= 0.1 * 0.3 * (gamma - 1)

    with torch.enable_grad():
        expected = trained(make, parts(other), other, by_hand)
        hooked = trained(lambda g: attached(make(g)), groups, model, lambda optimizer: None)
    assert torch.allclose(hooked, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(expected, torch.ones(12), atol=1e-3)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSprop", "Adagrad", "AdamW", "NAdam"])
def test_decay_towards_zero_is_the_optimizer_s_own(kind: str, maximize: bool) -> None:
    weights = []
    for group in ({"weight_decay": 0.2}, {"gamma_decay": 0.2, "gamma_target": 0.0}):
        weight = nn.Parameter(torch.tensor([3.0, -1.0]))
        groups = [{"params": [weight], "weight_decay": 0.0, **group}]
        optimizer = getattr(torch.optim, kind)(groups, lr=0.1, maximize=maximize)
        if "gamma_target" in group:
            GammaDecay(optimizer)
        for step in range(3):
            gradient = torch.tensor([0.1, -0.3 * step])
            weight.grad = gradient.clone()
            optimizer.step()
            assert torch.equal(weight.grad, gradient)  # as torch leaves it
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


def test_an_optimizer_decays_once() -> None:
    _, optimizer = one_gamma()
    decay = GammaDecay(optimizer)
    with pytest.raises(ValueError, match="has a GammaDecay already"):
        GammaDecay(optimizer)
    decay.remove()
    other = GammaDecay(optimizer)
    decay.remove()  # again, which is nothing to the other
    with pytest.raises(ValueError, match="has a GammaDecay already"):
        GammaDecay(optimizer)
    assert pickle.loads(pickle.dumps(other)).decoupled is False
    del optimizer
    gc.collect()
    other.remove()


def test_a_step_that_fails_leaves_no_gradient_for_the_next() -> None:
    model, optimizer = one_gamma()
    GammaDecay(optimizer)

    def fail(*_: object) -> None:
        raise OSError("no power")

    model.weight.grad = torch.ones(1)
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(OSError, match="no power"):
        optimizer.step()
    handle.remove()
    optimizer.zero_grad()
    optimizer.step()
    assert model.weight.grad is None


def attached(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    GammaDecay(optimizer)
    return optimizer


def one_gamma(value: float = 2.0, **optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.BatchNorm1d(1)
    nn.init.constant_(model.weight, value)
    group = {"gamma_decay": 0.5, "gamma_target": 1.0, "weight_decay": 0.0}
    return model, torch.optim.SGD([{"params": [model.weight], **group}], 0.1, **optimizer)


def test_without_a_gradient_nothing_is_decayed_and_a_removed_hook_does_nothing() -> None:
    model, optimizer = one_gamma()
    decay = GammaDecay(optimizer)
    optimizer.step()
    assert model.weight.item() == 2.0
    model.weight.grad = torch.zeros(1)
    optimizer.step()
    assert model.weight.item() == pytest.approx(2 - 0.1 * 0.5)
    decay.remove()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert model.weight.item() == pytest.approx(1.95)


@pytest.mark.parametrize("named", [False, True])
def test_closures_make_gradients_within_the_step(named: bool) -> None:
    model, optimizer = one_gamma()
    GammaDecay(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0 * model.weight.sum()
        loss.backward()
        return loss

    assert (optimizer.step(closure=closure) if named else optimizer.step(closure)) == 0.0
    assert model.weight.item() == pytest.approx(2 - 0.1 * 0.5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_a_gradient_scaler_changes_nothing(fused: bool, bad: bool) -> None:
    model, optimizer = one_gamma(fused=fused)
    GammaDecay(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model.weight.sum() * (float("inf") if bad else 0.25)).backward()
    scaler.step(optimizer)
    scaler.update()
    expected = 2.0 if bad else 2 - 0.1 * (0.25 + 0.5)
    assert model.weight.item() == pytest.approx(expected)


def test_weight_decay_of_the_optimizer_goes_towards_zero_only() -> None:
    """Why there is a hook at all."""
    gamma = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([gamma], 0.1, weight_decay=0.5)
    gamma.grad = torch.zeros(1)
    optimizer.step()
    assert gamma.item() < 1


# --- arguments -------------------------------------------------------------------


class Lion(torch.optim.SGD):
    """An optimizer of someone else's."""


LAZY = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: param_groups(vgg(), -1.0), ValueError, "weight_decay=-1.0: give a number from 0"),
        (lambda: param_groups(vgg(), "x"), TypeError, "weight_decay='x'"),
        (lambda: param_groups(vgg(), 0.1, "all"), ValueError, "norm_decay='all': give 'auto'"),
        (lambda: param_groups(vgg(), 0.1, -0.1), ValueError, "norm_decay=-0.1"),
        (lambda: param_groups(vgg(), 0.1, gamma_target=2.0), ValueError, "gamma_target=2.0"),
        (lambda: param_groups(3, 0.1), TypeError, "model=3: give a torch.nn.Module"),
        (lambda: param_groups(Hidden(vgg()), 0.1), ValueError, "cannot be traced symbolically"),
        (lambda: param_groups(LAZY, 0.1), ValueError, "run one batch through it before"),
        (lambda: decay_plan(Hidden(vgg()), torch.zeros(3)), ValueError, "forward failed on them"),
        (lambda: decay_plan("x"), TypeError, "model='x'"),
        (lambda: GammaDecay(vgg()), TypeError, "give a torch.optim.Optimizer"),
        (
            lambda: GammaDecay(torch.optim.SGD(vgg().parameters(), 0.1)),
            ValueError,
            "none of its groups has a gamma_target",
        ),
        (
            lambda: GammaDecay(Lion(param_groups(vgg(), 0.1, gamma_target=1.0), 0.1)),
            ValueError,
            "decoupled=None: it is not known how Lion decays",
        ),
        (
            lambda: GammaDecay(torch.optim.Rprop(plain_groups(), 0.1)),
            ValueError,
            "Rprop has no weight decay",
        ),
    ],
)
def test_errors_of_param_groups_name_the_argument_and_the_remedy(call, error, words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)


def plain_groups() -> list[dict[str, Any]]:
    return param_groups(vgg(), 0.1, gamma_target=1.0)


def test_an_optimizer_of_someone_else_needs_a_word() -> None:
    optimizer = Lion(param_groups(vgg(), 0.1, gamma_target=1.0), 0.1)
    assert GammaDecay(optimizer, decoupled=True).decoupled


@pytest.mark.parametrize("given", [{"norm_decay": False}, {"weight_decay": 0.0}])
def test_a_target_of_scales_without_decay_is_told(given: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.warns(NoEffectWarning, match="gamma_target=1.0: no scale of a norm has a weight"):
        param_groups(net, **{"weight_decay": 0.1, "gamma_target": 1.0, **given})
