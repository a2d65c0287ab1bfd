"""What a norm may take of a small training step, and where the step's floor is for one in Python.

Whole steps of a small network at a small batch, where calls cost more than data. Beside torch's
layers and ours: the network without norms; with a copy in each place, the least that an operator of
torch does; with an autograd function in Python that copies, and gives scale and shift gradients of
zeros: the least that any layer written in Python does. Methods are asked as `convert` writes them,
and with ``fuse=True``. All in turn in one process, in another order each round; medians of the
times, and of the ratios by round to torch's.

    python benchmarks/small_steps.py [--networks resnet8 resnet20] [--batch-size 2]
        [--methods bn mbn ...] [--rounds 31] [--threads 2] [--csv small_steps.csv]
"""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import arguments, finish, start, training_step
from torch import Tensor, nn

from anybatch import convert
from anybatch.registry import METHODS
from anybatch.tools.measurements import Measurement, Setting, timed
from anybatch.tools.networks import build
from anybatch.tools.timing import interleaved

BASELINE = "nn.BatchNorm2d"


class Copy(nn.Module):
    """An operator of torch that does nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dy.clone(), dy.new_zeros(dy.shape[1]), dy.new_zeros(dy.shape[1])


class Empty(nn.Module):
    """An autograd function in Python that does nothing else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Empty.apply(x, self.weight, self.bias)
        return y


def with_norms(network: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """A copy of a network with other layers in the places of its norms."""
    network = copy.deepcopy(network)
    for name, norm in list(network.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            network.set_submodule(name, make(norm.num_features))
    return network


def step_rows(name: str, batch: int, methods: list[str], rounds: int) -> list[Measurement]:
    """Time the steps of one network."""
    x, target = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    plain = build(name, 10, (3, 32, 32))
    networks = {
        BASELINE: plain,
        "no norm": with_norms(plain, lambda channels: nn.Identity()),
        "a copy": with_norms(plain, lambda channels: Copy()),
        "an empty function": with_norms(plain, Empty),
    }
    for method in methods:
        for fuse in (False, True):
            converted = convert(copy.deepcopy(plain), method, batch_size=batch, fuse=fuse)
            networks[f"{method}, fused" if fuse else method] = converted

    calls = {name: training_step(network, x, target) for name, network in networks.items()}
    times = interleaved(calls, rounds, block_seconds=0.05)
    return timed(Setting("step", f"{name}, batch {batch}"), times, BASELINE)


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "", rounds=31)
    parser.add_argument("--networks", nargs="+", default=["resnet8", "resnet20"])
    parser.add_argument("--batch-size", type=int, default=2)
    usual = ["bn", "mbn", "mabn", "brn", "ghost"]
    parser.add_argument("--methods", nargs="+", default=usual, choices=METHODS)
    given = parser.parse_args(typed)
    budget, rows = start(given), []
    torch.manual_seed(0)
    for name in given.networks:
        if not budget.over(name):
            rows += step_rows(name, given.batch_size, given.methods, given.rounds)
    return finish(rows, {}, given)


if __name__ == "__main__":
    sys.exit(main())
