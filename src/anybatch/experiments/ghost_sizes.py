"""Ghost batch size and inference example weighing together (four-things, figure 4)."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anybatch.experiments.config import Run
from anybatch.experiments.data import load
from anybatch.experiments.figures import COLOURS, MARKERS
from anybatch.experiments.training import train
from anybatch.experiments.tuning import Outcome, read_checkpoint, tune

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (2, 4, 8, 16, 32)
OnRun = Callable[[int, int, Outcome], None]


@dataclass(frozen=True)
class GhostSize:
    """What networks trained with one ghost size reach, a value a seed.

    Attributes:
        ghost_size: Examples that share statistics in training.
        alphas: The weight tuned on one half of the held-out examples.
        plain_loss: Loss on the other half, without example weighing.
        tuned_loss: The same with the tuned weight.
        plain_top1: Accuracy on the other half, without example weighing.
        tuned_top1: The same with the tuned weight.
        curves: Loss at every candidate, on the first half, mean over the seeds.
    """

    ghost_size: int
    alphas: tuple[float, ...]
    plain_loss: tuple[float, ...]
    tuned_loss: tuple[float, ...]
    plain_top1: tuple[float, ...]
    tuned_top1: tuple[float, ...]
    curves: dict[float, float]


def ghost_sizes(
    base: Run,
    folder: Path,
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = (0, 1, 2),
    metric: str = "loss",
    on_run: OnRun | None = None,
) -> list[GhostSize]:
    """Train with each ghost size, tune the example weight, and test it on other examples.

    Args:
        base: Data, network, batch size and epochs; its method and seed are not used.
        folder: Results and weights are kept in it; runs that are finished are not
            trained again.
        sizes: Ghost sizes, up to the batch size.
        seeds: One run each.
        metric: What the weight is tuned for.
        on_run: Called with ghost size, seed and outcome after each run.

    Returns:
        A row a size.
    """
    rows = []
    for size in sizes:
        outcomes = []
        for seed in seeds:
            run = base.but(method="ghost", options=(("ghost_size", size),), seed=seed)
            train(run, folder, keep_weights=True)
            weights = folder / "runs" / f"{run.key}.pt"
            _, state = read_checkpoint(weights)
            outcome = tune(run, weights, state, metric, None, False, False, "ghost_sizes")
            outcomes.append(outcome)
            if on_run is not None:
                on_run(size, seed, outcome)
        rows.append(_row(size, outcomes))
    return rows


def _row(size: int, outcomes: list[Outcome]) -> GhostSize:
    def test(metric: str, tuned: bool) -> tuple[float, ...]:
        found = []
        for outcome in outcomes:
            alpha = outcome.tuned.best if tuned else outcome.tuned.plain
            found.append(outcome.test.curves[metric][outcome.test.alphas.index(alpha)])
        return tuple(found)

    tuned = [outcome.tuned for outcome in outcomes]
    curves = {
        alpha: statistics.fmean(one.curves["loss"][k] for one in tuned)
        for k, alpha in enumerate(tuned[0].alphas)
    }
    return GhostSize(
        size,
        tuple(one.best for one in tuned),
        test("loss", False),
        test("loss", True),
        test("top1", False),
        test("top1", True),
        curves,
    )


def as_table(rows: list[GhostSize]) -> str:
    """The rows as a Markdown table: mean and standard deviation over the seeds.

    The gain is of each seed, so that what the seeds have in common is no part of its spread.
    """
    head = (
        "| ghost size | tuned weights | loss, 0 | loss, tuned | change | top-1, 0 | change |\n"
        "|---|---|---|---|---|---|---|"
    )
    lines = [head]
    for row in rows:
        pairs = zip(row.plain_loss, row.tuned_loss, strict=True)
        loss = [after - before for before, after in pairs]
        pairs = zip(row.plain_top1, row.tuned_top1, strict=True)
        top1 = [100 * (after - before) for before, after in pairs]
        accuracy = [100 * value for value in row.plain_top1]
        cells = (
            str(row.ghost_size),
            ", ".join(f"{alpha:g}" for alpha in sorted(row.alphas)),
            _spread(row.plain_loss, 3),
            _spread(row.tuned_loss, 3),
            _spread(loss, 4, "+"),
            _spread(accuracy, 1),
            _spread(top1, 2, "+"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def figure(rows: list[GhostSize]) -> "Figure":
    """Loss on the half that is tuned on, over the example weight, a line a ghost size.

    Args:
        rows: What `ghost_sizes` gave.

    Returns:
        The figure; beside it the test loss with and without the tuned weight.
    """
    from matplotlib.figure import Figure  # no window, no state: nothing is opened

    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for index, row in enumerate(rows):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        base = row.curves[min(row.curves)]
        ratio = [value / base for value in row.curves.values()]
        label = f"ghost size {row.ghost_size}"
        left.plot(list(row.curves), ratio, marker=marker, ms=4, color=colour, label=label)
    left.set_ylim(0.9, 1.2)
    left.set_xlabel("example weight")
    left.set_ylabel("loss relative to weight 0")
    left.legend(frameon=False, fontsize=8)
    places = range(len(rows))
    for name, shift, colour in (("plain", -0.1, COLOURS[0]), ("tuned", 0.1, COLOURS[5])):
        values: list[Any] = [getattr(row, f"{name}_loss") for row in rows]
        for place, seeds in zip(places, values, strict=True):
            right.plot([place + shift] * len(seeds), seeds, "o", ms=3, color=colour, alpha=0.5)
        means = [statistics.fmean(seeds) for seeds in values]
        right.plot([p + shift for p in places], means, "_", ms=14, color=colour, label=name)
    right.set_xticks(list(places), [str(row.ghost_size) for row in rows])
    right.set_xlabel("ghost size")
    right.set_ylabel("test loss; a point is a seed")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return drawn


def pictures(run: Run, path: Path, shape: tuple[int, ...], size: int | None = None) -> Path:
    """A run's data, or the first part of them, as pictures in an ``.npz`` file.

    Args:
        run: Gives the data.
        path: Where the file shall be.
        shape: Of a picture: ``(1, 8, 8)`` makes the digits fit for convolutions.
        size: So many training and held-out examples at most (default None: all).

    Returns:
        The path, for ``Run(data="npz", root=...)``.
    """
    data = load(run)
    parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
    arrays = {}
    for name, (x, y) in parts.items():
        arrays[f"x_{name}"] = x[:size].reshape(-1, *shape).numpy()
        arrays[f"y_{name}"] = y[:size].numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path
