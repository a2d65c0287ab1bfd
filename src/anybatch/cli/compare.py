"""``anybatch compare``: train a network with each method and compare the results."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli.console import console, errors, plain_errors, typed_command
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
    Methods,
    Model,
    NormBatchSize,
    Options,
    Output,
    Precision,
    Root,
    TrainSize,
)
from anybatch.cli.progress import progress_bars, show_runs
from anybatch.cli.settings import (
    build_run,
    count_workers,
    named_methods,
    options_of,
    parse_seeds,
    read_settings,
)

if TYPE_CHECKING:
    from anybatch.tools.compare import Comparison


@plain_errors()
def compare(
    context: typer.Context,
    data: Data = "digits",
    root: Root = None,
    model: Model = None,
    methods: Methods = None,
    batch_size: BatchSize = 2,
    norm_batch_size: NormBatchSize = None,
    accumulate: Accumulate = 1,
    centralize: Centralize = False,
    target_batch_size: Annotated[
        int, typer.Option(help="Batch size of the batch norm that shows what can be reached.")
    ] = 32,
    epochs: Epochs = 12,
    lr: LearningRate = 0.1,
    seeds: Annotated[
        str, typer.Option(help="How many, or which with commas, as in 3 or 0,1,2.")
    ] = "3",
    device: Device = "cpu",
    precision: Precision = "float32",
    train_size: TrainSize = None,
    option: Options = None,
    config: Config = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes. [dim]Default: one per core; 1 on a GPU.[/]")
    ] = None,
    output: Output = None,
    timing: Annotated[bool, typer.Option(help="Measure the time of a step, too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train a network with each method and compare what they reach.

    By default on scikit-learn's digits at batch 2, in a few minutes:

        anybatch compare

    On CIFAR-10, with two of the methods:

        anybatch compare --data cifar10 --root data/cifar10 --methods mabn,mbn --seeds 1

    On a network and data of your own: functions in a Python file, of which the second returns
    training and held-out datasets:

        anybatch compare --model mine.py:network --data mine.py:data

    Stopped, it goes on where it was when started again with the same command.
    """
    import torch

    from anybatch.tools import compare_report as report
    from anybatch.tools.compare import run_all, table
    from anybatch.tools.data import load, steps_per_epoch
    from anybatch.tools.processes import locked
    from anybatch.tools.report_files import output_folder
    from anybatch.tools.timing import time_steps

    start = time.perf_counter()
    given = read_settings(context, config)
    comparison = _comparison(given)
    folder = output_folder(Path(given["output"] or f"runs/compare-{comparison.base.data_name}"))
    loaded = load(comparison.base)  # wrong data are found before anything is trained
    for run in comparison.runs():
        steps_per_epoch(run, loaded)
    with locked(folder):
        workers = count_workers(given["workers"], given["device"])
        with progress_bars(given["as_json"]) as bars:
            show = show_runs(bars, comparison.runs())
            results = run_all(comparison, folder, workers, show)
        times = {}
        if given["timing"]:
            quiet = nullcontext() if given["as_json"] else errors.status("timing a step")
            if comparison.base.device == "cpu":
                torch.set_num_threads(1)  # as the runs had
            with quiet:
                times = time_steps(comparison.timed(), loaded)
        outcome = report.FinishedComparison(
            comparison,
            table(comparison, results),
            results,
            times,
            typed_command(),
            time.perf_counter() - start,
        )
        page = report.write(outcome, folder)
    if given["as_json"]:
        print((folder / "results.json").read_text(encoding="utf-8"), end="")
        return
    console.print(report.comparison_table(outcome))
    for line in filter(None, report.advice(outcome)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)


def _comparison(given: dict[str, Any]) -> "Comparison":
    from anybatch.tools.compare import Comparison

    chosen = named_methods(given)
    options = options_of(chosen, given)
    return Comparison(
        base=build_run(given),
        methods=tuple(dict.fromkeys(chosen)),
        seeds=parse_seeds(str(given["seeds"])),
        target_batch_size=given["target_batch_size"],
        options=tuple(options.items()),
        centralize=given["centralize"],
    )
