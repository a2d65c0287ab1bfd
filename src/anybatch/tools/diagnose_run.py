"""A diagnosis of a network of the tools, trained first or loaded."""

from __future__ import annotations

from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from torch import Tensor, nn

from anybatch.core.files import write_json
from anybatch.evaluation.diagnosis.diagnose import check_measurable, diagnose
from anybatch.evaluation.diagnosis.result import Diagnosis
from anybatch.tools.bench import Show
from anybatch.tools.checkpoint import load_weights, read_checkpoint
from anybatch.tools.data import load
from anybatch.tools.objective import batches_from
from anybatch.tools.own_data import OwnData
from anybatch.tools.precision import forward
from anybatch.tools.report_files import terminal_table
from anybatch.tools.run import BASELINE, Run
from anybatch.tools.training import prepare, train_epoch

if TYPE_CHECKING:
    from rich.table import Table


def diagnose_run(
    run: Run, epochs: int, checkpoint: Path | None, max_batches: int, show: Show
) -> Diagnosis:
    """Train or load a run's network, and diagnose it on its training batches.

    It is trained for `epochs`, unless there is a checkpoint. `show` is called with what is under
    way, how much is done, and of how much.

    Raises:
        ValueError: If the file cannot be loaded into the network.
    """
    if run.method == BASELINE and run.micro_batch_size == 1:
        run = run.but(method="bn")  # torch's layer refuses a single value
    data = load(run)
    training = prepare(run, data)
    check_measurable(training.model)
    if checkpoint is not None:
        load_weights(training.model, read_checkpoint(checkpoint)[1], run)
    for epoch in range(1, epochs + 1):
        train_epoch(run, training, data, epoch)
        show("training", epoch, epochs)

    def through(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        y: Tensor = forward(run, model, batch[0])
        return y

    own = data.loss if isinstance(data, OwnData) else None
    return diagnose(
        training.model.train(),
        batches_from(run, data, epochs + 1, max_batches),
        forward=through,
        loss=None if own is None else lambda output, batch: own(output, batch[1]),
        max_batches=max_batches,
        progress=lambda done, total: show("measuring", done, total or max_batches),
    )


def diagnosis_table(found: Diagnosis, title: str) -> Table:
    """Build the table for the terminal, without columns of which nothing was measured."""
    from rich.console import Console

    styles = {"noisy": "red", "borderline": "yellow"}
    width = get_terminal_size().columns
    head, rows = found.table()
    kept = list(range(len(head)))

    def table() -> Table:
        return terminal_table(
            [head[k] for k in kept],
            [[row[k] for k in kept] for row in rows],
            title=title,
            caption="noise from batch to batch; a single value's is 1",
            styles=[styles.get(word) for word, _ in found.rows()],
            left=head[-1:],
            wrapped=(head[0], head[-1]),
        )

    # As many columns as a terminal has room for: name, values and reading in any case.
    while len(kept) > 3 and Console(width=10000).measure(table()).maximum > width:
        del kept[-2]
    return table()


def write(found: Diagnosis, folder: Path) -> Path:
    """Write ``diagnosis.json``, ``diagnosis.png`` and ``report.html``, each whole."""
    write_json(folder / "diagnosis.json", found.to_dict())
    found.plot(folder / "diagnosis.png")
    return found.report(folder / "report.html")
