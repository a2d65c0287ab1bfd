"""Output, errors and interruption of the commands."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

INTERRUPTED = 130


class _PlainFlags:
    """A command whose help shows no type for flags, which take no value."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command of this library's command lines."""


class Group(_PlainFlags, TyperGroup):
    """A group of commands."""


_stop_requested = threading.Event()
_Command = TypeVar("_Command", bound=Callable[..., None])
console = Console()
errors = Console(stderr=True)


def plain_errors(program: str = "anybatch", keeps: bool = False) -> Callable[[_Command], _Command]:
    """Decorate a command so that errors become one line and an exit code.

    The exit code is 2 for a wrong argument, 130 for Ctrl-C and 1 for a full disk. A command that
    `keeps` what is done goes on there when it is started again.
    """

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
                sys.stdout.flush()  # here, where a closed pipe is no error
            except KeyboardInterrupt as error:
                raise _interrupted(program, keeps) from error
            except Exception as error:
                if _stop_requested.is_set():  # an interrupted import may fail in its own way
                    raise _interrupted(program, keeps) from error
                if isinstance(error, ValueError | TypeError):
                    errors.print(f"[bold red]error[/]  {escape(str(error))}", soft_wrap=True)
                    raise typer.Exit(2) from error
                if isinstance(error, BrokenPipeError):  # whoever reads has read enough
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    raise typer.Exit(0) from error
                if isinstance(error, OSError):  # a full disk, or a folder that was removed
                    why = f"[bold red]error[/]  {escape(str(error))}"
                    _say_how_to_go_on(why, program, keeps)
                    raise typer.Exit(1) from error
                raise

        return guarded  # type: ignore[return-value]

    return decorate


def _interrupted(program: str, keeps: bool) -> typer.Exit:
    _say_how_to_go_on("\nstopped", program, keeps)
    return typer.Exit(INTERRUPTED)


def _say_how_to_go_on(why: str, program: str, keeps: bool) -> None:
    command = escape(typed_command(program))
    how = "what is done is kept. To go on" if keeps else "nothing is kept. To start again"
    errors.print(f"{why}; {how}: [bold]{command}[/]", soft_wrap=True)


def typed_command(program: str = "anybatch") -> str:
    """Return the command as it was typed."""
    return f"{program} {shlex.join(sys.argv[1:])}".rstrip()


def start(application: typer.Typer) -> None:
    """Run an application; a request to stop, as a scheduler sends it, is treated as Ctrl-C."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _stop)
    application()


def _stop(*_: object) -> None:
    _stop_requested.set()
    raise KeyboardInterrupt


def print_file(path: Path) -> None:
    """Print a text file, and nothing else."""
    print(path.read_text(encoding="utf-8"), end="")


def print_path(what: str, path: Path) -> None:
    """Say where a result is."""
    console.print(f"{what}  {path.resolve()}", soft_wrap=True, highlight=False)


def print_lines(lines: Iterable[str], soft_wrap: bool = True) -> None:
    """Print sentences without markup; a softly wrapped one can be copied as it is."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=soft_wrap)
