"""Policies of Stable-Baselines3 convert in place, with targets, optimizers and saved files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch

gymnasium = pytest.importorskip("gymnasium")
sb3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Features(BaseFeaturesExtractor):
    """A linear layer and a batch norm, or a norm of another method."""

    def __init__(self, space: Any, norm: Any = nn.BatchNorm1d) -> None:
        super().__init__(space, features_dim=8)
        self.body = nn.Sequential(nn.Linear(space.shape[0], 8), norm(8), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.body(observations)


def agent(**options: Any) -> Any:
    settings = {"features_extractor_class": Features, "net_arch": [8], **options}
    return sb3.SAC(
        "MlpPolicy", "Pendulum-v1", policy_kwargs=settings, learning_starts=20, batch_size=16,
        buffer_size=200, seed=0, device="cpu",
    )  # fmt: skip


def test_a_policy_converts_with_its_targets_and_optimizers() -> None:
    model = agent()
    anybatch.convert(model.policy, "brn", warmup_steps=10)
    norm = model.critic.features_extractor.body[1]
    target = model.critic_target.features_extractor.body[1]
    assert type(norm) is type(target) is anybatch.BatchRenorm1d
    assert any(p is norm.weight for g in model.critic.optimizer.param_groups for p in g["params"])
    assert norm.running_mean.data_ptr() in {t.data_ptr() for t in model.batch_norm_stats}
    weight = norm.weight.detach().clone()
    model.learn(40)
    assert not torch.equal(norm.weight, weight)
    assert norm.method_state["step"] == norm.num_batches_tracked > 10
    assert target.running_var.isfinite().all()
    assert torch.equal(target.running_mean, norm.running_mean)  # SB3 copies them


def test_a_converted_policy_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = agent()
    anybatch.convert(model.policy, "brn")
    model.learn(30)
    observation = model.observation_space.sample()
    before, _ = model.predict(observation, deterministic=True)
    anybatch.to_batchnorm(model.policy)
    model.save(tmp_path / "agent")
    after, _ = sb3.SAC.load(tmp_path / "agent", device="cpu").predict(
        observation, deterministic=True
    )
    assert after == pytest.approx(before, abs=1e-5)


def test_a_policy_that_is_built_with_a_method_is_saved_and_goes_on(tmp_path: Path) -> None:
    norm = anybatch.norm_layer("brn", 1, warmup_steps=10)
    model = agent(features_extractor_kwargs={"norm": norm})
    model.learn(30)
    model.save(tmp_path / "agent")
    again = sb3.SAC.load(tmp_path / "agent", env=model.get_env(), device="cpu")
    layers = [m.critic.features_extractor.body[1] for m in (model, again)]
    assert layers[0].method_state["step"] == layers[1].method_state["step"] > 0
    again.learn(25, reset_num_timesteps=False)
