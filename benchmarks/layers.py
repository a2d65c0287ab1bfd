"""Time of a layer alone, forward and backward, relative to torch.nn.BatchNorm2d.

Every method beside torch's layers, a ghost batch norm as trainers ship it (a loop over chunks)
and a batch norm written in tensor operations; all in turn in one process, in another order each
round, so that other work on the machine and what the others leave in memory meet them alike;
medians of the times, and of the ratios by round.

    python benchmarks/layers.py [--shapes 2x64x56x56 ...] [--format contiguous channels_last]
        [--methods bn mabn ...] [--repeats 15] [--threads 2] [--cpu-time] [--csv layers.csv]
        [--memory]

On a machine that does other work, ``--cpu-time --threads 1`` is steadier: with threads, each waits
for the one that has to share its core.
"""

import argparse
import csv
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anybatch.methods import METHODS

SHAPES = ("2x64x56x56", "32x64x56x56", "4x256x100x152", "128x16x32x32")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
METHOD_NAMES = ("bn", "mbn", "mabn", "brn", "ghost", "bgn")
STEPS = 3  # of warm-up: kernels are compiled, memory is there


class LoopedGhostNorm(nn.Module):
    """Ghost batch norm as a loop over chunks."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.norm, self.size = nn.BatchNorm2d(channels), size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.split(self.size)])


class EagerNorm(nn.Module):
    """Batch norm in tensor operations, as papers' code usually is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.running = torch.zeros(2, 1, channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        self.running.lerp_(torch.stack([mean, var]).detach(), 0.1)
        return self.weight * ((x - mean) * torch.rsqrt(var + 1e-5)) + self.bias


class Row(NamedTuple):
    """One measurement; the ratio is to nn.BatchNorm2d, low and high are its quartiles."""

    shape: str
    format: str
    layer: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    saved_bytes: int


def layers(names: tuple[str, ...], batch: int, channels: int) -> dict[str, nn.Module]:
    """The layers to time; ghost batch norm has up to 16 groups."""
    size = max(batch // 16, 1)
    options = {
        "mbn": {"batch_size": batch, "ideal_batch_size": 4 * batch},
        "mabn": {"warmup_steps": 1, "renorm_warmup_steps": 1, "window": 2},
        "brn": {"warmup_steps": 1},
        "ghost": {"ghost_size": size},
        "bgn": {"num_groups": math.gcd(32, channels)},
    }
    found: dict[str, nn.Module] = {"nn.BatchNorm2d": nn.BatchNorm2d(channels)}
    for name in names:
        found[name] = METHODS[name].build(channels, 2, **options.get(name, {}))
        if name == "mbn":
            found[name].set_progress(2, 3)
    found["nn.GroupNorm"] = nn.GroupNorm(math.gcd(32, channels), channels)
    found["ghost, a loop"] = LoopedGhostNorm(channels, size)
    found["eager"] = EagerNorm(channels)
    return found


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Memory that a forward keeps for its backward, beside parameters and state."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward of a layer."""

    def call() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    return call


def measure(
    shape: str, form: str, names: tuple[str, ...], repeats: int, clock: Callable[[], float]
) -> list[Row]:
    """Time all layers on one shape."""
    sizes = tuple(int(size) for size in shape.split("x"))
    x = torch.randn(sizes).contiguous(memory_format=FORMATS[form]).requires_grad_()
    dy = torch.randn(sizes).contiguous(memory_format=FORMATS[form])
    timed = layers(names, sizes[0], sizes[1])
    saved = {name: saved_bytes(layer, x) for name, layer in timed.items()}
    calls = {name: step(layer, x, dy) for name, layer in timed.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    for repeat in range(-STEPS, repeats):
        shuffled.shuffle(order)  # what one frees is what the next gets
        for name in order:
            start = clock()
            calls[name]()
            if repeat >= 0:
                times[name].append(clock() - start)
    base, rows = times["nn.BatchNorm2d"], []
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, base, strict=True))
        quarter = len(ratios) // 4
        low, middle, high = ratios[quarter], statistics.median(ratios), ratios[-1 - quarter]
        milliseconds = round(1e3 * statistics.median(own), 3)
        spread = (round(value, 3) for value in (middle, low, high))
        rows.append(Row(shape, form, name, milliseconds, *spread, saved[name]))
    return rows


def compile_seconds() -> float:
    """Time of the first step, with compilation where the cache is cold."""
    layer = METHODS["bn"].build(4, 2)
    start = time.perf_counter()
    step(layer, torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3))()
    return time.perf_counter() - start


def show(rows: list[Row]) -> None:
    """Print ratios, a row a layer, and their geometric mean."""
    columns = list(dict.fromkeys((row.shape, row.format) for row in rows))
    print(f"{'':>16}" + "".join(f"{shape:>16}" for shape, _ in columns))
    print(f"{'':>16}" + "".join(f"{form:>16}" for _, form in columns) + f"{'mean':>8}{'worst':>8}")
    for layer in dict.fromkeys(row.layer for row in rows):
        own = [row for row in rows if row.layer == layer]
        mean = math.exp(statistics.fmean(math.log(row.ratio) for row in own))
        cells = "".join(f"{f'{row.milliseconds:.2f} ms {row.ratio:.2f}':>16}" for row in own)
        print(f"{layer:>16}{cells}{mean:8.2f}{max(row.ratio for row in own):8.2f}")


def show_memory(rows: list[Row]) -> None:
    """Print what is kept for backward, relative to nn.BatchNorm2d."""
    base = {(r.shape, r.format): r.saved_bytes for r in rows if r.layer == "nn.BatchNorm2d"}
    print("\nkept for backward, of nn.BatchNorm2d's")
    for layer in dict.fromkeys(row.layer for row in rows):
        shares = [r.saved_bytes / base[r.shape, r.format] for r in rows if r.layer == layer]
        print(f"{layer:>16}{max(shares):16.4f}")


def main() -> None:
    """Measure, print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--format", nargs="+", default=tuple(FORMATS), choices=FORMATS)
    parser.add_argument("--methods", nargs="+", default=METHOD_NAMES, choices=METHODS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.repeats} rounds")
    print(f"first step of a process: {compile_seconds():.1f} s")
    rows, clock = [], time.process_time if given.cpu_time else time.perf_counter
    for form in given.format:
        for shape in given.shapes:
            rows += measure(shape, form, tuple(given.methods), given.repeats, clock)
    show(rows)
    if given.memory:
        show_memory(rows)
    if given.csv is not None:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Row._fields, *rows])


if __name__ == "__main__":
    main()
