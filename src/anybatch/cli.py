"""The command line: compare methods, train one, what they cost, diagnose or tune a network."""

import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from anybatch.registry import METHODS

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as error:  # the library itself needs neither
    sys.stderr.write(
        f"anybatch: the command line needs {error.name}: pip install 'anybatch[experiments]'\n"
    )
    raise SystemExit(2) from error

if TYPE_CHECKING:
    from anybatch.experiments.bench import Bench, Variant
    from anybatch.experiments.compare import Comparison
    from anybatch.experiments.config import Option, Run
    from anybatch.experiments.jobs import Job
    from anybatch.experiments.reproduction import Reproduction, Task
    from anybatch.experiments.store import Row as StoredRow
    from anybatch.experiments.training import Row

INTERRUPTED = 130
_asked = threading.Event()  # to stop
_Command = TypeVar("_Command", bound=Callable[..., None])
console = Console()
errors = Console(stderr=True)

app = typer.Typer(
    name="anybatch",
    help="Batch normalization that works at any batch size: experiments.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _plain_errors(command: _Command) -> _Command:
    """Turn a wrong argument into one line and exit code 2, Ctrl-C into 130, a full disk into 1."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise _interrupted() from error
        except Exception as error:
            if _asked.is_set():  # an import that is interrupted may fail in its own way
                raise _interrupted() from error
            if isinstance(error, ValueError | TypeError):
                errors.print(f"[bold red]error[/]  {_escape(str(error))}", soft_wrap=True)
                raise typer.Exit(2) from error
            if isinstance(error, OSError):  # a full disk, a folder that is gone
                errors.print(
                    f"[bold red]error[/]  {_escape(str(error))}; what is done is kept. "
                    f"To go on: [bold]{_escape(_typed())}[/]",
                    soft_wrap=True,
                )
                raise typer.Exit(1) from error
            raise

    return guarded  # type: ignore[return-value]


def _interrupted() -> typer.Exit:
    errors.print(
        f"\nstopped; what is done is kept. To go on: [bold]{_escape(_typed())}[/]", soft_wrap=True
    )
    return typer.Exit(INTERRUPTED)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _typed() -> str:
    """The command as it was typed."""
    return shlex.join(["anybatch", *sys.argv[1:]])


# What a shell completes. `anybatch.experiments` is imported when it is needed, as everywhere here.


def _beginning(incomplete: str, choices: Iterable[str]) -> list[str]:
    return [choice for choice in choices if choice.startswith(incomplete)]


def _complete_data(incomplete: str) -> list[str]:
    from anybatch.experiments.config import TASKS

    return _beginning(incomplete, TASKS["classification"])


def _complete_model(incomplete: str) -> list[str]:
    from anybatch.experiments.config import MODELS

    return _beginning(incomplete, MODELS)


def _complete_precision(incomplete: str) -> list[str]:
    from anybatch.experiments.config import PRECISIONS

    return _beginning(incomplete, PRECISIONS)


def _complete_metric(incomplete: str) -> list[str]:
    from anybatch.evaluation.example_weight_search import METRICS

    return _beginning(incomplete, METRICS)


def _complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Short names with what the methods do; torch is torch's own batch norm."""
    from anybatch.experiments.config import BASELINE

    known = {name: method.title for name, method in METHODS.items()}
    known[BASELINE] = "torch's batch norm"
    return [(name, known[name]) for name in _beginning(incomplete, known)]


def _complete_methods(incomplete: str) -> list[tuple[str, str]]:
    """Short names with commas: the last one, of those that are not there yet."""
    there, comma, last = incomplete.rpartition(",")
    names = [name for name in _beginning(last, METHODS) if name not in there.split(",")]
    return [(f"{there}{comma}{name}", METHODS[name].title) for name in names]


def _complete_option(incomplete: str) -> list[str]:
    """METHOD.NAME= for every option of every method."""
    return _beginning(incomplete, (f"{m.name}.{n}=" for m in METHODS.values() for n in m.options))


Data = Annotated[
    str,
    typer.Option(
        help="digits, cifar10, cifar100, imagefolder, imagenet or npz.",
        autocompletion=_complete_data,
    ),
]
TunedData = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, cifar100, imagefolder, imagenet or npz. "
        "[dim]Default: the checkpoint's, or digits.[/]",
        autocompletion=_complete_data,
    ),
]
Root = Annotated[str | None, typer.Option(help="Folder or file of the data (not for digits).")]
Model = Annotated[
    str | None,
    typer.Option(
        help="mlp, resnet8, resnet20, resnet56, resnet18, resnet34, resnet50, vgg11, vgg16, "
        "densenet121, mobilenetv2, inceptionv3, torchvision:NAME or timm:NAME. "
        "[dim]Default: mlp for digits, else resnet8.[/]",
        autocompletion=_complete_model,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Examples in a step.")]
NormBatchSize = Annotated[
    int | None, typer.Option(help="Examples that share statistics. [dim]Default: the batch.[/]")
]
Accumulate = Annotated[
    int, typer.Option(help="Micro-batches that a step's examples come in (gradient accumulation).")
]
Centralize = Annotated[
    bool,
    typer.Option("--centralize", help="Centralize weights before norms, whatever the method."),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training set.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Precision = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16 (autocast).", autocompletion=_complete_precision
    ),
]
TrainSize = Annotated[int | None, typer.Option(help="Use only so many training examples.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="An option of a method, as in mabn.window=8; repeatable.",
        autocompletion=_complete_option,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Short names, with commas. [dim]Default: those for small batches.[/]",
        autocompletion=_complete_methods,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML or JSON file of these options; those that are typed come first."),
]
Output = Annotated[Path | None, typer.Option(help="Folder of the results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command()
@_plain_errors
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
    seeds: Annotated[
        str, typer.Option(help="How many, or which with commas, as in 3 or 0,1,2.")
    ] = "3",
    device: Device = "cpu",
    precision: Precision = "float32",
    train_size: TrainSize = None,
    option: Options = None,
    config: Config = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes. [dim]Default: one a core; 1 on a GPU.[/]")
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

    Stopped, it goes on where it was when started again with the same command.
    """
    import torch

    from anybatch.experiments import report
    from anybatch.experiments.compare import locked, run_all, table
    from anybatch.experiments.data import load, steps_per_epoch
    from anybatch.experiments.files import output_folder
    from anybatch.experiments.timing import time_steps

    start = time.perf_counter()
    given = _settings(context, config)
    comparison = _comparison(given)
    folder = output_folder(Path(given["output"] or f"runs/compare-{comparison.base.data}"))
    loaded = load(comparison.base)  # wrong data are found before anything is trained
    for run in comparison.runs():
        steps_per_epoch(run, loaded)
    with locked(folder):
        with _bars(given["as_json"]) as bars:
            show = _progress(bars, comparison.runs())
            results = run_all(comparison, folder, _workers(given), show)
        times = {}
        if given["timing"]:
            timed = {r: runs[0] for r, runs in comparison.groups().items() if r != "target"}
            quiet = nullcontext() if given["as_json"] else errors.status("timing a step")
            if comparison.base.device == "cpu":
                torch.set_num_threads(1)  # as the runs had
            with quiet:
                times = time_steps(timed, loaded)
        outcome = report.Outcome(
            comparison,
            table(comparison, results),
            results,
            times,
            _typed(),
            time.perf_counter() - start,
        )
        page = report.write_report(outcome, folder)
    if given["as_json"]:
        print((folder / "results.json").read_text(encoding="utf-8"), end="")
        return
    console.print(report.terminal_table(outcome))
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)


@app.command()
@_plain_errors
def train(
    context: typer.Context,
    method: Annotated[
        str,
        typer.Option(
            help="Short name of the method, or torch for torch's batch norm.",
            autocompletion=_complete_method,
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
    import torch

    from anybatch.experiments.compare import locked
    from anybatch.experiments.config import parse_options
    from anybatch.experiments.files import output_folder
    from anybatch.experiments.training import train as train_run

    given = _settings(context, config)
    options = parse_options(given["option"] or [])
    if set(options) - {given["method"]}:
        wrong = ", ".join(sorted(set(options) - {given["method"]}))
        raise ValueError(f"option={wrong}: the method trained is {given['method']!r}")
    run = _run(given).but(
        method=given["method"],
        seed=given["seed"],
        centralize=given["centralize"],
        options=options.get(given["method"], ()),
    )
    folder = output_folder(Path(given["output"] or f"runs/train-{run.data}"))
    if run.device == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), 2))

    def show(done: int, row: "Row") -> None:
        if not given["as_json"]:
            loss = "not finite" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
            bars.console.print(
                f"epoch {done:3d}  train loss {loss}  held-out accuracy "
                f"{100 * row['accuracy']:.2f} %  {row['seconds']:.1f} s",
                highlight=False,
            )
        bars.update(bar, completed=done)

    with locked(folder), _bars(given["as_json"]) as bars:
        bar = bars.add_task(run.label, total=run.epochs)
        row = train_run(run, folder, show, keep_weights=True)
    if given["as_json"]:
        print(json.dumps(row, indent=2))
        return
    console.print(f"held-out accuracy [bold]{100 * row['accuracy']:.2f} %[/]  ({run.label})")
    path = (folder / "runs" / f"{run.key}.json").resolve()
    console.print(f"result  {path}", soft_wrap=True, highlight=False)
    console.print(f"weights {path.with_suffix('.pt')}", soft_wrap=True, highlight=False)


@app.command()
@_plain_errors
def tune(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Of anybatch train, or a file with a state_dict.")
    ],
    data: TunedData = None,
    root: Root = None,
    model: Model = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Short name of the method, or torch for torch's batch norm. "
            "[dim]Default: the checkpoint's, or torch.[/]",
            autocompletion=_complete_method,
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="loss, top1 or top5.", autocompletion=_complete_metric)
    ] = "loss",
    candidates: Annotated[
        str | None, typer.Option(help="Example weights with commas. [dim]Default: 16 of them.[/]")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option(help="Take running statistics from the training examples first.")
    ] = False,
    device: Device = "cpu",
    option: Options = None,
    config: Config = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Find the example weight with which a trained network does best.

    Tuned on one half of the held-out examples, reported on the other:

        anybatch tune runs/train-digits/runs/*.pt

    A checkpoint of your own, of one of the networks here:

        anybatch tune weights.pt --data cifar10 --root data/cifar10 --model resnet18
    """
    from anybatch.core.arguments import check_choice
    from anybatch.evaluation.example_weight_search import METRICS
    from anybatch.experiments import tuning
    from anybatch.experiments.config import parse_options
    from anybatch.experiments.files import output_folder

    given = _settings(context, config)
    check_choice("metric", given["metric"], METRICS)
    _check_device(given["device"])
    stored, state = tuning.read_checkpoint(checkpoint)
    options = parse_options(given["option"] or [])
    network = {name: given[name] for name in ("data", "root", "model", "method")}
    typed = {name: value for name, value in network.items() if value is not None}
    run = _tuned_run(stored, typed, given["device"])
    if options:
        wrong = ", ".join(sorted(set(options) - {run.method}))
        if wrong:
            raise ValueError(f"option={wrong}: the network's method is {run.method!r}")
        run = run.but(options=options[run.method])
    folder = output_folder(Path(given["output"] or f"runs/tune-{run.data}"))
    shown = False if given["as_json"] else None
    weights = None if given["candidates"] is None else _numbers(str(given["candidates"]))
    outcome = tuning.tune(
        run, checkpoint, state, given["metric"], weights, given["recalibrate"], shown, _typed()
    )
    page = tuning.write(outcome, folder)
    if given["as_json"]:
        print((folder / "tune.json").read_text(encoding="utf-8"), end="")
        return
    names = list(outcome.tuned.curves)
    print(f"{outcome.tuned}\n")
    table = Table(title=f"on {outcome.test.examples} other examples")
    for column in ("network", "example weight", *names):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in tuning.judged_rows(outcome):
        table.add_row(*row)
    console.print(table)
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)


@app.command()
@_plain_errors
def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="module:factory of your own, mine.py:factory, or a network of anybatch compare.",
            autocompletion=_complete_model,
        ),
    ] = "resnet8",
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of what the network takes, batch first, as in 2x3x224x224; once for each "
            "input. [dim]Default: 2x3x32x32, or 2x64 for mlp.[/]"
        ),
    ] = None,
    methods: Methods = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Batch sizes with commas. [dim]Default: the input's first number.[/]"),
    ] = None,
    device: Device = "cpu",
    precision: Precision = "float32",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Weights and inputs with channels last.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile each network by torch.compile.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(help="Rounds, in each of which every method has a turn.")
    ] = 15,
    option: Options = None,
    config: Config = None,
    output: Output = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV and nothing else.")] = False,
) -> None:
    """Measure what each method would cost in a network: time, memory, inference.

    In one of yours, which network() in mine.py makes:

        anybatch bench --model mine.py:network --input 2x3x224x224 --batch-sizes 2,32

    In one of torchvision's, on a GPU:

        anybatch bench --model torchvision.models:resnet50 --input 2x3x224x224 --device cuda
        --precision bfloat16 --channels-last
    """
    from anybatch.experiments import bench_report
    from anybatch.experiments.bench import costs
    from anybatch.experiments.files import output_folder

    start = time.perf_counter()
    given = _settings(context, config)
    if given["as_json"] and given["as_csv"]:
        raise ValueError("csv=True: give one of --json and --csv")
    variants, benches = _variants(given), _benches(given)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in given["model"])
    folder = output_folder(Path(given["output"] or f"runs/bench-{name}"))
    quiet, found = given["as_json"] or given["as_csv"], []
    with _bars(quiet) as bars:
        for one in benches:
            show = _progress_of_parts(bars, f"batch {one.examples}: ")
            found.append(costs(one, variants, show))
            seconds = time.perf_counter() - start
            outcome = bench_report.Outcome(benches[: len(found)], found, _typed(), seconds)
            page = bench_report.write(outcome, folder)
    if given["as_json"]:
        print((folder / "bench.json").read_text(encoding="utf-8"), end="")
        return
    if given["as_csv"]:
        print((folder / "bench.csv").read_text(encoding="utf-8"), end="")
        return
    for one, cost in zip(outcome.benches, outcome.found, strict=True):
        console.print(bench_report.terminal_table(one, cost))
        for method, reason in cost.failed.items():
            console.print(f"{method} could not be measured: {reason}", markup=False)
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)


