"""Networks and the example weight that suits them (four-things, figures 1, 2 and 4).

python -m papers.studies.example_weight (digits|images|cifar100) (ghost|methods)
--output FOLDER [--root data/cifar100] [--train-size 200]
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from anybatch.evaluation.example_weight_search import ExampleWeightTuning, tune_example_weight
from anybatch.evaluation.figures import COLOURS, MARKERS, png
from anybatch.evaluation.recalibration import recalibrate
from anybatch.tools.checkpoint import read_checkpoint
from anybatch.tools.data import Dataset, load
from anybatch.tools.images import as_tensor
from anybatch.tools.run import Run
from anybatch.tools.training import train
from anybatch.tools.tune import build, halves, training_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OnRun = Callable[[str, int, tuple[float, ...]], None]


@dataclass(frozen=True)
class Weighed:
    """Results of networks trained in one way, one value per seed.

    The held-out examples are cut in two halves. The weight is tuned on each of
    them and judged on the other, so that every example is in the test once, and
    never with a weight that was tuned on it.

    Attributes:
        label: How they were trained.
        plain: The weight of the network as it is.
        alphas: The tuned weights, two a seed.
        plain_loss: Test loss without example weighing.
        tuned_loss: Test loss with the weight tuned on the other half.
        plain_top1: Test accuracy without example weighing.
        tuned_top1: Test accuracy with the weight tuned on the other half.
        curves: Held-out loss at every candidate, mean over halves and seeds.
    """

    label: str
    plain: float
    alphas: tuple[float, ...]
    plain_loss: tuple[float, ...]
    tuned_loss: tuple[float, ...]
    plain_top1: tuple[float, ...]
    tuned_top1: tuple[float, ...]
    curves: dict[float, float]


Pair = tuple[ExampleWeightTuning, ExampleWeightTuning]


def weigh(
    runs: Mapping[str, Run],
    folder: Path,
    seeds: Sequence[int] = (0, 1, 2),
    metric: str = "loss",
    on_run: OnRun | None = None,
) -> list[Weighed]:
    """Train networks and tune their example weights.

    Args:
        runs: Ways to train, by label; seeds are set.
        folder: Where the runs are kept; those that are there are not trained again.
        seeds: One run each.
        metric: What the weight is tuned for.
        on_run: Called with label, seed and the two tuned weights after each run.

    Returns:
        A row a way.
    """
    rows = []
    for label, run in runs.items():
        pairs = []
        for seed in seeds:
            pairs.append(_tuned(run.but(seed=seed), folder, metric))
            if on_run is not None:
                on_run(label, seed, tuple(one.best for one in pairs[-1]))
        rows.append(_row(label, pairs))
    return rows


def _tuned(run: Run, folder: Path, metric: str) -> Pair:
    """Train a run, and tune its weight."""
    data = load(run)
    train(run, folder, keep_weights=True, data=data)
    return tuned_on_halves(run, folder / "runs" / f"{run.key}.pt", data, metric)


def tuned_on_halves(run: Run, checkpoint: Path, data: Dataset, metric: str) -> Pair:
    """Curves of a trained run over the example weight, on both halves of the held-out examples.

    Args:
        run: The run.
        checkpoint: Its trained weights.
        data: Its data.
        metric: What the weight is tuned for.

    Returns:
        The curve on each half; the weight that one finds is judged on the other.
    """
    _, state = read_checkpoint(checkpoint)
    model = build(run, data, state)
    if any(isinstance(module, nn.GroupNorm) for module in model.modules()):
        recalibrate(model, training_batches(data, run.device), progress=False)
    one, other = halves(data, run.device)
    return (
        tune_example_weight(model, one, metric, progress=False),
        tune_example_weight(model, other, metric, progress=False),
    )


def _row(label: str, pairs: list[Pair]) -> Weighed:
    both = [one for pair in pairs for one in pair]

    def test(metric: str, tuned: bool) -> tuple[float, ...]:
        found = []
        for one, other in pairs:
            values = [
                judge.curves[metric][judge.alphas.index(guide.best if tuned else guide.plain)]
                * judge.examples
                for guide, judge in ((one, other), (other, one))
            ]
            found.append(sum(values) / (one.examples + other.examples))
        return tuple(found)

    curves = {
        alpha: statistics.fmean(one.curves["loss"][k] for one in both)
        for k, alpha in enumerate(both[0].alphas)
    }
    return Weighed(
        label,
        pairs[0][0].plain,
        tuple(one.best for one in both),
        test("loss", False),
        test("loss", True),
        test("top1", False),
        test("top1", True),
        curves,
    )


def as_table(rows: list[Weighed]) -> str:
    """The rows as a Markdown table: mean and standard deviation over the seeds.

    The gain is of each seed, so that what the seeds have in common is no part of its spread.
    """
    head = (
        "| network | tuned weights | loss, plain | tuned | change | top-1, plain | change |\n"
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
            row.label,
            _counted(row.alphas),
            _spread(row.plain_loss, 3),
            _spread(row.tuned_loss, 3),
            _spread(loss, 4, "+"),
            _spread(accuracy, 1),
            _spread(top1, 2, "+"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _counted(alphas: Sequence[float]) -> str:
    """Tuned weights, and how often each was found."""
    times = {alpha: alphas.count(alpha) for alpha in sorted(set(alphas))}
    return ", ".join(f"{alpha:g}" + (f" ({n})" if n > 1 else "") for alpha, n in times.items())


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def figure(rows: list[Weighed]) -> "Figure":
    """Held-out loss over the example weight, a line per row.

    Args:
        rows: What `weigh` gave.

    Returns:
        The figure; beside it the test loss with and without the tuned weight.
    """
    from matplotlib.figure import Figure  # no window, no state: nothing is opened

    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    lowest = 1.0
    for index, row in enumerate(rows):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        base = row.curves[row.plain]
        ratio = [value / base for value in row.curves.values()]
        lowest = min(lowest, *ratio)
        left.plot(list(row.curves), ratio, marker=marker, ms=4, color=colour, label=row.label)
    left.set_ylim(lowest - 0.02, 1.2)
    left.set_xlabel("example weight")
    left.set_ylabel("loss relative to the network as it is")
    left.legend(frameon=False, fontsize=8)
    places = range(len(rows))
    for name, shift, colour in (("plain", -0.1, COLOURS[0]), ("tuned", 0.1, COLOURS[5])):
        values: list[Any] = [getattr(row, f"{name}_loss") for row in rows]
        for place, seeds in zip(places, values, strict=True):
            right.plot([place + shift] * len(seeds), seeds, "o", ms=3, color=colour, alpha=0.5)
        means = [statistics.fmean(seeds) for seeds in values]
        right.plot([p + shift for p in places], means, "_", ms=14, color=colour, label=name)
    right.set_xticks(list(places), [row.label for row in rows], rotation=20)
    right.set_ylabel("test loss; a point is a seed")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return drawn


def image_arrays(run: Run, path: Path, shape: tuple[int, ...], size: int | None = None) -> Path:
    """A run's data, or the first part of them, as images in an ``.npz`` file.

    Args:
        run: Gives the data.
        path: Where the file shall be.
        shape: Of an image: ``(1, 8, 8)`` makes the digits fit for convolutions.
        size: So many training and held-out examples at most (default None: all).

    Returns:
        The path, for ``Run(data="npz", root=...)``.
    """
    data = load(run)
    parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
    arrays = {}
    for name, (x, y) in parts.items():
        arrays[f"x_{name}"] = as_tensor(x[:size]).reshape(-1, *shape).numpy()
        arrays[f"y_{name}"] = y[:size].numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def main() -> None:
    """Train, tune, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", choices=("digits", "images", "cifar100"))
    parser.add_argument("networks", choices=("ghost", "methods"))
    parser.add_argument("--root")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--size", type=int, help="training and held-out images at most")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    if given.data == "digits":
        base = Run(noise=0.0)
    else:
        digits = given.data == "images"
        source = Run() if digits else Run(data="cifar100", root=given.root, model="resnet8")
        shape, path = (1, 8, 8) if digits else (3, 32, 32), given.output / "data.npz"
        root = str(path if path.is_file() else image_arrays(source, path, shape, given.size))
        base = Run(data="npz", root=root, model="resnet8")
    base = base.but(batch_size=64, epochs=given.epochs, train_size=given.train_size)
    if given.networks == "ghost":
        runs = {
            f"ghost size {size}": base.but(method="ghost", options=(("ghost_size", size),))
            for size in (2, 4, 8, 16, 32)
        }
    else:
        runs = {f"bn, batch {size}": base.but(method="bn", batch_size=size) for size in (2, 8, 64)}
        runs |= {f"{method}, batch 64": base.but(method=method) for method in ("gn", "bgn")}

    def show(label: str, seed: int, alphas: tuple[float, ...]) -> None:
        print(f"{label}, seed {seed}: tuned weights {alphas}", flush=True)

    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows = weigh(runs, given.output, seeds=seeds, on_run=show)
    (given.output / f"{given.networks}.png").write_bytes(png(figure(rows)))
    print(as_table(rows))


if __name__ == "__main__":
    main()
