"""The example weight that suits a network best, found on validation data."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.conversion.module_swap import unwrapped
from anybatch.core.arguments import check_between
from anybatch.core.name_patterns import Where
from anybatch.core.text_tables import text_table
from anybatch.evaluation.batches import (
    Forward,
    Shown,
    check_repeatable,
    device_of,
    examples_in,
    logits_of,
    reading,
    run,
    target_of,
)
from anybatch.evaluation.example_weighing import Weighing, set_example_weight
from anybatch.evaluation.figures import BLUE, GREY, RED, blank, save
from anybatch.evaluation.population_moments import group_of_processes, raise_together
from anybatch.evaluation.restore_model import borrowed, random_numbers

Metric = Callable[[Any, Any], Any]
METRICS = ("loss", "top1", "top5")
CANDIDATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class ExampleWeightTuning:
    """The result of `tune_example_weight`; print it for a table.

    Attributes:
        metric: What was tuned: "loss", "top1", "top5" or the function's name.
        alphas: Candidates, ascending.
        values: The metric at each of them.
        best: The alpha with the best value; among equals the one with the lowest
            loss, then the one nearest to `plain`.
        plain: The alpha of the network as it is: 0 for batch norms, 1 for group norms, the
            layers' own `example_weight` where they have one (0 where its norms differ).
        examples: Examples in the data.
        curves: Every metric that was measured, by name.
        maximize: Whether larger is better.
    """

    metric: str
    alphas: tuple[float, ...]
    values: tuple[float, ...]
    best: float
    plain: float
    examples: int
    curves: dict[str, tuple[float, ...]] = field(repr=False)
    maximize: bool = False
    _where: Where | None = field(default=None, repr=False, compare=False)

    @property
    def best_value(self) -> float:
        """The metric at the best alpha."""
        return self.values[self.alphas.index(self.best)]

    @property
    def plain_value(self) -> float | None:
        """The metric of the network as it is; None where that was no candidate."""
        return self.values[self.alphas.index(self.plain)] if self.plain in self.alphas else None

    def apply(self, model: nn.Module) -> nn.Module:
        """Give a network's norms the best alpha, in place: see `set_example_weight`.

        Args:
            model: The network.

        Returns:
            The model.
        """
        return set_example_weight(model, self.best, where=self._where)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "metric": self.metric,
            "maximize": self.maximize,
            "examples": self.examples,
            "best": self.best,
            "best_value": self.best_value,
            "plain": self.plain,
            "plain_value": self.plain_value,
            "alphas": list(self.alphas),
            "curves": {name: list(values) for name, values in self.curves.items()},
        }

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw every curve, with the best alpha and the network as it is.

        Args:
            path: File of the figure; its ending tells the format (default
                None: nowhere).

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: Without matplotlib.
        """
        figure = blank(4.2 * len(self.curves), 3.4)
        panels = figure.subplots(1, len(self.curves), squeeze=False)[0]
        for axes, (name, values) in zip(panels, self.curves.items(), strict=True):
            scale = 100 if name in ("top1", "top5") else 1
            axes.plot(self.alphas, [scale * v for v in values], "o-", color=BLUE, ms=4)
            axes.axvline(self.best, color=RED, ls="--", label=f"best {self.metric}")
            if self.plain in self.alphas:
                level = scale * values[self.alphas.index(self.plain)]
                axes.axhline(level, color=GREY, ls=":", label=f"plain, {self.plain:g}")
            axes.set_xlabel("example weight")
            axes.set_ylabel(f"{name} (%)" if scale == 100 else name)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
        if path is not None:
            save(figure, Path(path))
        return figure

    def __str__(self) -> str:
        names = list(self.curves)
        rows = []
        for index, alpha in enumerate(self.alphas):
            mark = "best" if alpha == self.best else "plain" if alpha == self.plain else ""
            cells = [_number(name, self.curves[name][index]) for name in names]
            rows.append((f"{alpha:g}", *cells, mark))
        table = text_table(("alpha", *names, ""), rows)
        return f"{table}\nbest {self.metric} at alpha = {self.best:g}, {self.examples} examples"