@app.command()
@_plain_errors
def diagnose(
    context: typer.Context,
    data: Data = "digits",
    root: Root = None,
    model: Model = None,
    method: Annotated[
        str,
        typer.Option(
            help="Short name of the method, or torch for torch's batch norm.",
            autocompletion=_complete_method,
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

        anybatch diagnose --data imagefolder --root pictures --model resnet18
        --checkpoint weights.pt --batch-size 8
    """
    import torch

    from anybatch.experiments import diagnosis
    from anybatch.experiments.config import parse_options
    from anybatch.experiments.files import output_folder

    given = _settings(context, config)
    options = parse_options(given["option"] or [])
    if set(options) - {given["method"]}:
        wrong = ", ".join(sorted(set(options) - {given["method"]}))
        raise ValueError(f"option={wrong}: the method diagnosed is {given['method']!r}")
    epochs = given["epochs"] if given["checkpoint"] is None else 0
    if epochs < 0:
        raise ValueError(f"epochs={epochs}: give a number from 0 on")
    run = _run({**given, "epochs": max(epochs, 1)}).but(
        method=given["method"],
        seed=given["seed"],
        centralize=given["centralize"],
        options=options.get(given["method"], ()),
    )
    folder = output_folder(Path(given["output"] or f"runs/diagnose-{run.data}"))
    if run.device == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), 2))
    weights = None if given["checkpoint"] is None else Path(given["checkpoint"])
    with _bars(given["as_json"]) as bars:
        show = _progress_of_parts(bars)
        found = diagnosis.diagnose_run(run, epochs, weights, given["max_batches"], show)
    page = diagnosis.write(found, folder)
    if given["as_json"]:
        print((folder / "diagnosis.json").read_text(encoding="utf-8"), end="")
        return
    console.print(diagnosis.terminal_table(found, f"{run.data}, {run.model}, {run.label}"))
    for sentence in (*found.reading.sentences, *found.notes):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)


@app.command()
@_plain_errors
def methods(as_json: AsJson = False) -> None:
    """List the methods, what they do and when to use them."""
    if as_json:
        names = [f.name for f in fields(next(iter(METHODS.values()))) if f.name != "builder"]
        rows = [
            {name: getattr(method, name) for name in names} | {"options": sorted(method.options)}
            for method in METHODS.values()
        ]
        print(json.dumps(rows, indent=2))
        return
    table = Table(show_lines=True)
    for column in ("name", "method", "what it does", "when", "options"):
        table.add_column(column)
    for method in METHODS.values():
        own = [n for n in method.options if n not in ("norm_batch_size", "example_weight")]
        table.add_row(
            f"[bold]{method.name}[/]", method.title, method.summary, method.when, ", ".join(own)
        )
    console.print(table)
    console.print("every method of this library also takes norm_batch_size and example_weight")


def _settings(context: typer.Context, config: Path | None) -> dict[str, Any]:
    """The command's options: those typed, then those of the file, then the defaults."""
    from anybatch.experiments.config import read_config

    given: dict[str, Any] = dict(context.params)
    given.pop("config", None)
    if config is None:
        return given
    read = {name.replace("-", "_"): value for name, value in read_config(config).items()}
    for name, value in read.items():
        if name not in given:
            known = ", ".join(sorted(given))
            raise ValueError(f"config={str(config)!r}: {name}={value!r} is none of {known}")
        source = context.get_parameter_source(name)
        if source is None or source.name == "DEFAULT":
            given[name] = value
    for name in ("methods", "seeds", "candidates", "batch_sizes"):
        if isinstance(given.get(name), list):
            given[name] = ",".join(map(str, given[name]))
    return given


def _run(given: dict[str, Any]) -> "Run":
    from anybatch.experiments.config import Run, classified

    model = given["model"] or ("mlp" if given["data"] == "digits" else "resnet8")
    names = ("data", "root", "batch_size", "norm_batch_size", "accumulate", "epochs")
    more = ("device", "precision", "train_size")
    _check_device(given["device"])
    return classified(Run(model=model, **{name: given[name] for name in (*names, *more)}))


def _tuned_run(stored: "Row | None", given: dict[str, Any], device: str) -> "Run":
    """The run of a checkpoint, with what was typed in its place."""
    from anybatch.experiments.config import BASELINE, Run, classified

    if stored is not None:
        try:
            run = Run.from_dict(stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint: its run is not one of this version ({error})") from error
        if given.get("method", run.method) != run.method:
            run = run.but(options=())
        return classified(run.but(**given, device=device, precision="float32"))
    data = given.get("data", "digits")
    usual = {"model": "mlp" if data == "digits" else "resnet8", "method": BASELINE}
    return classified(Run(**{**usual, **given, "device": device}))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"candidates={text!r}: give numbers with commas, as in 0,0.1") from error


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r}: {reason}; 'cpu' always works") from error


def _named(given: dict[str, Any]) -> tuple[str, ...]:
    """The methods that were named, or those for small batches."""
    from anybatch.experiments.compare import DEFAULT_METHODS

    names = given["methods"]
    return DEFAULT_METHODS if names is None else tuple(filter(None, names.split(",")))


def _options_of(chosen: tuple[str, ...], given: dict[str, Any]) -> "dict[str, tuple[Option, ...]]":
    """The options of the methods that were named."""
    from anybatch.experiments.config import parse_options

    options = parse_options(given["option"] or [])
    for name in options:
        if name not in chosen:
            raise ValueError(f"option={name!r}: it is none of the methods {', '.join(chosen)}")
    return options


def _comparison(given: dict[str, Any]) -> "Comparison":
    from anybatch.experiments.compare import Comparison

    chosen = _named(given)
    options = _options_of(chosen, given)
    return Comparison(
        base=_run(given),
        methods=tuple(dict.fromkeys(chosen)),
        seeds=_seeds(str(given["seeds"])),
        target_batch_size=given["target_batch_size"],
        options=tuple(options.items()),
        centralize=given["centralize"],
    )


def _variants(given: dict[str, Any]) -> "dict[str, Variant]":
    """The methods of `bench`, with their options."""
    from anybatch.experiments.bench import Variant
    from anybatch.registry import get_method

    chosen = _named(given)
    if not chosen:
        raise ValueError(f"methods={given['methods']!r}: give one or more")
    options = _options_of(chosen, given)
    for name in chosen:
        get_method(name).check_options(dict(options.get(name, ())))
    return {name: Variant(name, options.get(name, ())) for name in dict.fromkeys(chosen)}


def _benches(given: dict[str, Any]) -> "list[Bench]":
    """What `bench` measures, one a batch size."""
    from anybatch.experiments.bench import Bench
    from anybatch.experiments.networks import example_shape, factory

    _check_device(given["device"])
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
        shapes = [_shape(text) for text in typed]
        make = factory(given["model"], shapes[0][1:])
    sizes: list[int | None] = [None]
    if given["batch_sizes"] is not None:
        sizes = list(_sizes(str(given["batch_sizes"])))
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


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError as error:
        raise ValueError(f"input={text!r}: give a shape, as in 2x3x224x224") from error
    if min(shape) < 1:
        raise ValueError(f"input={text!r}: give sizes from 1 on")
    return shape


def _sizes(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"batch_sizes={text!r}: give numbers with commas, as in 2,32") from error
    if min(numbers) < 1:
        raise ValueError(f"batch_sizes={text!r}: give numbers from 1 on")
    return tuple(dict.fromkeys(numbers))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"seeds={text!r}: give a number, or numbers with commas") from error
    if len(numbers) > 1 or "," in text:
        return numbers
    if numbers[0] < 1:
        raise ValueError(f"seeds={text!r}: give 1 or more, or the seeds with commas")
    return tuple(range(numbers[0]))


def _workers(given: dict[str, Any]) -> int:
    import os

    if given["workers"] is not None:
        if given["workers"] < 1:
            raise ValueError(f"workers={given['workers']}: give 1 or more")
        return int(given["workers"])
    return max(os.cpu_count() or 1, 1) if given["device"] == "cpu" else 1


def _bars(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
        disable=quiet,
    )


def _progress_of_parts(bars: Progress, where: str = "") -> Callable[[str, int, int], None]:
    """A bar for each part of what is done."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(where + what, total=total)
        bars.update(tasks[what], completed=done)

    return show


def _progress(bars: Progress, trained: "Iterable[Job]") -> Callable[[str, int, "Row | None"], None]:
    """A bar for everything, and one for each run that is under way."""
    runs = {run.key: run for run in trained}
    total = bars.add_task("[bold]all epochs[/]", total=sum(run.epochs for run in runs.values()))
    done = dict.fromkeys(runs, 0)
    tasks: dict[str, Any] = {}

    def show(key: str, epochs: int, row: "Row | None") -> None:
        run = runs[key]
        done[key] = max(done[key], epochs)
        bars.update(total, completed=sum(done.values()))
        if row is None and key not in tasks:
            tasks[key] = bars.add_task(f"{run.label}, seed {run.seed}", total=run.epochs)
        if key in tasks:
            bars.update(tasks[key], completed=done[key], visible=row is None)

    return show


# --- what the papers report ------------------------------------------------------


def _complete_reproduction(incomplete: str) -> list[tuple[str, str]]:
    from anybatch.experiments.reproduction import reproductions

    known = {name: f"{one.source}: {one.title}" for name, one in reproductions().items()}
    return [(name, known[name]) for name in _beginning(incomplete, known)]


def _complete_size(incomplete: str) -> list[str]:
    from anybatch.experiments.reproduction import SIZES

    return _beginning(incomplete, SIZES)


@app.command()
@_plain_errors
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Tables and figures, or papers for all of theirs. [dim]Default: all, with "
            "--list or --draw.[/]",
            autocompletion=_complete_reproduction,
        ),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            help="small (two cores, under half an hour each) or paper (its own settings).",
            autocompletion=_complete_size,
        ),
    ] = "small",
    root: Root = None,
    store: Annotated[Path, typer.Option(help="Folder of results, checkpoints and report.")] = Path(
        "runs/reproduce"
    ),
    seeds: Annotated[
        str | None,
        typer.Option(
            help="How many, or which with commas, as in 3 or 0,1,2. "
            "[dim]Default: as many as each table has.[/]"
        ),
    ] = None,
    device: Device = "cpu",
    workers: Annotated[
        int | None, typer.Option(help="Processes. [dim]Default: one a core; 1 on a GPU.[/]")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List what there is, what is done and what it costs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, and train nothing.")
    ] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw what the store holds, and train nothing.")
    ] = False,
    docs: Annotated[
        Path | None,
        typer.Option(help="Folder of the documentation, to write rows, tables and figures into."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the papers' tables and figures again, beside their numbers.

    The key experiment, on a folder with CIFAR-100:

        anybatch reproduce recovery --root data

    What there is, and one of its figures with the paper's settings:

        anybatch reproduce --list

        anybatch reproduce momentum-bn-figure-4 --size paper --root data --device cuda --workers 8

    Stopped, it goes on where it was when started again with the same command.
    """
    from anybatch.experiments import reproduced, reproduced_pages
    from anybatch.experiments.files import output_folder
    from anybatch.experiments.reproduce import ROWS, make, missing, placed
    from anybatch.experiments.reproduction import chosen, reproductions, tasks
    from anybatch.experiments.store import Store

    everything = [] if names else list(reproductions().values())
    if not names and not (list_ or draw or docs):
        raise ValueError("names: give some, as --list shows them, or --draw what the store holds")
    wanted = chosen(names) if names else everything
    numbers = None if seeds is None else _seeds(seeds)
    asked = tasks(wanted, size, numbers)
    rows = Store(store / ROWS).rows()
    count = _workers({"workers": workers, "device": device})
    if list_:
        _list_reproductions(wanted, numbers, rows, device, count, as_json)
        return
    if dry_run:
        _show_tasks(missing(asked, rows), rows, device, count, as_json)
        return
    elsewhere = 0
    folder = output_folder(store)
    if names and not draw:
        _check_device(device)
        here = [placed(task, None if root is None else Path(root), device) for task in asked]
        given = f" --size {size} --device {device}" + ("" if seeds is None else f" --seeds {seeds}")
        with _bars(as_json) as bars:
            show = _progress(bars, [task.run for task in missing(here, rows)])
            made = make(here, folder, count, show, given)
        rows, elsewhere = made.rows, made.elsewhere
    page = reproduced_pages.write_report(wanted, size, rows, folder, _typed())
    if docs is not None:
        for path in reproduced_pages.write_docs(docs, rows):
            errors.print(f"written {path}", soft_wrap=True, highlight=False)
    if as_json:
        print(json.dumps([reproduced.as_data(one, size, rows) for one in wanted], indent=2))
        return
    for one in wanted:
        console.print(reproduced_pages.terminal_table(reproduced_pages.section(one, size, rows)))
    if elsewhere:
        console.print(f"{elsewhere} trainings are made by another process; start again to wait.")
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)


