"""Options that several commands share, and what a shell completes for them.

`anybatch.tools` is imported only when it is needed, as everywhere in the command line.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from anybatch.registry import METHODS


def starting_with(incomplete: str, choices: Iterable[str]) -> list[str]:
    """Return the choices that begin with what was typed."""
    return [choice for choice in choices if choice.startswith(incomplete)]


def _completing(module: str, names: str) -> Callable[[str], list[str]]:
    """Return a function that completes the names that a module lists."""

    def complete(incomplete: str) -> list[str]:
        return starting_with(incomplete, getattr(import_module(module), names))

    return complete


_complete_data = _completing("anybatch.tools.run", "DATA")
_complete_precision = _completing("anybatch.tools.run", "PRECISIONS")
complete_model = _completing("anybatch.tools.networks", "MODELS")
complete_metric = _completing("anybatch.evaluation.example_weight_search", "METRICS")


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Complete short names of methods, with their titles; torch is torch's own batch norm."""
    from anybatch.tools.run import BASELINE

    known = {name: method.title for name, method in METHODS.items()}
    known[BASELINE] = "torch's batch norm"
    return [(name, known[name]) for name in starting_with(incomplete, known)]


def complete_methods(incomplete: str) -> list[tuple[str, str]]:
    """Complete the last of several short names, with one that is not there yet."""
    there, comma, last = incomplete.rpartition(",")
    names = [name for name in starting_with(last, METHODS) if name not in there.split(",")]
    return [(f"{there}{comma}{name}", METHODS[name].title) for name in names]


def complete_option(incomplete: str) -> list[str]:
    """Complete METHOD.NAME= for every option of every method."""
    return starting_with(
        incomplete, (f"{m.name}.{n}=" for m in METHODS.values() for n in m.options)
    )


_DATA = (
    "digits, cifar10, cifar100, imagefolder, imagenet or npz; or your own: file.py:function, "
    "which returns (train, test)."
)
_METHOD = "Short name of the method, or torch for torch's batch norm."
Data = Annotated[str, typer.Option(help=_DATA, autocompletion=_complete_data)]
TunedData = Annotated[
    str | None,
    typer.Option(
        help=f"{_DATA} [dim]Default: the checkpoint's, or digits.[/]", autocompletion=_complete_data
    ),
]
Method = Annotated[str, typer.Option(help=_METHOD, autocompletion=complete_method)]
TunedMethod = Annotated[
    str | None,
    typer.Option(
        help=f"{_METHOD} [dim]Default: the checkpoint's, or torch.[/]",
        autocompletion=complete_method,
    ),
]
Seed = Annotated[int, typer.Option(help="Of weights, order, noise and augmentation.")]
Rounds = Annotated[int, typer.Option(help="Rounds, in each of which every method has a turn.")]
Root = Annotated[str | None, typer.Option(help="Folder or file of the data (not for digits).")]
Model = Annotated[
    str | None,
    typer.Option(
        help="mlp, resnet8, resnet20, resnet56, resnet18, resnet34, resnet50, vgg11, vgg16, "
        "torchvision:NAME or timm:NAME; or your own: file.py:function. "
        "[dim]Default: mlp for digits, else resnet8.[/]",
        autocompletion=complete_model,
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
    bool, typer.Option("--centralize", help="Centralize weights before norms, whatever the method.")
]
LearningRate = Annotated[
    float, typer.Option(help="Learning rate for 64 examples; it is scaled with the batch size.")
]
Epochs = Annotated[int, typer.Option(help="Passes over the training set.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Precision = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16 (autocast).", autocompletion=_complete_precision
    ),
]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="Weights and outputs with channels last.")
]
TrainSize = Annotated[int | None, typer.Option(help="Use only so many training examples.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="An option of a method, as in mabn.window=8; repeatable.",
        autocompletion=complete_option,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Short names, with commas. [dim]Default: those for small batches.[/]",
        autocompletion=complete_methods,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML or JSON file of these options; those that are typed come first."),
]
Output = Annotated[Path | None, typer.Option(help="Folder of the results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
