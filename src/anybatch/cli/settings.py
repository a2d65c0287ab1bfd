"""Settings of the commands, from options as typed and from files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from anybatch.core.arguments import check_count

if TYPE_CHECKING:
    from anybatch.tools.run import Option, Run


_Number = TypeVar("_Number", int, float)


def read_settings(context: typer.Context, config: Path | None) -> dict[str, Any]:
    """Return a command's options: those typed, then those of the file, then the defaults."""
    from anybatch.tools.config import read_config

    given: dict[str, Any] = dict(context.params)
    given.pop("config", None)
    if config is None:
        return given
    read = {name.replace("-", "_"): value for name, value in read_config(config).items()}
    typed = {p.opts[0].lstrip("-").replace("-", "_"): p.name for p in context.command.params}
    for option, value in read.items():
        name = typed.get(option)
        if name is None or name not in given:
            known = ", ".join(sorted(one for one, name in typed.items() if name in given))
            raise ValueError(f"config={str(config)!r}: {option}={value!r} is none of {known}")
        source = context.get_parameter_source(name)
        if source is None or source.name == "DEFAULT":
            given[name] = _checked(name, value, given[name])
    for name in ("methods", "seeds", "candidates", "batch_sizes"):
        if isinstance(given.get(name), list):
            given[name] = ",".join(map(str, given[name]))
    return given


def _checked(name: str, value: Any, usual: Any) -> Any:
    """A value of a file; one of the default's type where that is a flag, a number or text."""
    if name == "option":
        return [value] if isinstance(value, str) else value
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if type(usual) is str and type(value) in (int, float):  # as in seeds = 3
        return str(value)
    kind = kinds.get(type(usual))
    fits = type(value) is type(usual) or (type(usual) is float and type(value) is int)
    if kind is not None and not fits and not isinstance(value, list):
        raise ValueError(f"config: {name}={value!r}: give {kind}")
    if name in ("root", "model", "output", "checkpoint") and not isinstance(value, str | None):
        raise ValueError(f"config: {name}={value!r}: give text")
    return value


def build_run(given: dict[str, Any]) -> "Run":
    """Return the run of a command's options; its method is torch's batch norm."""
    from anybatch.tools.run import Run

    model = given["model"] or usual_model(given["data"])
    names = ("data", "root", "batch_size", "norm_batch_size", "accumulate", "epochs")
    more: tuple[str, ...] = ("device", "precision", "channels_last", "train_size")
    check_device(given["device"])
    if "lr" in given:
        more += ("lr",)
    return Run(model=model, **{name: given[name] for name in (*names, *more)})


def usual_model(data: str) -> str:
    """Return the network for data where none is named."""
    return "mlp" if data == "digits" else "resnet8"


def results_folder(given: dict[str, Any], usual: str) -> Path:
    """Return the folder of a command's results, which is made: the one typed, or one in runs."""
    from anybatch.tools.report_files import output_folder

    return output_folder(Path(given["output"] or f"runs/{usual}"))


def build_method_run(given: dict[str, Any], doing: str) -> "Run":
    """Return the run of a command that takes one method, with the method's options.

    `doing` says what the command does with the method, as in "trained", for the error.

    Raises:
        ValueError: For an option of another method.
    """
    method = given["method"].lower()
    options = method_options(given, method, f"the method {doing}")
    return build_run(given).but(
        method=method, seed=given["seed"], centralize=given["centralize"], options=options
    )


def method_options(given: dict[str, Any], method: str, whose: str) -> "tuple[Option, ...]":
    """Return the options that were typed, all of them of one method."""
    from anybatch.tools.config import parse_options

    options = parse_options(given["option"] or [])
    if wrong := ", ".join(sorted(set(options) - {method})):
        raise ValueError(f"option={wrong}: {whose} is {method!r}")
    return options.get(method, ())


def check_device(name: str) -> None:
    """Check that torch can use a device.

    Raises:
        ValueError: If it cannot.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r}: {reason}; 'cpu' always works") from error


def limit_threads(device: str) -> None:
    """Let torch use at most two threads on a CPU: at small batches more of them cost time."""
    import torch

    if device == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), 2))


def named_methods(given: dict[str, Any]) -> tuple[str, ...]:
    """Return the methods that were named, or those for small batches."""
    from anybatch.tools.compare import DEFAULT_METHODS

    names = given["methods"]
    return DEFAULT_METHODS if names is None else parse_names(names)


def parse_names(text: str) -> tuple[str, ...]:
    """Parse names with commas, in lower case."""
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def options_of(chosen: tuple[str, ...], given: dict[str, Any]) -> "dict[str, tuple[Option, ...]]":
    """Return the options of the methods that were named."""
    from anybatch.tools.config import parse_options

    options = parse_options(given["option"] or [])
    for name in options:
        if name not in chosen:
            raise ValueError(f"option={name!r}: it is none of the methods {', '.join(chosen)}")
    return options


def parse_numbers(name: str, text: str, kind: type[_Number], example: str) -> tuple[_Number, ...]:
    """Parse numbers of a kind, separated by commas; the name and a valid text are for the error."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: give numbers with commas, as in {example}") from error


def parse_counts(name: str, text: str, example: str) -> tuple[int, ...]:
    """Parse whole numbers from 1 on, separated by commas; each counts once."""
    numbers = parse_numbers(name, text, int, example)
    if min(numbers) < 1:
        raise ValueError(f"{name}={text!r}: give numbers from 1 on")
    return tuple(dict.fromkeys(numbers))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse how many seeds, as in 3, or which, as in 0,1,2.

    Raises:
        ValueError: For anything else.
    """
    numbers = parse_numbers("seeds", text, int, "0,1,2, or how many")
    if len(numbers) > 1:
        return numbers
    if numbers[0] < 1:
        raise ValueError(f"seeds={text!r}: give 1 or more, or the seeds with commas")
    return tuple(range(numbers[0]))


def count_workers(workers: int | None, device: str) -> int:
    """Return the number of processes: as given, or one per core on a CPU and one on a GPU.

    Raises:
        ValueError: For a number below 1.
    """
    if workers is not None:
        check_count("workers", workers)
        return workers
    return max(os.cpu_count() or 1, 1) if device == "cpu" else 1
