"""Timing of calls in turn in one process: training steps, layers, anything that can be called."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.core.arguments import check_count
from anybatch.tools.data import Dataset
from anybatch.tools.objective import objective
from anybatch.tools.run import BASELINE, Run
from anybatch.tools.training import prepare, step

Call = Callable[[], None]
Clock = Callable[[], float]
WARM_UP = 3  # calls: what is compiled at the first one is there, and so is memory


@dataclass(frozen=True)
class StepTime:
    """Time of a step: of a training step, or of whatever else was called.

    Attributes:
        seconds: Median.
        ratio: Median of the ratios to the baseline, round by round.
        low: Lower quartile of the ratios.
        high: Upper quartile.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def time_steps(
    runs: Mapping[str, Run], data: Dataset, rounds: int = 21, block_seconds: float = 0.05
) -> dict[str, StepTime]:
    """Time a training step of each run, interleaved in one process.

    The first of the rounds is not counted.

    Returns:
        The time of each run; ratios are to torch's batch norm with the whole batch, which is in
        the answer by the method's name.
    """
    plain = {"method": BASELINE, "norm_batch_size": None, "options": (), "centralize": False}
    base = next(iter(runs.values())).but(**plain)
    everyone = {BASELINE: base} | {name: run for name, run in runs.items() if run != base}
    some = list(islice(objective(base).batches(base, data, 1), 20))
    calls = {name: _training_step(run, data, some) for name, run in everyone.items()}
    seconds = interleaved(calls, rounds, device=base.device, block_seconds=block_seconds)
    counted = {name: values[1:] or values for name, values in seconds.items()}
    found = summaries(counted, BASELINE)
    return found | {name: found[BASELINE] for name, run in runs.items() if run == base}


def _training_step(run: Run, data: Dataset, some: list[tuple[Tensor, Tensor]]) -> Call:
    training, endless = prepare(run, data), cycle(some)
    training.model.train()

    def call() -> None:
        step(run, training, *next(endless))

    return call


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    device: str | torch.device = "cpu",
    block_seconds: float = 0.0,
    clock: Clock = time.perf_counter,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Time calls in turn, in another order each round.

    So other work on the machine, its temperature, and what one call leaves in caches and in the
    allocator meet all alike. Each call is made a few times before.

    Args:
        calls: What to time, by name.
        rounds: Blocks a call.
        device: Where the calls work. On a CUDA device its own events are read around a block,
            before which it has nothing to do: a call that the host is too slow to launch is
            charged for that.
        block_seconds: How long a block shall be (default 0.0: one call).
        clock: What time is read from on a CPU.
        on_round: Called with the rounds that are done.

    Returns:
        Seconds a call in each block, by name, round by round.

    Raises:
        ValueError: If there are no rounds.

    Example:
        >>> times = interleaved({"nothing": lambda: None}, 5)
        >>> len(times["nothing"])
        5
    """
    check_count("rounds", rounds)
    watch = _watch(torch.device(device), clock)
    counts = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        watch(call, WARM_UP)
        if block_seconds:
            counts[name] = max(int(block_seconds / max(watch(call, WARM_UP), 1e-7)), 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, chance = list(calls), random.Random(0)
    gc.collect()
    for done in range(1, rounds + 1):
        chance.shuffle(order)
        for name in order:
            times[name].append(watch(calls[name], counts[name]))
        if on_round is not None:
            on_round(done)
    return times


def _watch(device: torch.device, clock: Clock) -> Callable[[Call, int], float]:
    """Return a function that measures the seconds per call on a device, over a block of calls."""

    def on_host(call: Call, count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count

    def on_device(call: Call, count: int) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / count

    return on_device if device.type == "cuda" else on_host


def summaries(times: Mapping[str, list[float]], baseline: str) -> dict[str, StepTime]:
    """Medians, and the ratios to one of the calls.

    Example:
        >>> summaries({"old": [2.0, 4.0, 2.0], "new": [1.0, 1.0, 1.0]}, "old")["new"].ratio
        0.5
    """
    base = times[baseline]
    found = {}
    for name, values in times.items():
        low, ratio, high = quartiles([a / b for a, b in zip(values, base, strict=True)])
        found[name] = StepTime(statistics.median(values), ratio, low, high)
    return found


class Quartiles(NamedTuple):
    """A median between quartiles."""

    low: float
    middle: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return lower quartile, median and upper quartile; of one value, itself three times."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4))


def graphed(call: Call) -> Call:
    """A CUDA graph of a call, whose replay has no launches of its own.

    The call works on the same tensors each time, and does not wait for the device.

    Raises:
        RuntimeError: If the call cannot be captured.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Call = graph.replay
    return replay
