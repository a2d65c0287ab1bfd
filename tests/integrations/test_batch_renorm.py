"""Batch renormalization in reinforcement learning: checkpoints of others, critics, targets."""

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import anybatch
from anybatch.integrations.batch_renorm import from_sb3_contrib, from_torchrl
from other_libraries.cases import load


def batches(count: int, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, width, generator=generator) * 1.5 + 0.3 * k for k in range(count)]


def critic(norm: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 1))


def of(package: str) -> Any:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return load(Path(spec.origin).parents[1], package)


@pytest.mark.parametrize("steps", [3, 7])
def test_a_checkpoint_of_torchrl_goes_on(steps: int) -> None:
    constants = {"momentum": 0.1, "warmup_steps": 5, "max_r": 1.2, "max_d": 0.3}
    theirs = critic(lambda width: of("torchrl").BatchRenorm1d(width, **constants))
    for x in batches(steps):
        theirs(x)
    ours = critic(lambda width: anybatch.BatchRenorm1d(width, **constants))
    ours.load_state_dict(from_torchrl(theirs.state_dict()))
    for x in batches(9 - steps):  # before twice the warm-up, where torchrl's factor is 0 or 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    x = batches(1)[0]
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 7])
def test_a_checkpoint_of_sb3_contrib_goes_on(steps: int) -> None:
    theirs = critic(lambda width: of("sb3_contrib").BatchRenorm1d(width, warmup_steps=5))
    for x in batches(steps):
        theirs(x)
    ours = critic(lambda width: anybatch.BatchRenorm1d.crossq(width, warmup_steps=5))
    ours.load_state_dict(from_sb3_contrib(theirs.state_dict()))
    x = batches(1)[0]
    torch.testing.assert_close(
        copy.deepcopy(ours).eval()(x), copy.deepcopy(theirs).eval()(x), rtol=1e-4, atol=1e-5
    )
    for x in batches(4):
        assert (theirs[1].steps > 5) == (ours[1].method_state["step"] >= 5)
        ours(x)
        theirs(x)
    torch.testing.assert_close(ours[1].running_var, theirs[1].ra_var, rtol=1e-5, atol=1e-6)


def test_checkpoints_of_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="ra_mean"):
        from_sb3_contrib(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="num_batches_tracked"):
        from_torchrl(nn.Linear(2, 2).state_dict())
    assert set(from_sb3_contrib({"ra_mean": torch.zeros(2), "steps": torch.tensor(0)})) == {
        "running_mean", "num_batches_tracked", "step"
    }  # fmt: skip


def test_the_preset_has_the_constants_of_crossq() -> None:
    norm = anybatch.BatchRenorm1d.crossq(8, momentum=0.1)
    assert type(norm) is anybatch.BatchRenorm1d
    assert (norm.eps, norm.momentum, norm.warmup_steps) == (1e-3, 0.1, 100_000)
    assert (norm.max_r, norm.max_d) == (3.0, 5.0)


@pytest.mark.parametrize("warmup", [1, 4])
def test_smooth_limits_begin_at_batch_norm_and_are_open_after_the_warm_up(warmup: int) -> None:
    narrow = {"max_r": 1.02, "max_d": 0.01, "momentum": 0.3}
    smooth = anybatch.BatchRenorm1d(4, warmup_steps=warmup, smooth=True, **narrow)
    open_ = anybatch.BatchRenorm1d(4, warmup_steps=0, **narrow)
    plain = nn.BatchNorm1d(4)
    differs = []
    for x in batches(warmup + 2):
        y, full = smooth(x), open_(x)
        differs.append(not torch.allclose(y, full, rtol=1e-5, atol=1e-6))
        if len(differs) == 1:
            torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)
    assert differs == [True] * warmup + [False, False]


# Joint forwards and target networks


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = anybatch.BatchRenorm1d(5, warmup_steps=2), nn.Linear(5, 1)

    def forward(self, state: Tensor, action: Tensor) -> dict[str, Any]:
        hidden = self.norm(torch.cat([state, action], 1))
        return {"value": self.head(hidden), "both": (hidden, [hidden.sum(1)]), "note": "kept"}


