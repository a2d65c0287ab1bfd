"""``anybatch train``: train one network with one method."""

import json
from typing import TYPE_CHECKING

import typer

from anybatch.cli import options
from anybatch.cli.console import console, plain_errors, print_path
from anybatch.cli.progress import progress_bars
from anybatch.cli.settings import build_method_run, limit_threads, read_settings, results_folder

if TYPE_CHECKING:
    from anybatch.tools.training import Row


@plain_errors(keeps=True)
def train(
    context: typer.Context,
    method: options.Method = "mabn",
    data: options.Data = "digits",
    root: options.Root = None,
    model: options.Model = None,
    batch_size: options.BatchSize = 2,
    norm_batch_size: options.NormBatchSize = None,
    accumulate: options.Accumulate = 1,
    centralize: options.Centralize = False,
    epochs: options.Epochs = 12,
    lr: options.LearningRate = 0.1,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    precision: options.Precision = "float32",
    channels_last: options.ChannelsLast = False,
    train_size: options.TrainSize = None,
    option: options.Options = None,
    config: options.Config = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Train one network with one method.

        anybatch train --method mabn --batch-size 2 --option mabn.window=32

    Stopped, it goes on after the last whole epoch when started again.
    """
    from anybatch.tools.processes import locked
    from anybatch.tools.training import train as train_run

    given = read_settings(context, config)
    run = build_method_run(given, "trained")
    folder = results_folder(given, f"train-{run.data_name}")
    limit_threads(run.device)

    def show(done: int, row: "Row") -> None:
        if not given["as_json"]:
            loss = "not finite" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
            bars.console.print(
                f"epoch {done:3d}  train loss {loss}  held-out accuracy {_percent(row)}  "
                f"{row['seconds']:.1f} s",
                highlight=False,
            )
        bars.update(bar, completed=done)

    with locked(folder), progress_bars(given["as_json"]) as bars:
        bar = bars.add_task(run.label, total=run.epochs)
        row = train_run(run, folder, show, keep_weights=True)
    if given["as_json"]:
        print(json.dumps(row, indent=2))
        return
    console.print(f"held-out accuracy [bold]{_percent(row)}[/]  ({run.label})")
    path = folder / "runs" / f"{run.key}.json"
    print_path("result ", path)
    print_path("weights", path.with_suffix(".pt"))


def _percent(row: "Row") -> str:
    return "not finite" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
