"""What batch normalization sampling estimates and what it costs, measured (bn-sampling).

Errors of sampled statistics and how they go together in the layers of a network (figures 6 and 7);
what the weight of the moving average makes of them (appendix D, figure 10); what a sample's
regularity is worth in time (figure 8c); and the norms' share of a training step (figure 1a).
Samples are those of the library's layers, from the same draws.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch import backends
from anybatch.conversion import convert
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.core.arguments import check_choice, check_count
from anybatch.evaluation.recalibration import recalibrate
from anybatch.layers import (
    SampledBatchNorm1d,
    SampledBatchNorm2d,
    SampledBatchNorm3d,
    VirtualDataset,
)
from anybatch.layers.sample_positions import Part, draw, nearest, part_moments, place, virtual
from anybatch.registry import get_method
from anybatch.tools.classification import batches, evaluate
from anybatch.tools.data import Dataset
from anybatch.tools.run import BASELINE, Run
from anybatch.tools.training import prepare, step

METHODS = {"naive": "ns", "batch": "bs", "feature": "fs", "points": "points", "virtual": "vdn"}
STATISTICS = ("mean", "var")
MOMENTA = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
NO_NORM = "none"
PHASES = ("forward", "backward", "step")
_SAMPLED = (SampledBatchNorm1d, SampledBatchNorm2d, SampledBatchNorm3d)
_Sampled = SampledBatchNorm1d | SampledBatchNorm2d | SampledBatchNorm3d


class Middle(NamedTuple):
    """A median between quartiles."""

    low: float
    middle: float
    high: float


def _middle(values: Sequence[float]) -> Middle:
    if len(values) < 2:
        return Middle(*(3 * [values[0]]))
    low, _, high = quantiles(values, n=4)
    return Middle(low, median(values), high)


# --- errors of sampled statistics ----------------------------------------------


@dataclass(frozen=True)
class SampleErrors:
    """How far a sample's statistics are from the batch's, in every layer of a network.

    Attributes:
        sample: As in `METHODS`.
        layers: Names of the norms, in the order in which they run.
        values: Values a channel in the sample of each.
        mean: ``||mu_S - mu|| / ||sigma||`` over the channels, ``(draws, layers)``.
        var: ``||var_S - var|| / ||var||``, the same.
    """

    sample: str
    layers: tuple[str, ...]
    values: tuple[int, ...]
    mean: Tensor
    var: Tensor

    def spread(self, statistic: str) -> list[Middle]:
        """Median and quartiles over the draws, a layer each."""
        return [_middle(column.tolist()) for column in getattr(self, statistic).t()]

    def typical(self, statistic: str) -> float:
        """Root mean square over draws and layers."""
        errors: Tensor = getattr(self, statistic)
        return float(errors.square().mean().sqrt())

    def correlation(self, statistic: str) -> Tensor:
        """Correlation over the draws of the errors in each two layers, ``(layers, layers)``.

        A layer without error, or always with the same, has none: its row is not a number.
        """
        errors: Tensor = getattr(self, statistic)
        return torch.corrcoef(errors.t()).view(len(self.layers), len(self.layers))

    def between(self, statistic: str) -> float:
        """Mean correlation of two different layers."""
        apart = ~torch.eye(len(self.layers), dtype=torch.bool)
        return float(self.correlation(statistic)[apart].mean())


@torch.no_grad()
def estimation_errors(
    model: nn.Module,
    inputs: Iterable[Tensor],
    sample: str,
    *,
    ratio: float = 1 / 32,
    moments: tuple[Any, Any] = (0.0, 1.0),
    normalize_by: str = "sample",
    seed: int = 0,
) -> SampleErrors:
    """Errors of sampled statistics in every norm of a network, over many batches and draws.

    A copy of the network runs in training mode with its weights as they are; each batch has its
    own draw of the samples' places. The truth is the layer's statistics of the whole batch, without
    virtual examples.

    Args:
        model: A network with batch norms, left as it was.
        inputs: Batches, all of the same shape; one draw each.
        sample: One of `METHODS`.
        ratio: Part of the values; for "virtual" the virtual examples by the batch's, 1 at least.
        moments: Mean and standard deviation of the data, for "virtual".
        normalize_by: "sample" where the norms are converted, as in training with the method, so
            that errors reach the layers above; "batch" where the network keeps batch normalization
            and samples are only looked at, which "virtual" has no meaning in.
        seed: Of the samples.

    Returns:
        The errors.

    Raises:
        ValueError: For another sample or way to normalize, a network without batch norms, or fewer
            than two batches.

    Source: bn-sampling, section 5.1, figures 6 and 7.

    Example:
        >>> errors = estimation_errors(nn.Sequential(nn.BatchNorm2d(2)),
        ...                            torch.randn(3, 8, 2, 4, 4), "batch", ratio=1.0)
        >>> errors.typical("mean"), errors.values
        (0.0, (128,))
    """
    check_choice("sample", sample, tuple(METHODS))
    check_choice("normalize_by", normalize_by, ("sample", "batch"))
    if sample == "virtual" and normalize_by == "batch":
        raise ValueError("normalize_by='batch': give 'sample' with sample='virtual'")
    some = list(inputs)
    if len(some) < 2:
        raise ValueError(f"inputs: {len(some)} batches, give two or more")
    if not any(is_batch_norm(module) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no batch norm: give one that has")
    known = get_method(METHODS[sample]).options
    given: dict[str, Any] = {"ratio": ratio, "seed": seed}
    options = {name: value for name, value in given.items() if name in known}
    converted = convert(nn.Sequential(copy.deepcopy(model)), METHODS[sample], **options).train()
    layers = {n: m for n, m in converted.named_modules() if isinstance(m, _SAMPLED)}
    network: nn.Module = converted
    virtual_rows = 0
    if sample == "virtual":
        virtual_rows = nearest(ratio * len(some[0]), 1, len(some[0]))
        network = VirtualDataset(converted, *moments, virtual_rows, seed=seed).train()
    elif normalize_by == "batch":
        network = nn.Sequential(copy.deepcopy(model)).train()
    watched = network.model if isinstance(network, VirtualDataset) else network
    found: dict[str, tuple[int, float, float]] = {}

    def watch(name: str, layer: _Sampled) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = _errors(args[0], _part(layer, args[0], virtual_rows), virtual_rows)

        return look

    for name, layer in layers.items():
        watched.get_submodule(name).register_forward_pre_hook(watch(name, layer))
    rows = []
    for x in some:
        for layer in layers.values():
            layer.redraw()
        network(x)
        rows.append(list(found.values()))
    table = torch.tensor(rows, dtype=torch.float64)
    names = tuple(name.removeprefix("0.") for name in found)
    values = tuple(int(value) for value in table[0, :, 0])
    return SampleErrors(sample, names, values, table[..., 1], table[..., 2])


def _part(layer: _Sampled, x: Tensor, virtual_rows: int) -> Part:
    """The sample that a layer takes of an activation."""
    spatial = tuple(x.shape[2:])
    if layer.sample == "virtual":
        return virtual(virtual_rows, spatial)
    numbers = tuple(layer.memory["index"].tolist())
    return place(layer.sample, (len(x), *spatial), 0, numbers, layer.ratio, None, x.device)


def _errors(x: Tensor, part: Part, virtual_rows: int) -> tuple[int, float, float]:
    """Values in a sample, and the errors of its mean and variance."""
    real = x[virtual_rows:]
    mean, var = backends.moments(real, (len(real),))
    ((own_mean, own_var),) = part_moments(x, (part,))
    mean_error = (own_mean - mean).norm() / var.sum().sqrt()
    return part.values, float(mean_error), float((own_var - var).norm() / var.norm())


# --- the moving average --------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """Running statistics with one weight of the newest batch.

    Attributes:
        momentum: That weight.
        mean_error: Distance of the running mean from the population's by the norm of the standard
            deviation, root mean square over the layers.
        var_error: Distance of the running variance by the norm of the variance, the same.
        loss: On the held-out examples.
        accuracy: On the held-out examples, from 0 to 1.
    """

    momentum: float
    mean_error: float
    var_error: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Averages:
    """What running statistics of every weight are worth to one network.

    Attributes:
        method: It was trained with.
        rows: One a weight.
        loss: Held-out loss with the population's statistics.
        accuracy: Held-out accuracy with them.
    """

    method: str
    rows: tuple[Average, ...]
    loss: float
    accuracy: float

    @property
    def best(self) -> Average:
        """That with the lowest held-out loss."""
        return min(self.rows, key=lambda row: row.loss)


def moving_average_influence(
    run: Run, data: Dataset, *, momenta: Sequence[float] = MOMENTA, population: int = 16
) -> Averages:
    """Train a network once, keep running statistics with every weight, and judge each of them.

    ::

        running = (1 - momentum) * running + momentum * (mean_S or var_S)                  (eq. 8)

    Running statistics have no part in training, so that one training serves all weights. They
    start from 0 and 1, as torch's do. The truth is what `anybatch.recalibrate` finds with the final
    weights on batches of training.

    Args:
        run: How to train.
        data: Its data.
        momenta: Weights of the newest batch.
        population: Batches behind the population's statistics, at most.

    Returns:
        The averages.

    Raises:
        ValueError: For a weight that is not above 0 and at most 1.

    Source: bn-sampling, appendix D, equations 8 and 9, figure 10. The figure's axis is read as the
    weight of the old average: its text calls 0.9 the usual value.
    """
    for momentum in momenta:
        if not 0 < momentum <= 1:
            raise ValueError(f"momenta={tuple(momenta)}: give numbers above 0, up to 1")
    training = prepare(run, data)
    norms: list[Any] = [m for m in training.model.modules() if is_batch_norm(m)]
    tracked = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    averages = {momentum: [t.clone() for t in tracked] for momentum in momenta}
    for norm in norms:
        norm.momentum = 1.0  # running statistics are then those of the last batch
    for epoch in range(1, run.epochs + 1):
        training.model.train()
        for x, y in batches(run, data, epoch):
            step(run, training, x, y)
            training.learning_rate.step()
            for momentum, average in averages.items():
                torch._foreach_lerp_(average, tracked, momentum)
        if training.progress is not None:
            training.progress.step()
    some = [x for x, _ in islice(batches(run, data, run.epochs + 1), population)]
    recalibrate(training.model, some, progress=False)
    truth = [t.clone() for t in tracked]
    loss, accuracy = evaluate(run, training.model, data)
    rows = []
    for momentum, average in averages.items():
        for mine, value in zip(tracked, average, strict=True):
            mine.copy_(value)
        errors = _distances(average, truth)
        rows.append(Average(momentum, *errors, *evaluate(run, training.model, data)))
    return Averages(run.method, tuple(rows), loss, accuracy)


def _distances(found: list[Tensor], truth: list[Tensor]) -> tuple[float, float]:
    """Errors of running means and variances, root mean square over the layers."""
    means, variances = [], []
    pairs = list(zip(found, truth, strict=True))
    for (mean, true_mean), (var, true_var) in zip(pairs[::2], pairs[1::2], strict=True):
        means.append(float((mean - true_mean).square().sum() / true_var.sum()))
        variances.append(float((var - true_var).square().sum() / true_var.square().sum()))
    return fmean(means) ** 0.5, fmean(variances) ** 0.5


# --- time ----------------------------------------------------------------------


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
    ratio: Middle


def regularity_and_speed(
    shape: tuple[int, int, int, int] = (128, 16, 32, 32),
    *,
    ratio: float = 1 / 32,
    rounds: int = 41,
    seed: int = 0,
) -> list[PassTime]:
    """What regular places and a static index are worth in time.

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
        rows.append(PassTime(*key, 1e3 * median(values[2:]), _middle(ratios)))
    return sorted(rows, key=lambda row: row.what, reverse=True)


def _statistics_pass(norm: SampledBatchNorm2d, x: Tensor, fresh: bool) -> Callable[[], None]:
    parts = [_part(norm, x, 0)]
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
    share: dict[str, Middle]


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
            phase: _middle([1 - b[phase] / t[phase] for t, b in zip(counted, base, strict=True)])
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
