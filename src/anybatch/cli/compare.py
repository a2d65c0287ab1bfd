"""``anybatch compare``: train a network with each method and compare the results."""

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli import options
from anybatch.cli.console import (
    console,
    errors,
    plain_errors,
    print_file,
    print_lines,
    print_path,
    typed_command,
)
from anybatch.cli.progress import progress_bars, show_runs
from anybatch.cli.settings import (
    build_run,
    count_workers,
    named_methods,
    options_of,
    parse_seeds,
    read_settings,
    results_folder,
)

if TYPE_CHECKING:
    from anybatch.tools.compare import Comparison


@plain_errors(keeps=True)
def compare(
    context: typer.Context,
    data: options.Data = "digits",
    root: options.Root = None,
    model: options.Model = None,
    methods: options.Methods = None,
    batch_size: options.BatchSize = 2,
    norm_batch_size: options.NormBatchSize = None,
    accumulate: options.Accumulate = 1,
    centralize: options.Centralize = False,
    target_batch_size: Annotated[
        int, typer.Option(help="Batch size of the batch norm that shows what can be reached.")
    ] = 32,
    epochs: options.Epochs = 12,
    lr: options.LearningRate = 0.1,
    seeds: Annotated[
        str, typer.Option(help="How many, or which with commas, as in 3 or 0,1,2.")
    ] = "3",
    device: options.Device = "cpu",
    precision: options.Precision = "float32",
    channels_last: options.ChannelsLast = False,
    train_size: options.TrainSize = None,
    option: options.Options = None,
    config: options.Config = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes. [dim]Default: one per core; 1 on a GPU.[/]")
    ] = None,
    output: options.Output = None,
    timing: Annotated[bool, typer.Option(help="Measure the time of a step, too.")] = True,
    as_json: options.AsJson = False,
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
    from anybatch.tools.compare import check_data, table, train_runs
    from anybatch.tools.data import load
    from anybatch.tools.processes import locked
    from anybatch.tools.timing import time_steps

    start = time.perf_counter()
    given = read_settings(context, config)
    comparison = _comparison(given)
    folder = results_folder(given, f"compare-{comparison.base.data_name}")
    loaded = load(comparison.base)  # wrong data are found before anything is trained
    check_data(comparison, loaded)
    with locked(folder):
        workers = count_workers(given["workers"], given["device"])
        with progress_bars(given["as_json"]) as bars:
            show = show_runs(bars, comparison.runs())
            results = train_runs(comparison.runs(), folder, workers, show)
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
        print_file(folder / "results.json")
        return
    console.print(report.comparison_table(outcome))
    print_lines(filter(None, report.advice(outcome)))
    print_path("report", page)


def _comparison(given: dict[str, Any]) -> "Comparison":
    from anybatch.tools.compare import Comparison

    chosen = named_methods(given)
    own = options_of(chosen, given)
    return Comparison(
        base=build_run(given),
        methods=tuple(dict.fromkeys(chosen)),
        seeds=parse_seeds(str(given["seeds"])),
        target_batch_size=given["target_batch_size"],
        options=tuple(own.items()),
        centralize=given["centralize"],
    )
