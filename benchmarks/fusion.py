"""What it saves that a norm does the ReLU that follows it, or the addition and the ReLU.

A layer alone, forward and backward, with a ReLU in place behind it and with an addition before
that: torch.nn.BatchNorm2d, a method's layer with the same operators behind it, and the layer that
does all of it. Whole training steps of ResNet-20 on 32x32 pictures: with torch's layers, converted,
and converted with ``fuse=True``. All in turn in one process, in another order each round; medians
of the times, and of the ratios by round to torch's.

    python benchmarks/fusion.py [--only layers steps] [--methods bn ...] [--shapes 32x64x56x56 ...]
        [--format contiguous channels_last] [--batches 2 32] [--repeats 15] [--threads 2]
        [--csv fusion.csv]
"""

import argparse
import copy
import csv
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch import convert
from anybatch.experiments.models import build
from anybatch.methods import METHODS

SHAPES = ("32x64x56x56", "128x16x32x32", "2x64x56x56")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FOLLOWING = ("relu", "add and relu")
WARM_UP = 3


class Row(NamedTuple):
    """One measurement; the ratio is to torch's layers, low and high are its quartiles."""

    what: str
    format: str
    follows: str
    way: str
    milliseconds: float
    ratio: float
    low: float
    high: float


def timed(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn, in another order each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    for repeat in range(-WARM_UP, repeats):
        shuffled.shuffle(order)  # what one frees is what the next gets
        for name in order:
            start = time.perf_counter()
            calls[name]()
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def rows(what: str, form: str, follows: str, times: dict[str, list[float]]) -> list[Row]:
    """Medians and quartiles; the first is what the others are compared with."""
    base, found = next(iter(times.values())), []
    for way, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, base, strict=True))
        quarter = len(ratios) // 4
        spread = (statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])
        milliseconds = round(1e3 * statistics.median(own), 3)
        found.append(Row(what, form, follows, way, milliseconds, *(round(v, 3) for v in spread)))
    return found


def behind(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """A layer with operators behind it, as residual networks write them."""
    y = layer(x)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


def inside(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """A layer that does the same by itself."""
    y: Tensor = layer(x, residual=residual, activation="relu")
    return y


def layer_rows(shape: str, form: str, methods: list[str], repeats: int) -> list[Row]:
    """Time layers on one shape, with all that may follow them."""
    sizes = tuple(int(size) for size in shape.split("x"))
    x, r, dy = (torch.randn(sizes).contiguous(memory_format=FORMATS[form]) for _ in "xrd")
    x.requires_grad_(), r.requires_grad_()
    found = []
    for follows in FOLLOWING:
        residual = r if follows == "add and relu" else None

        def step(
            way: Callable[..., Tensor], layer: nn.Module, residual: Tensor | None = residual
        ) -> Callable[[], None]:
            def call() -> None:
                x.grad = r.grad = None
                layer.zero_grad()
                way(layer, x, residual).backward(dy)

            return call

        calls = {"nn.BatchNorm2d": step(behind, nn.BatchNorm2d(sizes[1]))}
        for method in methods:
            calls[f"{method}, apart"] = step(behind, METHODS[method].build(sizes[1], 2))
            calls[f"{method}, fused"] = step(inside, METHODS[method].build(sizes[1], 2))
        found += rows(shape, form, follows, timed(calls, repeats))
    return found


def step_rows(batch: int, form: str, methods: list[str], repeats: int) -> list[Row]:
    """Time training steps of ResNet-20."""
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=FORMATS[form])
    target = torch.randint(10, (batch,))
    plain = build("resnet20", 10, (3, 32, 32)).to(memory_format=FORMATS[form])  # type: ignore[call-overload]
    networks = {"nn.BatchNorm2d": plain}
    for method in methods:
        networks[f"{method}, apart"] = convert(copy.deepcopy(plain), method, batch_size=batch)
        fused = convert(copy.deepcopy(plain), method, batch_size=batch, fuse=True)
        networks[f"{method}, fused"] = fused

    def step(network: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)

        def call() -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x), target).backward()
            optimizer.step()

        return call

    calls = {name: step(network) for name, network in networks.items()}
    return rows(f"resnet20, batch {batch}", form, "", timed(calls, repeats))


def main() -> None:
    """Measure, print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=("layers", "steps"))
    parser.add_argument("--methods", nargs="+", default=["bn"], choices=METHODS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--format", nargs="+", default=tuple(FORMATS), choices=FORMATS)
    parser.add_argument("--batches", nargs="+", type=int, default=(2, 32))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.repeats} rounds")
    found: list[Row] = []
    for form in given.format:
        if "layers" in given.only:
            for shape in given.shapes:
                found += layer_rows(shape, form, given.methods, given.repeats)
        if "steps" in given.only:
            for batch in given.batches:
                found += step_rows(batch, form, given.methods, given.repeats)
    for row in found:
        print(
            f"{row.what:20} {row.format:14} {row.follows:13} {row.way:16}"
            f"{row.milliseconds:10.3f} ms {row.ratio:6.2f} ({row.low:.2f} to {row.high:.2f})"
        )
    if given.csv is not None:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Row._fields, *found])


if __name__ == "__main__":
    main()