def test_a_joint_forward_is_one_of_the_batches_together() -> None:
    model = Critic()
    twin = copy.deepcopy(model)
    now = torch.randn(6, 3), torch.randn(6, 2)
    later = torch.randn(4, 3), torch.randn(4, 2)
    first, second = anybatch.joint_forward(model, now, later)
    whole = twin(torch.cat([now[0], later[0]]), torch.cat([now[1], later[1]]))
    for part, rows in ((first, slice(0, 6)), (second, slice(6, 10))):
        torch.testing.assert_close(part["value"], whole["value"][rows], rtol=0, atol=0)
        torch.testing.assert_close(part["both"][1][0], whole["both"][1][0][rows], rtol=0, atol=0)
        assert part["note"] == "kept"
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="batches of"):
        anybatch.joint_forward(model, now, later[0])
    with pytest.raises(ValueError, match="one batch or more"):
        anybatch.joint_forward(model)


class Values(NamedTuple):
    now: Tensor
    extra: list[Tensor]


@dataclass
class Named(ModelOutput):
    logits: Tensor | None = None


@pytest.mark.parametrize(
    ("output", "given", "error", "words"),
    [
        (lambda x: x.mean(), torch.ones(4, 3), ValueError, r"shape \(\): .* 8 examples"),
        (lambda x: x[None].expand(8, -1, -1).mean(2), torch.ones(3, 3), ValueError, "6 examples"),
        (lambda x: x, [torch.ones(4, 3)], TypeError, "a list of 1 entry"),
        (lambda x: x, {"x": torch.ones(4, 3)}, TypeError, "a dict of 1 entry"),
    ],
)
def test_a_joint_forward_names_what_it_does_not_split(output, given, error, words) -> None:
    class Critic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return output(x)

    with pytest.raises(error, match=words):
        anybatch.joint_forward(Critic(), given, given)


@pytest.mark.parametrize("kind", [Values, Named])
def test_a_joint_output_keeps_its_class(kind: type) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Values(x, [x * 2]) if kind is Values else Named(logits=x)

    x = torch.randn(5, 3)
    first, second = anybatch.joint_forward(Net(), x[:3], x[3:])
    assert type(first) is type(second) is kind
    for part, rows in ((first, x[:3]), (second, x[3:])):
        assert torch.equal(part.now if kind is Values else part.logits, rows)
        assert torch.equal(part[1][0] / 2 if kind is Values else part["logits"], rows)


@pytest.mark.parametrize("method", ["bn", "brn", "mabn"])
def test_a_target_network_takes_over_the_middle_of_an_optimizer_step(method: str) -> None:
    model = anybatch.convert(critic(nn.BatchNorm1d), method)
    anybatch.accumulate(model, 3)
    target = copy.deepcopy(model)
    for x in batches(2):
        model(x)
    anybatch.update_target(target, model, 0.5)
    found, new = target.state_dict(), model.state_dict()
    within = [name for name in new if name.startswith("1.step.")]
    assert len(within) > 4
    for name in within:
        torch.testing.assert_close(found[name], new[name], rtol=0, atol=0)


PARTS = {"norm_batch_size": 4, "memories": 2}


def test_what_has_two_names_is_averaged_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.norm = self.same = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.same(self.second(self.norm(self.first(x))))

    source = anybatch.convert(Tied(), "brn")
    target = copy.deepcopy(source)
    source(torch.randn(8, 4))
    with torch.no_grad():
        source.first.weight.fill_(1.0)
        target.first.weight.fill_(0.0)
        source.norm.running_mean.fill_(1.0)
    anybatch.update_target(target, source, 0.25)
    assert torch.all(target.first.weight == 0.25)
    assert torch.all(target.norm.running_mean == 0.25)
    assert torch.equal(target.norm.method_state["step"], source.norm.method_state["step"])


@pytest.mark.parametrize("options", [{}, PARTS], ids=str)
@pytest.mark.parametrize("method", ["bn", "brn", "mabn", "mbn", "cbn"])
def test_a_target_network_follows_parameters_and_running_statistics(
    method: str, options: dict[str, int]
) -> None:
    model = anybatch.convert(critic(nn.BatchNorm1d), method, **options)
    target = copy.deepcopy(model)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for x in batches(3):
        model(x)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    anybatch.update_target(target, model, 0.25)
    found, new = target.state_dict(), model.state_dict()
    for name in ("0.weight", "1.running_var"):
        torch.testing.assert_close(found[name], 0.75 * before[name] + 0.25 * new[name])
    for name in [name for name in new if name.startswith("1.") and "running" not in name]:
        torch.testing.assert_close(found[name], new[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="state_dict differs"):
        anybatch.update_target(target, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight=2"):
        anybatch.update_target(target, model, 2)
