"""A pendulum that learns to swing up: batch renormalization in the critics, as in CrossQ.

Soft actor critic on gymnasium's Pendulum without target networks (Bhatt et al., CrossQ, 2024): one
joint forward of both kinds of pairs, batch renormalization in the critics. Beside the layer of
anybatch it takes those of torchrl and sb3-contrib, with the same constants and a short warm-up, so
that the run goes on long past twice its length.

    pip install . gymnasium
    python examples/pendulum.py --seeds 5
    python examples/pendulum.py --seeds 5 --norms torchrl sb3-contrib  # with these installed
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch

try:
    import gymnasium
except ImportError:
    raise SystemExit("The pendulum is in gymnasium: pip install gymnasium") from None

STATE, ACTION, TORQUE = 3, 1, 2.0
BATCH, DISCOUNT, RANDOM_STEPS = 128, 0.99, 400
Norm = Callable[[int], nn.Module]
FILES = {
    "torchrl": "torchrl/modules/models/batchrenorm.py",
    "sb3-contrib": "sb3_contrib/common/torch_layers.py",
}


def norm_of(name: str, warmup_steps: int) -> Norm:
    """A constructor for a norm of the critics, with CrossQ's constants."""
    if name == "anybatch":
        return lambda width: anybatch.BatchRenorm1d.crossq(width, warmup_steps=warmup_steps)
    if name == "batch norm":
        return lambda width: nn.BatchNorm1d(width, eps=1e-3, momentum=0.01)
    if name == "none":
        return lambda width: nn.Identity()
    layer = loaded(FILES[name]).BatchRenorm1d
    return lambda width: layer(width, eps=1e-3, momentum=0.01, warmup_steps=warmup_steps)