def tune_example_weight(
    model: nn.Module,
    loader: Iterable[Any],
    metric: str | Metric = "loss",
    *,
    candidates: Sequence[float] | None = None,
    maximize: bool = False,
    forward: Forward | None = None,
    max_batches: int | None = None,
    where: Where | None = None,
    in_one_pass: bool = True,
    progress: Shown = None,
    process_group: Any = None,
) -> ExampleWeightTuning:
    """Find the example weight with which a trained network does best on validation data.

    The network is run in evaluation mode at each candidate (`example_weighing`) and
    left as it was; ``result.apply(model)`` sets the best one. Choose it on data that
    no result is reported on. It depends on the metric: accuracy and cross-entropy may
    want very different ones (four-things, figure 4).

    Args:
        model: A trained network with batch norms, or with group norms whose averages
            `recalibrate` has collected.
        loader: Gives the validation data, with targets.
        metric: "loss" (mean cross-entropy, default), "top1", "top5" (accuracies from 0
            to 1), or a function of output and target (the whole batch where it has no
            target) that gives the batch's mean or a value an example.
        candidates: Weights to try, from 0 to 1 (default: 16, denser towards 0 and 1).
        maximize: Whether a function's larger values are better (default False).
        forward: Called as ``forward(model, batch)`` (default: see `evaluation.batches.run`).
        max_batches: Use only so many batches (default None: all).
        where: Which layers: a name pattern or a predicate ``(name, module)``.
        in_one_pass: Read the data once and run all candidates on each batch (default),
            which costs no memory; False reads them once per candidate.
        progress: Show a bar (default None: where standard error is a terminal), or a
            function that is called with the batches done and their number.
        process_group: Processes whose data are pooled, so that all choose the same weight (default
            None: all, where ``torch.distributed`` is initialized).

    Returns:
        The curve and the best weight.

    Raises:
        ValueError: For an unknown metric, candidates out of range or none, an empty
            loader, batches without targets, too few classes for "top5", no norm
            that can be weighed, or no candidate with a finite value.
        TypeError: For a metric of another kind.

    Source: four-things, section 3.1.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3))
        >>> batch = torch.randn(8, 2, 3, 3), torch.randint(3, (8,))
        >>> result = tune_example_weight(net, [batch], candidates=[0.0, 0.1, 0.5])
        >>> result.alphas, len(result.values), result.examples
        ((0.0, 0.1, 0.5), 3, 8)
    """
    alphas = _checked(candidates)
    score, name = _score(metric)
    maximize = metric in ("top1", "top5") or (maximize and callable(metric))
    if not in_one_pass and len(alphas) > 1:
        check_repeatable(loader, f"in_one_pass=False takes {len(alphas)} passes")
    weighing = Weighing(unwrapped(model)[0], where)
    group = group_of_processes(process_group)
    totals = [_Totals() for _ in alphas]
    with borrowed(model, training=False) as inner, torch.no_grad():
        rewind, device = random_numbers(inner), device_of(inner)
        read = partial(reading, loader, device=device, max_batches=max_batches, progress=progress)
        rounds = (
            [range(len(alphas))] if in_one_pass else [range(k, k + 1) for k in range(len(alphas))]
        )
        error: BaseException | None = None
        try:
            for number, indices in enumerate(rounds, 1):
                rewind()
                title = "tuning" if in_one_pass else f"tuning, {number} of {len(rounds)}"
                with read(title=title) as batches:
                    for batch in batches:
                        for index in indices:
                            weighing.set(alphas[index])
                            score(run(inner, batch, forward), batch, totals[index])
        except BaseException as caught:
            error = caught
        finally:
            weighing.undo()
        try:
            raise_together(error, group, device)
        finally:
            del error
        if group is not None:
            _pool_across(totals, (name,) if callable(metric) else METRICS, group, device)
    return _result(name, alphas, totals, weighing.plain, maximize, where)


