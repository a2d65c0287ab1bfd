"""``anybatch diagnose``: measure how noisy a network's batch statistics are."""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli import options
from anybatch.cli.console import console, plain_errors, print_file, print_lines, print_path
from anybatch.cli.progress import progress_bars, show_parts
from anybatch.cli.settings import build_method_run, limit_threads, read_settings, results_folder
from anybatch.core.arguments import check_count


@plain_errors()
def diagnose(
    context: typer.Context,
    data: options.Data = "digits",
    root: options.Root = None,
    model: options.Model = None,
    method: options.Method = "torch",
    batch_size: options.BatchSize = 2,
    norm_batch_size: options.NormBatchSize = None,
    accumulate: options.Accumulate = 1,
    centralize: options.Centralize = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="File of the network's state_dict. [dim]Default: it is trained first.[/]"
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training set before; 0 for a fresh network.")
    ] = 3,
    max_batches: Annotated[int, typer.Option(help="Batches to measure.")] = 100,
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
    """Measure how noisy a network's batch statistics are, and say what to do.

        anybatch diagnose --batch-size 2

    A network of your own training, on your own data:

        anybatch diagnose --data imagefolder --root images --model resnet18
        --checkpoint weights.pt --batch-size 8

    A network and data of your own, from functions in a Python file:

        anybatch diagnose --model mine.py:network --data mine.py:data
    """
    from anybatch.tools import diagnose_run as diagnosis

    given = read_settings(context, config)
    epochs = given["epochs"] if given["checkpoint"] is None else 0
    check_count("epochs", epochs, 0)
    run = build_method_run({**given, "epochs": max(epochs, 1)}, "diagnosed")
    folder = results_folder(given, f"diagnose-{run.data_name}")
    limit_threads(run.device)
    weights = None if given["checkpoint"] is None else Path(given["checkpoint"])
    with progress_bars(given["as_json"]) as bars:
        show = show_parts(bars)
        found = diagnosis.diagnose_run(run, epochs, weights, given["max_batches"], show)
    page = diagnosis.write(found, folder)
    if given["as_json"]:
        print_file(folder / "diagnosis.json")
        return
    console.print(
        diagnosis.diagnosis_table(found, f"{run.data_name}, {run.model_name}, {run.label}")
    )
    print_lines((*found.reading.sentences, *found.notes), soft_wrap=False)
    print_path("report", page)
