"""Measure what cross-iteration batch normalization rests on: figure 6, table 9, section 4.4.

Real images (scikit-learn's digits as 8x8 images), a chain of three convolutions, and the MLP for
the orders of the Taylor polynomial. Writes numbers as JSON and plots as PNG.

    python -m papers.studies.cross_iteration [--seeds 3] [--chains]
        [--output runs/cross-iteration]

``--chains`` trains the chain with each kind of compensation too, which takes many minutes.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.core.files import write_json, write_whole
from anybatch.evaluation.figures import png
from anybatch.tools.data import load
from anybatch.tools.machine import machine
from anybatch.tools.report_files import output_folder
from anybatch.tools.run import Run
from anybatch.tools.training import train
from papers.studies.cross_iteration.compensation import (
    KINDS,
    Chain,
    Errors,
    batches,
    compensation_errors,
    step_seconds,
)
from papers.studies.cross_iteration.decay import Decay, gradient_decay
from papers.studies.cross_iteration.figures import decay_figure, error_figure

RATES = (0.003, 0.01, 0.03)


def decays(x: torch.Tensor, y: torch.Tensor) -> dict[str, Decay]:
    """Figure 6: a chain, fresh and after some hundreds of steps."""
    torch.manual_seed(0)
    net = Chain((1, 8, 16, 16, 16), 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    found, done = {}, 0
    for stage in (0, 200, 600):
        for some, classes in batches(x, y, 4, stage - done, stage):
            loss = F.cross_entropy(net(some), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done = stage
        plain = torch.nn.Sequential()
        for conv, norm in net.pairs:
            plain += torch.nn.Sequential(conv, norm, torch.nn.ReLU())
        found[f"{stage} steps"] = gradient_decay(plain.train(), x[:64], probes=32)
    return found


def orders(seeds: int) -> dict[str, list[float]]:
    """Table 9: accuracy of the MLP on digits at batch 2 by order."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for order in (0, 1, 2):
            run = Run(method="cbn", options=(("order", order),))
            rows = [train(run.but(seed=seed), Path(folder)) for seed in range(seeds)]
            found[str(order)] = [100 * row["accuracy"] for row in rows]
    return found


def chains(x: torch.Tensor, y: torch.Tensor, seeds: int) -> dict[str, list[float]]:
    """Accuracy of a chain on digits at batch 4 after 300 steps, by kind of compensation."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for seed in range(seeds):
            torch.manual_seed(seed)
            net = Chain((1, 8, 8, 16), 10, 8, kind)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
            for some, classes in batches(x[:1297], y[:1297], 4, 300, seed):
                loss = F.cross_entropy(net(some), classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                right = net.eval()(x[1297:]).argmax(1) == y[1297:]
            found[kind].append(100 * float(right.float().mean()))
    return found


def mean_errors(errors: Errors) -> dict[str, dict[str, float]]:
    """Errors averaged over the ages."""
    return {
        truth: {kind: statistics.fmean(values) for kind, values in table.items()}
        for truth, table in asdict(errors).items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chains", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/cross-iteration"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = output_folder(given.output)
    digits = load(Run())
    images = [x for x in (digits.train_x, digits.test_x) if isinstance(x, Tensor)]
    x = torch.cat(images).view(-1, 1, 8, 8)
    y = torch.cat([digits.train_y, digits.test_y])
    rows: dict[str, Any] = {"machine": machine(), "seeds": given.seeds}

    print("gradients of the statistics over earlier layers", file=sys.stderr)
    fading = decays(x, y)
    rows["decay"] = {stage: asdict(decay) for stage, decay in fading.items()}
    print("errors of old statistics", file=sys.stderr)
    rows["errors"] = {}
    for rate in RATES:
        errors = compensation_errors(x, y, rate=rate)
        rows["errors"][str(rate)] = {"by age": asdict(errors), "mean": mean_errors(errors)}
        if rate == RATES[1]:
            _write(folder / "errors.png", png(error_figure(errors)))
    print("time of a step", file=sys.stderr)
    seconds = step_seconds(x, y)
    rows["step, relative to naive"] = {k: v / seconds["naive"] for k, v in seconds.items()}
    print("orders of the polynomial", file=sys.stderr)
    rows["accuracy by order, MLP"] = orders(given.seeds)
    rows["accuracy by kind, chain"] = {}
    if given.chains:
        print("chains", file=sys.stderr)
        rows["accuracy by kind, chain"] = chains(x, y, given.seeds)

    _write(folder / "decay.png", png(decay_figure(fading)))
    write_json(folder / "cross-iteration.json", rows)
    for stage, decay in fading.items():
        print(stage, "mean", _short(decay.mean), "square", _short(decay.square))
    for rate in RATES:
        for truth, table in rows["errors"][str(rate)]["mean"].items():
            print(f"rate {rate}, truth {truth}:", {k: round(v, 4) for k, v in table.items()})
    print("step:", {k: round(v, 2) for k, v in rows["step, relative to naive"].items()})
    for name in ("accuracy by order, MLP", "accuracy by kind, chain"):
        for kind, values in rows[name].items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name}: {kind}: {statistics.fmean(values):.1f} +- {spread:.1f} %")
    print(f"written to {folder.resolve()}")


def _write(path: Path, data: bytes) -> None:
    write_whole(path, lambda file: file.write_bytes(data))


def _short(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


if __name__ == "__main__":
    main()
