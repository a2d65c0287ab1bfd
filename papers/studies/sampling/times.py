"""Time of regular and irregular samples, and the norms' share of a training step.

Source: bn-sampling, figures 8c and 1a.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.conversion.norm_types import is_batch_norm
from anybatch.core.arguments import check_count
from anybatch.layers import SampledBatchNorm2d
from anybatch.layers.sample_positions import draw, part_moments, place
from anybatch.tools.classification import batches
from anybatch.tools.data import Dataset
from anybatch.tools.run import BASELINE, Run
from anybatch.tools.timing import Quartiles, quartiles
from anybatch.tools.training import prepare
from papers.studies.sampling.errors import sampled_part

NO_NORM = "none"
PHASES = ("forward", "backward", "step")


def _clock() -> float:
    """Seconds: of work on one thread, which other processes do not lengthen; else on the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class PassTime:
    """Time of a pass.

    Attributes:
        what: "statistics" for the moments alone, "layer" for its forward and backward.
        sample: "batch" (adjacent examples), "feature" (a patch), "points" (no pattern), or "torch"
            for torch's batch normalization.
        index: "static", or "redrawn" before each pass.
        milliseconds: Median.
        ratio: To torch's in the same round.
    """

    what: str
    sample: str
    index: str
    milliseconds: float
    ratio: Quartiles


def regularity_and_speed(
    shape: tuple[int, int, int, int] = (128, 16, 32, 32),
    *,
    ratio: float = 1 / 32,
    rounds: int = 41,
    seed: int = 0,
) -> list[PassTime]:
    """Time passes with regular places and a static index, and without.

    As many values, taken from adjacent examples, from a patch of every map, or one by one; with the
    index as it was or drawn anew before each pass. All in turn, after two rounds that do not count;
    on one thread in processor time, else in wall time. The statistics alone are torch's operators;
    the layer is as it ships.

    Args:
        shape: Of the activation.
        ratio: Part of the values.
        rounds: Passes of each.
        seed: Of data and samples.

    Returns:
        A row a pass, sample and index.

    Source: bn-sampling, figure 8c.
    """
    check_count("rounds", rounds)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).requires_grad_()
    dy = torch.randn(shape, generator=generator)
    passes: dict[tuple[str, str, str], Callable[[], Any]] = {
        ("statistics", "torch", "static"): lambda: torch.batch_norm_update_stats(
            x.detach(), None, None, 0.1
        ),
        ("layer", "torch", "static"): _layer_pass(nn.BatchNorm2d(shape[1]), x, dy),
    }
    for sample in ("batch", "feature", "points"):
        for index in ("static", "redrawn"):
            fresh = index == "redrawn"
            norm = SampledBatchNorm2d(shape[1], sample=sample, ratio=ratio, seed=seed)
            passes["statistics", sample, index] = _statistics_pass(norm, x.detach(), fresh)
            passes["layer", sample, index] = _layer_pass(norm, x, dy, fresh)
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in passes}
    for _ in range(rounds + 2):
        for key, one in passes.items():
            x.grad = None
            start = _clock()
            one()
            seconds[key].append(_clock() - start)
    rows = []
    for key, values in seconds.items():
        base = seconds[key[0], "torch", "static"]
        ratios = [a / b for a, b in zip(values[2:], base[2:], strict=True)]
        rows.append(PassTime(*key, 1e3 * median(values[2:]), quartiles(ratios)))
    return sorted(rows, key=lambda row: row.what, reverse=True)


def _statistics_pass(norm: SampledBatchNorm2d, x: Tensor, fresh: bool) -> Callable[[], None]:
    parts = [sampled_part(norm, x, 0)]
    number = 1

    def one() -> None:
        nonlocal number
        if fresh:
            number += 1
            numbers = tuple(draw(norm.seed, number))
            shape = (len(x), *x.shape[2:])
            parts[0] = place(norm.sample, shape, 0, numbers, norm.ratio, None, x.device)
        part_moments(x, (parts[0],))

    return one


def _layer_pass(norm: Any, x: Tensor, dy: Tensor, fresh: bool = False) -> Callable[[], None]:
    def one() -> None:
        if fresh:
            norm.redraw()
        norm(x).backward(dy)

    return one


@dataclass(frozen=True)
class NormShare:
    """Time of a training step, and the norms' part of it.

    Attributes:
        method: Its norms; `NO_NORM` for none.
        milliseconds: Median by phase: forward with the loss, backward, and the whole step.
        share: By phase, the part of the time that goes without norms, in the same round.
    """

    method: str
    milliseconds: dict[str, float]
    share: dict[str, Quartiles]


def norm_share(runs: Mapping[str, Run], data: Dataset, *, rounds: int = 15) -> list[NormShare]:
    """The norms' share of a training step: with them, and with nothing in their place.

    Steps of all networks in turn on the same batches, after two rounds that do not count; on one
    thread in processor time, else in wall time. Nothing is learned (the learning rate is 0), so
    that a network without norms stays finite.

    Args:
        runs: By name, all with the same network and batch size.
        data: Their data.
        rounds: Steps of each.

    Returns:
        A row a run, after that without norms.

    Source: bn-sampling, figure 1a.
    """
    check_count("rounds", rounds)
    plain = {"method": BASELINE, "options": ()}
    everyone = {NO_NORM: next(iter(runs.values())).but(**plain), **runs}
    everyone = {name: run.but(lr=0.0) for name, run in everyone.items()}
    trainings = {name: prepare(run, data) for name, run in everyone.items()}
    _remove_norms(trainings[NO_NORM].model)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in everyone}
    some = list(islice(batches(everyone[NO_NORM], data, 1), 8))
    for x, y in islice(cycle(some), rounds + 2):
        for name, training in trainings.items():
            training.model.train()
            seconds[name].append(_timed_step(training.model, training.optimizer, x, y))
    found = []
    for name, times in seconds.items():
        counted, base = times[2:], seconds[NO_NORM][2:]
        milliseconds = {phase: 1e3 * median(t[phase] for t in counted) for phase in PHASES}
        share = {
            phase: quartiles([1 - b[phase] / t[phase] for t, b in zip(counted, base, strict=True)])
            for phase in PHASES
        }
        found.append(NormShare(name, milliseconds, share))
    return found


def _remove_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_batch_norm(child):
                setattr(parent, name, nn.Identity())


def _timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> dict[str, float]:
    times = [_clock()]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    times.append(_clock())
    loss.backward()
    times.append(_clock())
    optimizer.step()
    times.append(_clock())
    return {
        "forward": times[1] - times[0],
        "backward": times[2] - times[1],
        "step": times[3] - times[0],
    }
