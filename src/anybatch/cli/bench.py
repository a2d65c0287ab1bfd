"""``anybatch bench``: measure what each method costs in a network."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli import options
from anybatch.cli.console import (
    console,
    plain_errors,
    print_file,
    print_lines,
    print_path,
    typed_command,
)
from anybatch.cli.progress import progress_bars, show_parts
from anybatch.cli.settings import (
    check_device,
    named_methods,
    options_of,
    parse_counts,
    read_settings,
    results_folder,
)

if TYPE_CHECKING:
    from anybatch.tools.bench import Bench, Variant


@plain_errors()
def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="module:factory of your own, mine.py:factory, or a network of anybatch compare.",
            autocompletion=options.complete_model,
        ),
    ] = "resnet8",
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of what the network takes, batch first, as in 2x3x224x224; once for each "
            "input. [dim]Default: 2x3x32x32, or 2x64 for mlp.[/]"
        ),
    ] = None,
    methods: options.Methods = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Batch sizes with commas. [dim]Default: the input's first number.[/]"),
    ] = None,
    device: options.Device = "cpu",
    precision: options.Precision = "float32",
    channels_last: options.ChannelsLast = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile each network by torch.compile.")
    ] = False,
    rounds: options.Rounds = 15,
    option: options.Options = None,
    config: options.Config = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV and nothing else.")] = False,
) -> None:
    """Measure what each method would cost in a network: time, memory, inference.

    In one of yours, which network() in mine.py makes:

        anybatch bench --model mine.py:network --input 2x3x224x224 --batch-sizes 2,32

    In one of torchvision's, on a GPU:

        anybatch bench --model torchvision.models:resnet50 --input 2x3x224x224 --device cuda
        --precision bfloat16 --channels-last
    """
    from anybatch.tools import bench_report
    from anybatch.tools.bench import costs

    start = time.perf_counter()
    given = read_settings(context, config)
    if given["as_json"] and given["as_csv"]:
        raise ValueError("csv=True: give one of --json and --csv")
    variants, benches = _variants(given), _benches(given)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in given["model"])
    folder = results_folder(given, f"bench-{name}")
    quiet, found = given["as_json"] or given["as_csv"], []
    with progress_bars(quiet) as bars:
        for one in benches:
            show = show_parts(bars, f"batch {one.examples}: ")
            found.append(costs(one, variants, show))
            seconds = time.perf_counter() - start
            outcome = bench_report.FinishedBench(
                benches[: len(found)], found, typed_command(), seconds
            )
            page = bench_report.write(outcome, folder)
    if given["as_json"]:
        print_file(folder / "bench.json")
        return
    if given["as_csv"]:
        print_file(folder / "bench.csv")
        return
    for one, cost in zip(outcome.benches, outcome.found, strict=True):
        console.print(bench_report.costs_table(one, cost))
        print_lines(f"{name} could not be measured: {why}" for name, why in cost.failed.items())
    print_path("report", page)


def _variants(given: dict[str, Any]) -> "dict[str, Variant]":
    """The methods of `bench`, with their options."""
    from anybatch.registry import get_method
    from anybatch.tools.bench import Variant

    chosen = named_methods(given)
    if not chosen:
        raise ValueError(f"methods={given['methods']!r}: give one or more")
    own = options_of(chosen, given)
    for name in chosen:
        get_method(name).check_options(dict(own.get(name, ())))
    return {name: Variant(name, own.get(name, ())) for name in dict.fromkeys(chosen)}


def _benches(given: dict[str, Any]) -> "list[Bench]":
    """Return the settings of the measurements, one per batch size."""
    from anybatch.tools.bench import Bench
    from anybatch.tools.network_factory import example_shape, factory

    check_device(given["device"])
    typed = given["input"]
    typed = [typed] if isinstance(typed, str) else typed
    usual = example_shape(given["model"])
    if not typed:
        make = factory(given["model"])
        if usual is None:
            raise ValueError(
                f"input=None: say what {given['model']!r} takes, as in --input 2x3x224x224"
            )
        shapes = [(2, *usual)]
    else:
        shapes = [_parse_shape(text) for text in typed]
        make = factory(given["model"], shapes[0][1:])
    sizes: list[int | None] = [None]
    if given["batch_sizes"] is not None:
        sizes = list(parse_counts("batch_sizes", str(given["batch_sizes"]), "2,32"))
    return [
        Bench(
            Path(given["model"]).name,
            make,
            tuple(shapes),
            size,
            given["device"],
            given["precision"],
            given["channels_last"],
            "compiled" if given["compile"] else "eager",
            given["rounds"],
        )
        for size in sizes
    ]


def _parse_shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError as error:
        raise ValueError(f"input={text!r}: give a shape, as in 2x3x224x224") from error
    if min(shape) < 1:
        raise ValueError(f"input={text!r}: give sizes from 1 on")
    return shape
