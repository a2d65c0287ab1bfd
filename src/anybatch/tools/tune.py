"""The example weight of a trained network: tuned on half the held-out data, judged on the rest."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch.evaluation.example_weight_search import ExampleWeightTuning, tune_example_weight
from anybatch.evaluation.figures import png
from anybatch.evaluation.recalibration import Recalibration, recalibrate
from anybatch.tools import own_data
from anybatch.tools.checkpoint import load_weights
from anybatch.tools.data import Dataset, load
from anybatch.tools.examples import Examples
from anybatch.tools.images import as_tensor
from anybatch.tools.machine import machine
from anybatch.tools.report_files import terminal_table, write_report
from anybatch.tools.run import Run
from anybatch.tools.training import prepare

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
_BATCH = 250

Batches = list[tuple[Tensor, Tensor]]


class TunedNetwork(NamedTuple):
    """A tuned network.

    Attributes:
        run: How the network is built, and on which data.
        checkpoint: Where its weights are from.
        tuned: The curve on one half of the held-out examples.
        test: The metrics on the other half, of the network as it is and with the
            best weight.
        recalibration: What was done to the statistics before; None for nothing.
        command: What was typed.
        seconds: From start to end.
    """

    run: Run
    checkpoint: str
    tuned: ExampleWeightTuning
    test: ExampleWeightTuning
    recalibration: Recalibration | None
    command: str
    seconds: float


def build(run: Run, data: Dataset, state: dict[str, Tensor]) -> nn.Module:
    """A run's network with a checkpoint's weights, in evaluation mode."""
    model = prepare(run, data).model
    load_weights(model, state, run)
    return model.eval()


def halves(data: Dataset, device: str = "cpu") -> tuple[Batches, Batches]:
    """The held-out examples in two halves, mixed: one to tune on, one to report on.

    Batches of each half, always the same ones.
    """
    order = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))
    middle = len(order) // 2
    if not middle:
        raise ValueError("data: there is one held-out example, and two halves of them are needed")

    def batch(index: Tensor) -> tuple[Tensor, Tensor]:
        x = data.test_x[index]
        if isinstance(x, Examples):
            return own_data.batch(x, device)
        return as_tensor(x).to(device), data.test_y[index].to(device)

    parts = (order[:middle], order[middle:])
    found = [[batch(index) for index in part.split(_BATCH)] for part in parts]
    return found[0], found[1]


def training_batches(data: Dataset, device: str = "cpu") -> list[Tensor]:
    """The training examples as they are, without noise or augmentation, to recalibrate on."""
    return [part.to(device) for part in data.train_x.split(_BATCH)]


def tune(
    run: Run,
    checkpoint: Path,
    state: dict[str, Tensor],
    metric: str,
    candidates: Sequence[float] | None,
    recalibrates: bool,
    progress: bool | None,
    command: str,
) -> TunedNetwork:
    """Find the best example weight of a checkpoint.

    Args:
        run: Gives data, network, method and device.
        checkpoint: Where the weights are from.
        state: The weights.
        metric: "loss", "top1" or "top5"; of a user's data their loss and, for "top1", their score.
        candidates: Weights to try; None for the usual ones.
        recalibrates: Take running statistics from the training examples first; group
            norms, which have none, always do.
        progress: Whether bars are shown.
        command: What was typed.
    """
    start = time.perf_counter()
    data = load(run)
    model = build(run, data, state)
    recalibration = None
    if recalibrates or any(isinstance(module, nn.GroupNorm) for module in model.modules()):
        recalibration = recalibrate(model, training_batches(data, run.device), progress=progress)
    validation, test = halves(data, run.device)
    own = {"loss": data.loss, "top1": data.score} if isinstance(data, own_data.OwnData) else {}
    search = partial(
        tune_example_weight, metric=own.get(metric) or metric, maximize=metric != "loss"
    )
    tuned = search(model, validation, candidates=candidates, progress=progress)
    pair = sorted({tuned.plain, tuned.best})
    judged = search(model, test, candidates=pair, progress=False)
    seconds = time.perf_counter() - start
    return TunedNetwork(run, str(checkpoint), tuned, judged, recalibration, command, seconds)


def judged_rows(outcome: TunedNetwork) -> list[tuple[str, ...]]:
    """The test as text: a row for the network as it is, one for the best weight."""
    tuned, test = outcome.tuned, outcome.test
    rows = []
    for name, alpha in (("as it is", tuned.plain), ("tuned", tuned.best)):
        index = test.alphas.index(alpha)
        values = [_text(metric, curve[index]) for metric, curve in test.curves.items()]
        rows.append((name, f"{alpha:g}", *values))
    return rows


def as_data(outcome: TunedNetwork) -> dict[str, Any]:
    """The outcome as plain data."""
    recalibration = outcome.recalibration
    return {
        "schema": SCHEMA,
        "command": outcome.command,
        "seconds": outcome.seconds,
        "machine": machine(),
        "checkpoint": outcome.checkpoint,
        "run": outcome.run.as_dict(),
        "recalibrated": None if recalibration is None else recalibration.to_dict(),
        "tuned": outcome.tuned.to_dict(),
        "test": outcome.test.to_dict(),
    }


def write(outcome: TunedNetwork, folder: Path) -> Path:
    """Write ``tune.json``, ``tune.png`` and ``tune.html``, each whole."""
    tuned = outcome.tuned
    return write_report(
        folder,
        "tune.html.j2",
        ("tune.json", as_data(outcome)),
        {"tune": png(tuned.plot())},
        page="tune.html",
        run=outcome.run,
        tuned=tuned,
        test=outcome.test,
        names=list(outcome.test.curves),
        rows=judged_rows(outcome),
        curve=[
            (f"{alpha:g}", *(_text(name, curve[k]) for name, curve in tuned.curves.items()))
            for k, alpha in enumerate(tuned.alphas)
        ],
    )


def judged_table(outcome: TunedNetwork) -> "Table":
    """Build the table of the test for the terminal."""
    return terminal_table(
        ("network", "example weight", *outcome.tuned.curves),
        judged_rows(outcome),
        title=f"on {outcome.test.examples} other examples",
    )


def _text(metric: str, value: float) -> str:
    return f"{100 * value:.2f} %" if metric in ("top1", "top5") else f"{value:.4f}"
