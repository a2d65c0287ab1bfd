"""Example weighing on trained networks: against float64, to the bit at both ends, traceless."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
import reference
from anybatch.evaluation.example_weighing import example_weighing, set_example_weight
from conversion.networks import NETWORKS
from zoo.listing import randomize

QUICK = sorted(name for name, network in NETWORKS.items() if not network.slow)


def trained(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


def group_norm(groups: int = 2) -> nn.GroupNorm:
    norm = trained(nn.GroupNorm(groups, 6)).double()
    anybatch.recalibrate(norm, [torch.randn(30, 6, 5).double() * 2 + 0.5])
    return norm


def norms() -> dict[str, nn.Module]:
    return {
        "torch": trained(nn.BatchNorm1d(6)),
        "sync": trained(nn.SyncBatchNorm(6)),
        "bn": trained(anybatch.BatchNorm1d(6)),
        "ghost": trained(anybatch.GhostBatchNorm1d(6, ghost_size=2)),
        "mbn": trained(anybatch.MomentumBatchNorm1d(6)),
        "brn": trained(anybatch.BatchRenorm1d(6)),
        "bgn": trained(anybatch.BatchGroupNorm1d(6, num_groups=2)),
        "gn": group_norm(),
        "in": group_norm(6),
        "running gn": trained(anybatch.RunningGroupNorm(3, 6)),
    }


NAMES = list(norms())


def groups_of(norm: nn.Module) -> int:
    return getattr(norm, "num_groups", 6)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape).double() * 1.5 + 0.3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.0, 0.13, 0.5, 1.0])
def test_the_weighed_output_is_that_of_the_equations(name: str, alpha: float) -> None:
    norm = norms()[name].double().eval()
    x = images(4, 6, 5)
    with example_weighing(norm, alpha) as weighed:
        y = weighed(x)
    expected = reference.weighed(x, norm, groups_of(norm), alpha)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_in_place_gives_the_same_as_the_context(name: str) -> None:
    norm = norms()[name].eval()
    x = images(4, 6, 5).to(norm.weight.dtype)
    with example_weighing(norm, 0.3) as weighed:
        y = weighed(x)
    if name == "sync":
        with pytest.raises(ValueError, match="convert the model before"):
            set_example_weight(norm, 0.3)
        return
    weight = norm.weight
    new = set_example_weight(norm, 0.3)
    assert new.example_weight == 0.3
    assert new.weight is weight
    assert not new.training
    torch.testing.assert_close(new(x), y)


@pytest.mark.parametrize("name", QUICK)
def test_alpha_0_is_plain_inference_to_the_bit(name: str) -> None:
    network = NETWORKS[name]
    model, x = randomize(network.build()).eval(), network.inputs(2)
    plain = first(call(model, x))
    with example_weighing(model, 0.0):
        assert torch.equal(first(call(model, x)), plain)
    with example_weighing(model, 0.2):
        assert not torch.equal(first(call(model, x)), plain)
    assert torch.equal(first(call(model, x)), plain)


def call(model: nn.Module, x: object) -> object:
    return model(**x) if isinstance(x, dict) else model(x)


def first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", ["torch", "bn", "ghost"])
def test_alpha_1_is_instance_statistics(name: str) -> None:
    norm, x = norms()[name].eval(), torch.randn(4, 6, 9)
    with example_weighing(norm, 1.0):
        y = norm(x)
    torch.testing.assert_close(y, F.instance_norm(x, weight=norm.weight, bias=norm.bias))


def test_alpha_1_is_group_norm_to_the_bit() -> None:
    norm, x = group_norm().eval(), images(3, 6, 4, 4)
    plain = norm(x)
    with example_weighing(norm, 1.0):
        assert torch.equal(norm(x), plain)
    with example_weighing(norm, 0.9):
        assert not torch.equal(norm(x), plain)
    assert set_example_weight(norm, 1.0) is norm
    assert type(set_example_weight(norm, 0.9)) is anybatch.RunningGroupNorm


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_context_leaves_no_trace(name: str, fails: bool) -> None:
    norm = norms()[name]
    model = nn.Sequential(norm)
    before = {key: value for key, value in vars(norm).items() if not key.startswith("_")}
    state, training = copy.deepcopy(model.state_dict()), norm.training
    try:
        with example_weighing(model, 0.3):
            norm.eval()(torch.randn(4, 6, 5, dtype=norm.weight.dtype))
            norm.train(training)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = {key: value for key, value in vars(norm).items() if not key.startswith("_")}
    assert str(before) == str(after)
    assert model[0] is norm
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_training_in_the_context_is_as_ever() -> None:
    torch.manual_seed(0)
    norm, x = trained(nn.BatchNorm1d(6)), torch.randn(8, 6)
    other = copy.deepcopy(norm)
    with example_weighing(norm, 0.5):
        assert torch.equal(norm(x), other(x))
    assert torch.equal(norm.running_mean, other.running_mean)


def test_gradients_pass_through_weighed_layers() -> None:
    norm, x = trained(nn.BatchNorm1d(3)).double().eval(), images(2, 3, 4).requires_grad_()
    with example_weighing(norm, 0.3):
        assert torch.autograd.gradcheck(norm, x)


def test_where_picks_the_layers_that_weigh_examples() -> None:
    model = nn.Sequential(trained(nn.BatchNorm1d(6)), trained(nn.BatchNorm1d(6))).eval()
    x = torch.randn(4, 6, 5)
    half = model[0](x)
    with example_weighing(model, 0.5, where="1"):
        assert torch.equal(model[0](x), half)
        assert "forward" in vars(model[1])
    set_example_weight(model, 0.5, where=lambda name, _: name == "1")
    assert type(model[0]) is nn.BatchNorm1d
    assert model[1].example_weight == 0.5


class Activated(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("model", "alpha", "message"),
    [
        (nn.BatchNorm1d(3), 1.5, "alpha=1.5"),
        (nn.BatchNorm1d(3), -0.1, "alpha=-0.1"),
        (nn.Linear(3, 3), 0.5, "Linear has no batch norm"),
        (nn.BatchNorm1d(3, track_running_stats=False), 0.5, "no batch norm with running"),
        (nn.Sequential(nn.GroupNorm(1, 3)), 0.5, "collect them .* with anybatch.recalibrate"),
        (nn.Sequential(Activated(3)), 0.5, "0: .*Activated is a batch norm with its own forward"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_example_weighing_refuses_wrong_arguments(
    model: nn.Module, alpha: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message), example_weighing(model, alpha):
        pass
    with pytest.raises(ValueError, match=message):
        set_example_weight(model, alpha)


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="alpha='a'"), example_weighing(nn.BatchNorm1d(3), "a"):
        pass


# --- the layer ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 3, 2), (2, 6, 3, 2, 2)], ids=str)
def test_running_group_norm_trains_as_group_norm(shape: tuple[int, ...]) -> None:
    norm, plain = anybatch.RunningGroupNorm(2, 6).double(), trained(nn.GroupNorm(2, 6)).double()
    norm.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(shape).double().requires_grad_()
    dy = torch.randn(shape).double()
    y = norm(x)
    torch.testing.assert_close(y, plain(x))
    ours, theirs = (torch.autograd.grad(f(x), x, dy)[0] for f in (norm, plain))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(norm.eval()(x), plain(x))
    norm.example_weight = 0.5
    assert not torch.allclose(norm(x), plain(x))
    if len(shape) > 2:
        assert norm.num_batches_tracked == 2


def test_running_group_norm_refuses_other_shapes_and_conversion() -> None:
    norm = anybatch.RunningGroupNorm(2, 6)
    with pytest.raises(ValueError, match=r"takes \(N, C, ...\)"):
        norm(torch.randn(6))
    with pytest.raises(ValueError, match="num_groups=4 does not divide"):
        anybatch.RunningGroupNorm(4, 6)
    with pytest.raises(ValueError, match="each example has statistics of its own"):
        anybatch.to_batchnorm(nn.Sequential(norm))
    with pytest.raises(ValueError, match="made for inputs of any rank"):
        anybatch.to_batchnorm(anybatch.RunningGroupNorm(6, 6, example_weight=0.0))
