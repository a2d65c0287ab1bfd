"""``anybatch train``: train one network with one method."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.console import console, plain_errors
from anybatch.cli.options import (
    Accumulate,
    AsJson,
    BatchSize,
    Centralize,
    Config,
    Data,
    Device,
    Epochs,
    LearningRate,
    Model,
    NormBatchSize,
    Options,
    Output,
    Precision,
    Root,
    TrainSize,
    complete_method,
)
from anybatch.cli.progress import progress_bars
from anybatch.cli.settings import build_method_run, limit_threads, read_settings

if TYPE_CHECKING:
    from anybatch.tools.training import Row


@plain_errors()
def train(
    context: typer.Context,
    method: Annotated[
        str,
        typer.Option(
            help="Short name of the method, or torch for torch's batch norm.",
            autocompletion=complete_method,
        ),
    ] = "mabn",
    data: Data = "digits",
    root: Root = None,
    model: Model = None,
    batch_size: BatchSize = 2,
    norm_batch_size: NormBatchSize = None,
    accumulate: Accumulate = 1,
    centralize: Centralize = False,
    epochs: Epochs = 12,
    lr: LearningRate = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, order, noise and augmentation.")] = 0,
    device: Device = "cpu",
    precision: Precision = "float32",
    train_size: TrainSize = None,
    option: Options = None,
    config: Config = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Train one network with one method.

        anybatch train --method mabn --batch-size 2 --option mabn.window=32

    Stopped, it goes on after the last whole epoch when started again.
    """
    from anybatch.tools.processes import locked
    from anybatch.tools.report_files import output_folder
    from anybatch.tools.training import train as train_run

    given = read_settings(context, config)
    run = build_method_run(given, "trained")
    folder = output_folder(Path(given["output"] or f"runs/train-{run.data_name}"))
    limit_threads(run.device)

    def show(done: int, row: "Row") -> None:
        if not given["as_json"]:
            loss = "not finite" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
            bars.console.print(
                f"epoch {done:3d}  train loss {loss}  held-out accuracy "
                f"{100 * row['accuracy']:.2f} %  {row['seconds']:.1f} s",
                highlight=False,
            )
        bars.update(bar, completed=done)

    with locked(folder), progress_bars(given["as_json"]) as bars:
        bar = bars.add_task(run.label, total=run.epochs)
        row = train_run(run, folder, show, keep_weights=True)
    if given["as_json"]:
        print(json.dumps(row, indent=2))
        return
    console.print(f"held-out accuracy [bold]{100 * row['accuracy']:.2f} %[/]  ({run.label})")
    path = (folder / "runs" / f"{run.key}.json").resolve()
    console.print(f"result  {path}", soft_wrap=True, highlight=False)
    console.print(f"weights {path.with_suffix('.pt')}", soft_wrap=True, highlight=False)