def loaded(file: str) -> Any:
    """One file of an installed package, without the package's own imports."""
    spec = importlib.util.find_spec(file.partition("/")[0])
    if spec is None or spec.origin is None:
        raise SystemExit(f"{file.partition('/')[0]} is not installed")
    found = importlib.util.spec_from_file_location("peer", Path(spec.origin).parents[1] / file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class Critic(nn.Module):
    """The value of an action in a state, with a norm before each layer."""

    def __init__(self, norm: Norm, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            norm(STATE + ACTION), nn.Linear(STATE + ACTION, width), nn.ReLU(),
            norm(width), nn.Linear(width, width), nn.ReLU(),
            norm(width), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        values: Tensor = self.layers(torch.cat([state, action], 1))
        return values.squeeze(1)


class Policy(nn.Module):
    """A Gaussian, squashed to actions from -1 to 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(STATE, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 2 * ACTION),
        )  # fmt: skip

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """An action, and the logarithm of its density."""
        mean, spread = self.layers(state).chunk(2, 1)
        spread = spread.clamp(-5, 2)
        point = mean + spread.exp() * torch.randn_like(mean)
        density = -0.5 * ((point - mean) / spread.exp()).square() - spread - 0.919
        squash = 2 * (0.693 - point - F.softplus(-2 * point))  # log(1 - tanh(point)^2)
        return point.tanh(), (density - squash).sum(1)


class Agent:
    """Two critics, a policy and the temperature, each with its optimizer."""

    def __init__(self, norm: Norm, width: int = 64) -> None:
        self.critics = nn.ModuleList([Critic(norm, width), Critic(norm, width)])
        self.policy = Policy(width)
        self.temperature = nn.Parameter(torch.tensor(-1.6))  # logarithm
        adam = {"lr": 1e-3, "betas": (0.5, 0.999)}
        self.critic_steps = torch.optim.Adam(self.critics.parameters(), **adam, fused=True)
        self.policy_steps = torch.optim.Adam(self.policy.parameters(), **adam, fused=True)
        self.temperature_steps = torch.optim.Adam([self.temperature], **adam)

    def learn(self, batch: Sequence[Tensor], policy_too: bool) -> None:
        """One step of the critics and, in every third, of the policy."""
        state, action, reward, following = batch
        with torch.no_grad():
            next_action, density = self.policy(following)
        pairs = [
            anybatch.joint_forward(critic, (state, action), (following, next_action))
            for critic in self.critics
        ]
        least = torch.minimum(*(later.detach() for _, later in pairs))
        heat = self.temperature.detach().exp()
        goal = reward + DISCOUNT * (least - heat * density)
        loss = sum(F.mse_loss(now, goal) for now, _ in pairs)
        stepped(self.critic_steps, loss)
        if policy_too:
            self.critics.eval()  # the policy's own pairs move no statistics
            chosen, density = self.policy(state)
            value = torch.minimum(*(critic(state, chosen) for critic in self.critics))
            stepped(self.policy_steps, (heat * density - value).mean())
            self.critics.train()
            stepped(self.temperature_steps, -self.temperature * (density.detach() - ACTION).mean())


def stepped(optimizer: torch.optim.Optimizer, loss: Any) -> None:
    """One step of an optimizer."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def episode(
    environment: Any, act: Callable[[Tensor], Tensor], seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """State, action, reward and following state of each of 200 steps."""
    state = torch.from_numpy(environment.reset(seed=seed)[0])
    ended = False
    while not ended:
        action = act(state[None])[0]
        given, reward, _, ended, _ = environment.step(TORQUE * action.numpy())
        following = torch.from_numpy(given)
        yield state, action, torch.tensor(float(reward) / 10), following
        state = following


@torch.no_grad()
def score(environment: Any, agent: Agent, episodes: int = 10) -> float:
    """Mean return of the policy's mean action."""
    act = lambda state: agent.policy.layers(state)[:, :ACTION].tanh()  # noqa: E731
    rewards = [
        10 * float(reward)
        for number in range(episodes)
        for _, _, reward, _ in episode(environment, act, 10_000 + number)
    ]
    return sum(rewards) / episodes


def train(norm: Norm, seed: int, steps: int) -> list[float]:
    """Train an agent for so many steps of the environment; its score after each quarter of them."""
    torch.manual_seed(seed)
    environment, judge = gymnasium.make("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    agent = Agent(norm)
    memory = [torch.zeros(steps, *shape) for shape in ((STATE,), (ACTION,), (), (STATE,))]
    done = 0
    scores: list[float] = []

    def act(state: Tensor) -> Tensor:
        if done < RANDOM_STEPS:
            return torch.rand(1, ACTION) * 2 - 1
        with torch.no_grad():
            return agent.policy(state)[0]

    while done < steps:
        for row in episode(environment, act, 1000 * seed + done):
            for column, value in zip(memory, row, strict=True):
                column[done] = value
            done += 1
            if done > RANDOM_STEPS:
                chosen = torch.randint(done, (BATCH,))
                agent.learn([column[chosen] for column in memory], policy_too=done % 3 == 0)
            if done % (steps // 4) == 0:
                scores.append(score(judge, agent, 5))
            if done == steps:
                break
    return scores


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Train agents with each norm, seed by seed, and print their returns."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = ["anybatch", "batch norm", "none", *FILES]
    parser.add_argument(
        "--norms", nargs="+", choices=names, default=["anybatch", "batch norm"], help="rows"
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row")
    parser.add_argument("--steps", type=int, default=5000, help="training steps")
    parser.add_argument("--warmup-steps", type=int, default=1000, help="of the norms")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.steps, given.warmup_steps) < 1:
        parser.error("--seeds, --steps and --warmup-steps: give whole numbers from 1 on")
    if given.steps <= RANDOM_STEPS:
        parser.error(f"--steps: give more than {RANDOM_STEPS}, as learning begins after these")
    found: dict[str, list[list[float]]] = {}
    for name in given.norms:
        norm = norm_of(name, given.warmup_steps)
        found[name] = []
        for seed in range(given.seeds):
            found[name].append(train(norm, seed, given.steps))
            print(
                f"{name:12} seed {seed}",
                *(f"{value:6.0f}" for value in found[name][-1]),
                flush=True,
            )
        columns = zip(*found[name], strict=True)
        print(f"{name:12} all   ", *(described(values) for values in columns), flush=True)
    return found


def described(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):6.0f} ± {stdev(values) if len(values) > 1 else 0:3.0f}"


if __name__ == "__main__":
    main()
