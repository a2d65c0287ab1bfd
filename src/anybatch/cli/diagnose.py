"""``anybatch diagnose``: measure how noisy a network's batch statistics are."""

from pathlib import Path
from typing import Annotated

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
    Model,
    NormBatchSize,
    Options,
    Output,
    Precision,
    Root,
    TrainSize,
    complete_method,
)
from anybatch.cli.progress import progress_bars, show_parts
from anybatch.cli.settings import build_method_run, limit_threads, read_settings


@plain_errors()
def diagnose(
    context: typer.Context,
    data: Data = "digits",
    root: Root = None,
    model: Model = None,
    method: Annotated[
        str,
        typer.Option(
            help="Short name of the method, or torch for torch's batch norm.",
            autocompletion=complete_method,
        ),
    ] = "torch",
    batch_size: BatchSize = 2,
    norm_batch_size: NormBatchSize = None,
    accumulate: Accumulate = 1,
    centralize: Centralize = False,
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
    seed: Annotated[int, typer.Option(help="Of weights, order, noise and augmentation.")] = 0,
    device: Device = "cpu",
    precision: Precision = "float32",
    train_size: TrainSize = None,
    option: Options = None,
    config: Config = None,
    output: Output = None,
    as_json: AsJson = False,
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
    from anybatch.tools.report_files import output_folder

    given = read_settings(context, config)
    epochs = given["epochs"] if given["checkpoint"] is None else 0
    if epochs < 0:
        raise ValueError(f"epochs={epochs}: give a number from 0 on")
    run = build_method_run({**given, "epochs": max(epochs, 1)}, "diagnosed")
    folder = output_folder(Path(given["output"] or f"runs/diagnose-{run.data_name}"))
    limit_threads(run.device)
    weights = None if given["checkpoint"] is None else Path(given["checkpoint"])
    with progress_bars(given["as_json"]) as bars:
        show = show_parts(bars)
        found = diagnosis.diagnose_run(run, epochs, weights, given["max_batches"], show)
    page = diagnosis.write(found, folder)
    if given["as_json"]:
        print((folder / "diagnosis.json").read_text(encoding="utf-8"), end="")
        return
    console.print(
        diagnosis.diagnosis_table(found, f"{run.data_name}, {run.model_name}, {run.label}")
    )
    for sentence in (*found.reading.sentences, *found.notes):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)