def _list_reproductions(
    wanted: "list[Reproduction]",
    seeds: tuple[int, ...] | None,
    rows: "dict[str, StoredRow]",
    device: str,
    workers: int,
    as_json: bool,
) -> None:
    from anybatch.experiments.reproduce import estimate, missing
    from anybatch.experiments.reproduction import SIZES, tasks

    found = []
    for one in wanted:
        line: dict[str, Any] = {"name": one.name, "source": one.source, "title": one.title}
        for size in SIZES:
            asked = tasks([one], size, seeds)
            left = missing(asked, rows)
            seconds = sum(estimate(task, rows, device) for task in left) / workers
            done = len(asked) - len(left)
            line[size] = {"runs": len(asked), "done": done, "seconds_left": seconds}
        found.append(line)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table(caption=f"runs done, and about how long the others take: {device} x {workers}")
    titled = console.width >= 160  # names are there to be typed: none is cut for its title
    for column in ("name", *SIZES, *(["what"] if titled else [])):
        table.add_column(column, no_wrap=True)
    for line in found:
        sizes = [
            f"{line[s]['done']}/{line[s]['runs']}, {_duration(line[s]['seconds_left'])}"
            for s in SIZES
        ]
        title = [line["title"]] if titled else []
        table.add_row(f"[bold]{line['name']}[/]", *sizes, *title)
    console.print(table)