class _Totals:
    """Sums of metrics over the data."""

    def __init__(self) -> None:
        self.sums: dict[str, float | Tensor] = {}
        self.count = self.examples = 0

    def add(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def mean(self, name: str) -> float:
        return float(self.sums[name]) / self.count


def _pool_across(
    totals: list[_Totals], names: Sequence[str], group: Any, device: torch.device | None
) -> None:
    """Replace sums over this process's data by those over the data of all."""
    rows = [
        [one.count, one.examples]
        + [number for n in names for number in (n in one.sums, float(one.sums.get(n, 0.0)))]
        for one in totals
    ]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    dist.all_reduce(table, group=group)
    for one, (count, examples, *sums) in zip(totals, table.tolist(), strict=True):
        one.count, one.examples = round(count), round(examples)
        known = zip(names, sums[::2], sums[1::2], strict=True)
        one.sums = {name: value for name, met, value in known if met}


_Score = Callable[[Any, Any, _Totals], None]


def _score(metric: str | Metric) -> tuple[_Score, str]:
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return lambda output, batch, totals: _own(metric, name, output, batch, totals), name
    if not isinstance(metric, str):
        raise TypeError(f"metric={metric!r}: give one of {METRICS}, or a function")
    if metric not in METRICS:
        raise ValueError(
            f"metric={metric!r}: give one of {', '.join(map(repr, METRICS))}, or a function of "
            "output and target"
        )
    return lambda output, batch, totals: _classify(metric, output, batch, totals), metric


def _classify(metric: str, output: Any, batch: Any, totals: _Totals) -> None:
    """Add a batch's cross-entropy and accuracies."""
    scores, target = logits_of(output), target_of(batch)
    if not isinstance(target, Tensor):
        target = torch.as_tensor(target, device=scores.device)
    classes = scores.shape[1] if scores.dim() > 1 else 0
    if metric == "top5" and classes < 6:
        raise ValueError(f'metric="top5": the network has {classes} classes; give "top1" or "loss"')
    if classes < 2:
        raise ValueError(
            f"metric={metric!r}: outputs {tuple(scores.shape)} are no scores of classes; give a "
            "function of output and target"
        )
    totals.examples += examples_in(batch)
    loss = F.cross_entropy(scores.float(), target, reduction="sum")
    if target.is_floating_point():  # shares of the classes
        target = target.argmax(1)
    kept = target != -100  # cross_entropy's word for positions that do not count
    totals.count += int(kept.sum())
    totals.add("loss", loss.double())
    ranked = scores.topk(5 if classes > 5 else 1, 1).indices
    right = (ranked == target.unsqueeze(1)) & kept.unsqueeze(1)
    totals.add("top1", right[:, :1].sum())
    if classes > 5:
        totals.add("top5", right.sum())


def _own(metric: Metric, name: str, output: Any, batch: Any, totals: _Totals) -> None:
    """Add a function's values."""
    try:
        target = target_of(batch)
    except ValueError:
        target = batch
    value, examples = metric(output, target), examples_in(batch)
    if not isinstance(value, Tensor):
        value = torch.tensor(float(value))
    totals.examples += examples
    count = value.numel() if value.dim() else examples
    totals.count += count
    totals.add(name, value.detach().double().mean() * count)


def _result(
    name: str,
    alphas: tuple[float, ...],
    totals: list[_Totals],
    plain: float,
    maximize: bool,
    where: Where | None,
) -> ExampleWeightTuning:
    if not totals[0].count:
        raise ValueError("loader gave no target that counts: no metric can be taken")
    curves = {key: tuple(one.mean(key) for one in totals) for key in totals[0].sums}
    values = curves[name]
    losses = curves.get("loss", (0.0,) * len(alphas))
    finite = [k for k in range(len(alphas)) if math.isfinite(values[k])]
    if not finite:
        raise ValueError(f"metric={name!r} is finite at no candidate: {values}")
    sign = -1 if maximize else 1

    def order(k: int) -> tuple[float, float, float]:
        return sign * values[k], losses[k], abs(alphas[k] - plain)

    best = alphas[min(finite, key=order)]
    examples = totals[0].examples
    return ExampleWeightTuning(name, alphas, values, best, plain, examples, curves, maximize, where)


def _checked(candidates: Sequence[float] | None) -> tuple[float, ...]:
    if candidates is None:
        return CANDIDATES
    if isinstance(candidates, (int, float, str)):
        raise TypeError(f"candidates={candidates!r}: give a list of numbers from 0 to 1")
    for candidate in candidates:
        check_between("candidates", candidate, 0.0, 1.0)
    if not len(candidates):
        raise ValueError(f"candidates={candidates!r}: give one or more numbers from 0 to 1")
    return tuple(sorted({float(candidate) for candidate in candidates}))


def _number(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name in ("top1", "top5") else f"{value:.5f}"
