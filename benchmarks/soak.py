"""Memory and live objects over a long training, for docs/internals/reliability.md.

python benchmarks/soak.py --minutes 60 --csv soak.csv

Batches of 1 to 3 examples of ever other shapes, every method in turn: convert, train (plain,
accumulated, checkpointed, masked, in bfloat16), save, load, copy, recalibrate, convert again or
back. Ends with 1 if memory or the number of tensors grows.
"""

import argparse
import copy
import csv
import gc
import io
import os
import random
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.core.norm_layer import NormLayer

WARM_UP = 0.25  # of the time: caches fill
OPTIONS = {
    "mabn": {"window": 4, "warmup_steps": 2, "renorm_warmup_steps": 4},
    "brn": {"warmup_steps": 2},
    "mbn": {"batch_size": 2},
    "cbn": {"window": 4, "burn_in": 0.0},
    "ghost": {"ghost_size": 2},
    "bgn": {"num_groups": 4},
    **{name: {"ratio": 1 / 4} for name in ("ns", "bs", "fs", "points", "fs+vdn", "bs+vdn")},
}
GONE = ("bgn", "gn", "ln", "in")  # what becomes of a batch norm here is none again
UNPOOLED = ("l1", "range", *GONE[1:])  # what accumulate refuses


class Sample(NamedTuple):
    """What there is at one moment."""

    seconds: float
    rounds: int
    steps: int
    mebibytes: float
    tensors: int
    objects: int


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def batch(chance: random.Random) -> Tensor:
    x = torch.randn(chance.randint(1, 3), 3, chance.randint(4, 12), chance.randint(4, 12))
    last = chance.random() < 0.5
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, chance: random.Random) -> None:
    way = chance.choice(("plain", "bfloat16", "checkpointed", "masked", "in inference"))
    x = batch(chance)
    if way == "in inference":
        with torch.inference_mode():
            model(x)
        return
    ours = any(isinstance(module, NormLayer) for module in model.modules())
    valid = torch.rand(len(x), *x.shape[2:]) < chance.uniform(0.5, 1)  # few values: wild steps
    padded = anybatch.masked(model, valid) if way == "masked" and ours else nullcontext()
    with padded, torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
        y = checkpoint(model, x, use_reentrant=False) if way == "checkpointed" else model(x)
    y.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def one_round(base: nn.Module, method: str, chance: random.Random) -> tuple[nn.Module, int]:
    """A method's turn; the network to go on with, and the steps it trained."""
    model = copy.deepcopy(base) if method in GONE else base
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    own = dict(OPTIONS.get(method, {}))
    wraps = anybatch.METHODS[method].wraps
    if method not in GONE[1:] and not wraps and method != "sync" and chance.random() < 0.3:
        own["norm_batch_size"] = 2
    model = anybatch.convert(model, method, **own)
    net = anybatch.VirtualDataset(model, [0.0] * 3, [1.0] * 3) if wraps else model
    progress, steps = anybatch.NormScheduler(net, 3), 0
    joined = None
    if method not in UNPOOLED and "norm_batch_size" not in own and chance.random() < 0.3:
        joined = anybatch.accumulate(net, 2, optimizer=optimizer)
    net.train()
    for _ in range(3):
        for _ in range(4):
            step(net, optimizer, chance)
            steps += 1
        progress.step()
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    twin = copy.deepcopy(net)
    twin.load_state_dict(torch.load(file, weights_only=True)["model"])
    twin.eval()(batch(chance))
    if joined is not None:
        joined.remove()
    if method not in GONE[1:]:
        anybatch.recalibrate(model, [batch(chance) for _ in range(3)], progress=False)
    if method in GONE:
        return base, steps
    if chance.random() < 0.5:
        model = anybatch.convert(model, "bn")
        step(model.train(), optimizer, chance)
    return anybatch.to_batchnorm(model), steps


def measure(start: float, rounds: int, steps: int) -> Sample:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    objects = gc.get_objects()
    tensors = sum(issubclass(type(one), Tensor) for one in objects)
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(time.monotonic() - start, rounds, steps, memory, tensors, len(objects))


def soak(minutes: float, every: float, seed: int) -> list[Sample]:
    """Train for so long; a sample every so many seconds."""
    chance, names = random.Random(seed), list(anybatch.METHODS)
    torch.manual_seed(seed)
    for number in range(1024):  # numbers that are kept, as many as ever will be
        anybatch.backends.scalar(1.0 + number / 1e6)
    base = network()
    fresh = copy.deepcopy(base.state_dict())
    start, found, rounds, steps, due = time.monotonic(), [], 0, 0, every
    while time.monotonic() - start < 60 * minutes:
        base, more = one_round(base, names[rounds % len(names)], chance)
        base.load_state_dict(fresh)  # it shall not learn, nor go astray
        rounds, steps = rounds + 1, steps + more
        if time.monotonic() - start >= due:
            found.append(measure(start, rounds, steps))
            due = found[-1].seconds + every
    return found


def slope(samples: list[Sample], name: str) -> float:
    """Growth per second after the warm-up, by least squares."""
    end = samples[-1].seconds
    kept = [one for one in samples if one.seconds >= WARM_UP * end]
    times = [one.seconds for one in kept]
    values = [float(getattr(one, name)) for one in kept]
    middle = sum(times) / len(times)
    spread = sum((t - middle) ** 2 for t in times)
    return sum((t - middle) * v for t, v in zip(times, values, strict=True)) / max(spread, 1e-9)


def growth(samples: list[Sample], name: str) -> float:
    """What the fitted line gains from the end of the warm-up to the last sample."""
    return slope(samples, name) * (1 - WARM_UP) * samples[-1].seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the samples to this file")
    parser.add_argument("--mebibytes", type=float, default=16.0, help="growth that passes")
    parser.add_argument("--tensors", type=float, default=20.0, help="growth that passes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    samples = soak(given.minutes, given.every, given.seed)
    if len(samples) < 8:
        parser.error(f"{len(samples)} samples are too few: give more --minutes or less --every")
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows([Sample._fields, *samples])
    first = next(one for one in samples if one.seconds >= WARM_UP * samples[-1].seconds)
    last = samples[-1]
    title = f"{last.seconds / 60:.1f} minutes, {last.rounds} conversions, {last.steps} steps"
    table = Table(title=title)
    for column in ("", "after warm-up", "at the end", "an hour", "fitted growth", "may be"):
        table.add_column(column, justify="right")
    failed = False
    limits = {"mebibytes": given.mebibytes, "tensors": given.tensors, "objects": None}
    for name, most in limits.items():
        gained = growth(samples, name)
        failed = failed or (most is not None and gained > most)
        table.add_row(
            name,
            f"{getattr(first, name):.1f}",
            f"{getattr(last, name):.1f}",
            f"{3600 * slope(samples, name):+.1f}",
            f"{gained:+.2f}",
            "" if most is None else f"{most:g}",
        )
    Console(width=100).print(table)
    print("memory grows" if failed else "memory is flat")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