def _show_tasks(
    left: "list[Task]", rows: "dict[str, StoredRow]", device: str, workers: int, as_json: bool
) -> None:
    from anybatch.experiments.jobs import described
    from anybatch.experiments.reproduce import estimate

    costs = [estimate(task, rows, device) for task in left]
    if as_json:
        lines = [
            {"name": task.name, "settings": task.run.as_dict(), "seconds": cost}
            for task, cost in zip(left, costs, strict=True)
        ]
        print(json.dumps(lines, indent=2))
        return
    table = Table(caption=f"about {_duration(sum(costs) / workers)} in {workers} process(es)")
    for column in ("for", "run", "seed", "data, network", "about"):
        table.add_column(column)
    for task, cost in zip(left, costs, strict=True):
        run = task.run
        table.add_row(task.name, run.label, str(run.seed), described(run), _duration(cost))
    console.print(table)


def _duration(seconds: float) -> str:
    """A time for a person.

    >>> _duration(95), _duration(7300), _duration(200_000)
    ('2 min', '2.0 h', '2.3 days')
    """
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129_600 else f"{seconds / 86_400:.1f} days"


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _stop)
    app()


def _stop(*_: object) -> None:
    """A request to stop, as a scheduler makes it, is Ctrl-C: what is done is kept."""
    _asked.set()
    raise KeyboardInterrupt
