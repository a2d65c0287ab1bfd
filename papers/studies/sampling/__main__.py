"""Measure what sampling estimates and costs, as docs/results/sampling.md has it.

Errors of sampled statistics in a ResNet-20, fresh and after each epoch of a short training, and how
they go together in its layers (errors); the same in networks that each sampling has trained itself
(own); running statistics with every weight of the newest batch (averages); time of regular and of
irregular samples (regularity); the norms' share of a training step of ResNet-20 and ResNet-56
(share). On CIFAR-10, or without a root on scikit-learn's digits as 8x8 images. Writes tables as
CSV and plots as PNG, and prints the tables.

    python -m papers.studies.sampling [PART ...] [--root data/cifar10] [--epochs 2]
        [--draws 60] [--rounds 21] [--threads 1] [--output runs/sampling]
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybatch.conversion import to_batchnorm
from anybatch.core.files import write_whole
from anybatch.evaluation.dataset_statistics import dataset_statistics
from anybatch.evaluation.figures import png
from anybatch.layers import VirtualDataset
from anybatch.tools.classification import batches
from anybatch.tools.data import Dataset, load
from anybatch.tools.machine import machine
from anybatch.tools.objective import batches_from
from anybatch.tools.report_files import output_folder
from anybatch.tools.run import BASELINE, Run
from anybatch.tools.training import prepare, step
from papers.studies.example_weight import image_arrays
from papers.studies.sampling import figures
from papers.studies.sampling.averages import moving_average_influence
from papers.studies.sampling.errors import METHODS, STATISTICS, SampleErrors, estimation_errors
from papers.studies.sampling.times import PHASES, norm_share, regularity_and_speed

PARTS = ("errors", "own", "averages", "regularity", "share")
RATIO = 1 / 32
RATIOS = (1 / 128, 1 / 32, 1 / 8)
SHAPES = ((128, 16, 32, 32), (32, 64, 56, 56))
SHARE_METHODS = (BASELINE, "bn", "ns", "bs", "fs", "points", "vdn", "l1", "range")
HELD_OUT = 2000


def errors(run: Run, data: Dataset, draws: int, folder: Path) -> None:
    """Figures 6 and 7."""
    moments = dataset_statistics([data.train_x], progress=False)
    training = prepare(run, data)
    stages, ratios = [], []
    for epoch in range(run.epochs + 1):
        if epoch:
            training.model.train()
            for x, y in batches(run, data, epoch):
                step(run, training, x, y)
                training.learning_rate.step()
        name = "fresh" if not epoch else f"{epoch} epochs" if epoch > 1 else "1 epoch"
        trained = epoch == run.epochs
        found = {}
        for ratio in RATIOS if trained else (RATIO,):
            for sample in METHODS:
                some = [x for x, _ in batches_from(run, data, epoch + 1, draws)]
                found[ratio, sample] = estimation_errors(
                    training.model, some, sample, ratio=ratio, moments=moments
                )
        for (ratio, _), one in found.items():
            if ratio == RATIO:
                stages.append((name, *_error_row(one)))
            if trained:
                ratios.append((f"1/{round(1 / ratio)}", *_error_row(one)))
        if trained:
            last = [one for (ratio, _), one in found.items() if ratio == RATIO]
            _errors_by_layer(last, folder)
            _write_image(folder / "sampling-errors.png", figures.error_figure(last))
            _write_image(folder / "sampling-correlation.png", figures.correlation_figure(last))
            outside = []
            for sample in list(METHODS)[:-1]:
                some = [x for x, _ in batches_from(run, data, epoch + 1, draws)]
                one = estimation_errors(training.model, some, sample, normalize_by="batch")
                outside.append(_error_row(one))
    head = ("sample", "mean", "variance", "correlation, mean", "correlation, variance")
    _table(folder / "errors.csv", ("network", *head), stages)
    _table(folder / "errors-by-ratio.csv", ("ratio", *head), ratios)
    _table(folder / "errors-outside.csv", head, outside)


def own(run: Run, data: Dataset, draws: int, folder: Path) -> None:
    """Figures 6 and 7, each sampling in a network that it has trained for an epoch."""
    moments = dataset_statistics([data.train_x], progress=False)
    rows = []
    for sample, way in _ways(run.but(epochs=1)).items():
        training = prepare(way, data)
        training.model.train()
        for x, y in batches(way, data, 1):
            step(way, training, x, y)
            training.learning_rate.step()
        wrapped = isinstance(training.model, VirtualDataset)
        inner = training.model.model if wrapped else training.model
        assert isinstance(inner, nn.Module)
        model = to_batchnorm(inner)
        some = [x for x, _ in batches_from(run, data, 2, draws)]
        one = estimation_errors(model, some, sample, ratio=RATIO, moments=moments)
        rows.append(_error_row(one))
    head = ("sample", "mean", "variance", "correlation, mean", "correlation, variance")
    _table(folder / "errors-own.csv", head, rows)


def _ways(run: Run) -> dict[str, Run]:
    """A run of each sampling, all of one size."""
    virtual = ("num_virtual", round(RATIO * run.batch_size))
    return {
        sample: run.but(
            method=method, options=(virtual if sample == "virtual" else ("ratio", RATIO),)
        )
        for sample, method in METHODS.items()
    }


def _error_row(one: SampleErrors) -> tuple[str, ...]:
    errors = (f"{one.typical(name):.3f}" for name in STATISTICS)
    together = (f"{one.between(name):.2f}" for name in STATISTICS)
    return (one.sample, *errors, *together)


def _errors_by_layer(found: Sequence[SampleErrors], folder: Path) -> None:
    rows = []
    for one in found:
        mean, var = (one.spread(name) for name in STATISTICS)
        for k, layer in enumerate(one.layers):
            cells = [f"{value:.4f}" for value in (*mean[k], *var[k])]
            rows.append((one.sample, layer, str(one.values[k]), *cells))
    quartiles = [f"{s}, {q}" for s in ("mean", "variance") for q in ("low", "median", "high")]
    _write(folder / "errors-by-layer.csv", ("sample", "layer", "values", *quartiles), rows)


def averages(run: Run, data: Dataset, folder: Path) -> None:
    """Figure 10."""
    part = replace(data, test_x=data.test_x[:HELD_OUT], test_y=data.test_y[:HELD_OUT])
    ways = {BASELINE: run} | {way.method: way for way in _ways(run).values()}
    ways["bs, 1/128"] = run.but(method="bs", options=(("ratio", 1 / 128),))
    found = []
    for name, way in ways.items():
        one = moving_average_influence(way, part, population=8)
        found.append(replace(one, method=name))
        print(f"{name}: best {one.best}", flush=True)
    rows = []
    for one in found:
        for row in one.rows:
            values = (row.mean_error, row.var_error, row.loss, 100 * row.accuracy)
            rows.append((one.method, f"{row.momentum:g}", *(f"{v:.3f}" for v in values)))
        rows.append(
            (one.method, "population", "", "", f"{one.loss:.3f}", f"{100 * one.accuracy:.3f}")
        )
    head = ("method", "momentum", "mean error", "variance error", "loss", "accuracy")
    _write(folder / "averages.csv", head, rows)
    momenta = [f"{row.momentum:g}" for row in found[0].rows]
    wide = [
        (one.method, *(_short(row.loss) for row in one.rows), _short(one.loss)) for one in found
    ]
    _print(("held-out loss", *momenta, "population"), wide)
    wide = [(one.method, *(f"{row.var_error:.3f}" for row in one.rows)) for one in found]
    _print(("error of the variance", *momenta), wide)
    _write_image(folder / "sampling-averages.png", figures.average_figure(found))


def _short(loss: float) -> str:
    return f"{loss:.2f}" if loss < 100 else f"{loss:.0e}"


def regularity(rounds: int, folder: Path) -> None:
    """Figure 8c."""
    rows = []
    for shape in SHAPES:
        found = regularity_and_speed(shape, ratio=RATIO, rounds=rounds)
        for row in found:
            ratios = (f"{value:.3f}" for value in (row.ratio.middle, row.ratio.low, row.ratio.high))
            name = " x ".join(map(str, shape))
            cells = (row.what, row.sample, row.index, f"{row.milliseconds:.2f}", *ratios)
            rows.append((name, *cells))
        if shape == SHAPES[0]:
            _write_image(folder / "sampling-regularity.png", figures.regularity_figure(found))
    head = ("shape", "what", "sample", "index", "milliseconds", "ratio", "low", "high")
    _table(folder / "regularity.csv", head, rows)


def share(run: Run, data: Dataset, rounds: int, folder: Path) -> None:
    """Figure 1a."""
    found, rows = {}, []
    for model, title in (("resnet20", "ResNet-20"), ("resnet56", "ResNet-56")):
        runs = {m: run.but(model=model, method=m) for m in SHARE_METHODS}
        found[title] = norm_share(runs, data, rounds=rounds)
        for row in found[title]:
            times = (f"{row.milliseconds[phase]:.0f}" for phase in PHASES)
            shares = [f"{100 * row.share[phase].middle:.0f} %" for phase in PHASES]
            spread = "{:.0f} to {:.0f} %".format(*(100 * row.share["step"][k] for k in (0, 2)))
            rows.append((title, row.method, *times, *shares, spread))
    head = ("network", "norms", *(f"{phase}, ms" for phase in PHASES))
    head += (*(f"share of {phase}" for phase in PHASES), "quartiles of the last")
    _table(folder / "share.csv", head, rows)
    _write_image(folder / "sampling-share.png", figures.share_figure(found))


def _table(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    _write(path, head, rows)
    _print(head, rows)


def _write(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    def write(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([head, *rows])

    write_whole(path, write)


def _print(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def _write_image(path: Path, figure: Any) -> None:
    data = png(figure, dpi=100)
    write_whole(path, lambda file: file.write_bytes(data))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--root", help="folder of CIFAR-10 (default: digits)")
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/sampling"))
    given = parser.parse_args()
    parts = given.parts or PARTS
    for part in parts:
        if part not in PARTS:
            parser.error(f"{part!r}: give some of {', '.join(PARTS)}")
    torch.set_num_threads(given.threads)
    folder = output_folder(given.output)
    run = Run(data="cifar10", root=given.root, model="resnet20", train_size=given.train_size)
    if given.root is None:
        path = image_arrays(Run(), folder / "digits.npz", (1, 8, 8))
        run = Run(data="npz", root=str(path), model="resnet20")
    run = run.but(batch_size=128, epochs=given.epochs)
    data = load(run)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{data.name}, {len(data.train_x)} images, threads: {given.threads}", flush=True)
    if "errors" in parts:
        errors(run, data, given.draws, folder)
    if "own" in parts:
        own(run, data, given.draws, folder)
    if "averages" in parts:
        averages(run, data, folder)
    if "regularity" in parts:
        regularity(given.rounds, folder)
    if "share" in parts:
        share(run, data, given.rounds, folder)
    print(f"\nwritten to {folder.resolve()}")


if __name__ == "__main__":
    main()
