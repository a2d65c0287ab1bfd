"""Memory traffic: what each pass must move, what its code moves, and how fast beside a copy.

Of a layer alone, forward and backward apart, on each shape and in both memory formats. A unit is
one read or one write of the activation. A forward must move 2 (it reads x and writes y), a
backward 3 (it reads x and dy and writes dx); a copy moves 2, and is timed on the same tensors in
the same rounds. ``share`` is the bandwidth at which what must move was moved, relative to the
copy's: 1 is a pass that takes as long as copying as many bytes. ``issued`` are the loads and
stores in the code of a pass; where a layer reads data twice while they are in a cache, memory
sees fewer.

    python benchmarks/roofline.py [--shapes 2x64x56x56 ...] [--layers bn mabn ...] [--rounds 31]
        [--precision float32] [--device cpu] [--threads 2] [--csv roofline.csv]
"""

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from harness import DTYPES, FORMATS, SHAPES, arguments, reason, start
from torch import Tensor, nn

from anybatch.core.files import write_text
from anybatch.tools.measurements import Measurement, as_csv
from anybatch.tools.timing import quartiles
from layers import data, makers

NAMES = ("bn", "mbn", "mabn", "brn", "ghost", "bgn", "bs", "fs", "nn.GroupNorm")
MUST = {"forward": 2.0, "backward": 3.0}  # units
SAMPLED = ("ns", "bs", "fs", "points")
RATIO = 1 / 32  # of the samples
WARM_UP = 4
_AHEAD = 4_000_000  # cycles, about 2 ms, in which the host launches what is to be timed

Row = tuple[Any, ...]
COLUMNS = (*Measurement._fields, "must_mb", "issued_mb", "gb_per_s", "copy_gb_per_s")


class Parts(NamedTuple):
    """Seconds of the two passes of a call."""

    forward: float
    backward: float


def issued(name: str, passing: str) -> float:
    """Units of loads and stores in the code of a pass.

    Statistics and output each read x; the sums of a backward and its gradient each read x and dy.
    torch's statistics on a CPU read x twice, for mean and then variance, where channels come
    first; this counts the second reading, which finds a channel in the cache, as none. A sample
    is read on its own, and nothing outside it waits for the sums of a backward.
    """
    if name in SAMPLED:
        return MUST[passing] + (RATIO if passing == "forward" else 2 * RATIO)
    return {"forward": 3.0, "backward": 5.0}[passing]


class Watch:
    """Times forward and backward of a layer apart."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.x, self.dy = layer, x, dy
        self.cuda = x.device.type == "cuda"

    def __call__(self) -> Parts:
        self.x.grad = None
        self.layer.zero_grad()
        if self.cuda:
            return self._on_device()
        start = time.perf_counter()
        y = self.layer(self.x)
        middle = time.perf_counter()
        y.backward(self.dy)
        return Parts(middle - start, time.perf_counter() - middle)

    def _on_device(self) -> Parts:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda._sleep(_AHEAD)
        marks[0].record()
        y = self.layer(self.x)
        marks[1].record()
        y.backward(self.dy)
        marks[2].record()
        marks[2].synchronize()
        return Parts(*(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)))


def copy_seconds(x: Tensor, y: Tensor) -> float:
    """Time of a copy of a tensor into another."""
    if x.device.type != "cuda":
        start = time.perf_counter()
        y.copy_(x)
        return time.perf_counter() - start
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD)
    first.record()
    y.copy_(x)
    second.record()
    second.synchronize()
    return first.elapsed_time(second) / 1e3


def measure(
    shape: str, form: str, precision: str, names: Sequence[str], rounds: int, device: torch.device
) -> tuple[list[Row], dict[str, str]]:
    """Time layers and a copy on one shape; the rows, and why of those that could not be."""
    x, dy = data(shape, form, precision, device)
    plain, target = x.detach(), torch.empty_like(x)
    made = makers(names, x.shape[0], x.shape[1], device, x.dtype)
    watches: dict[str, Watch] = {}
    failed: dict[str, str] = {}
    for name, make in made.items():
        try:
            watch = Watch(make().to(device).train(), x, dy)
            for _ in range(WARM_UP):
                watch()
            watches[name] = watch
        except Exception as error:  # one that cannot run here must not stop the others
            failed[f"{name} on {shape}, {form}"] = reason(error)
    calls: dict[str, Callable[[], Any]] = {**watches, "copy": lambda: copy_seconds(plain, target)}
    taken: dict[str, list[Any]] = {name: [] for name in calls}
    order, chance = list(calls), random.Random(0)
    copy_seconds(plain, target)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            taken[name].append(calls[name]())
    return rows_of(taken, (shape, form, precision), x.numel() * x.element_size()), failed


def rows_of(taken: dict[str, list[Any]], setting: tuple[str, str, str], unit: int) -> list[Row]:
    """Rows of one shape: bandwidths in the place of the ratios to a baseline."""
    copies = taken.pop("copy")
    copied = 2 * unit / statistics.median(copies) / 1e9
    shape, form, precision = setting
    rows: list[Row] = []
    for name, parts in taken.items():
        for passing, must in MUST.items():
            seconds = [getattr(part, passing) for part in parts]
            # Seconds that copying as many bytes took in the same round.
            shares = [must / 2 * c / s for c, s in zip(copies, seconds, strict=True)]
            low, middle, high = (round(1e3 * value, 4) for value in quartiles(seconds))
            share_low, share, share_high = (round(value, 3) for value in quartiles(shares))
            measured = Measurement(
                *(passing, shape, form, precision, "eager", name),
                *(middle, low, high, "ms", share, share_low, share_high, len(parts)),
            )
            speed = must * unit / statistics.median(seconds) / 1e9
            more = (must * unit / 1e6, issued(name, passing) * unit / 1e6, speed, copied)
            rows.append((*measured, *(float(f"{value:.4g}") for value in more)))
    return rows


def show(rows: list[Row]) -> None:
    """Print the shares."""
    last = None
    for row in rows:
        named = dict(zip(COLUMNS, row, strict=True))
        setting = (named["case"], named["format"], named["precision"])
        if setting != last:
            unit = named["must_mb"] / MUST[named["question"]]
            speed = f"copy {named['copy_gb_per_s']:.1f} GB/s"
            print(f"\n{', '.join(setting)}: unit {unit:.1f} MB, {speed}")
            last = setting
        print(
            f"{named['name']:>16} {named['question']:>9} {named['value']:9.3f} ms "
            f"{named['gb_per_s']:8.1f} GB/s  share {named['ratio']:.2f} "
            f"({named['ratio_low']:.2f}-{named['ratio_high']:.2f})"
        )


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "", rounds=31)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--format", nargs="+", default=tuple(FORMATS), choices=FORMATS)
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--layers", nargs="+", default=NAMES)
    given = parser.parse_args(typed)
    budget, rows = start(given), []
    for precision in given.precision:
        for form in given.format:
            for shape in given.shapes:
                if budget.over(f"{shape}, {form}, {precision}"):
                    continue
                device = torch.device(given.device)
                more, why = measure(shape, form, precision, given.layers, given.rounds, device)
                rows += more
                for name, text in why.items():
                    print(f"{name} could not be measured: {text}")
    show(rows)
    if given.csv is not None:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.csv, as_csv(rows, COLUMNS, given.device))
    return int(not rows or not all(math.isfinite(row[6]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
