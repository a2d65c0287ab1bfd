"""What a training step costs, relative to ``torch.nn.BatchNorm`` in the same process."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice

from anybatch.experiments.config import BASELINE, Run
from anybatch.experiments.data import Dataset
from anybatch.experiments.training import batches, prepare, step


@dataclass(frozen=True)
class StepTime:
    """Time of a training step.

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

    Args:
        runs: By name, all with the same network and batch size.
        data: Their data.
        rounds: Blocks a run; the first is not counted.
        block_seconds: Length of a block of the baseline.

    Returns:
        The time of each run; ratios are to torch's batch norm with the whole batch, which is in
        the answer by the method's name.
    """
    plain = {"method": BASELINE, "norm_batch_size": None, "options": (), "centralize": False}
    base = next(iter(runs.values())).but(**plain)
    everyone = {BASELINE: base} | {name: run for name, run in runs.items() if run != base}
    trainings = {name: prepare(run, data) for name, run in everyone.items()}
    some = list(islice(batches(base, data, 1), 20))

    def block(name: str, steps: int) -> float:
        run, training = everyone[name], trainings[name]
        training.model.train()
        start = time.perf_counter()
        for x, y in islice(cycle(some), steps):
            step(run, training, x, y)
        if run.device != "cpu":
            _synchronize(run.device)
        return (time.perf_counter() - start) / steps

    for name in everyone:
        block(name, 3)
    steps = max(int(block_seconds / block(BASELINE, 3)), 1)
    seconds: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(rounds):
        for name in everyone:
            seconds[name].append(block(name, steps))
    times = {name: values[1:] or values for name, values in seconds.items()}
    found = {name: _summary(values, times[BASELINE]) for name, values in times.items()}
    return found | {name: found[BASELINE] for name, run in runs.items() if run == base}


def _summary(values: list[float], base: list[float]) -> StepTime:
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return StepTime(statistics.median(values), ratio, low, high)


def _synchronize(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
