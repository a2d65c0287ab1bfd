"""The application: its commands and ``--version``."""

from typing import Annotated

import typer

from anybatch.cli.bench import bench
from anybatch.cli.check import check
from anybatch.cli.compare import compare
from anybatch.cli.console import Command, Group, start
from anybatch.cli.diagnose import diagnose
from anybatch.cli.methods import methods
from anybatch.cli.train import train
from anybatch.cli.tune import tune

app = typer.Typer(
    name="anybatch",
    cls=Group,
    invoke_without_command=True,
    help="Batch normalization that works at any batch size.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (compare, train, tune, bench, diagnose, methods, check):
    app.command(cls=Command)(command)


@app.callback()
def show_version(
    version: Annotated[bool, typer.Option("--version", help="Show the versions and exit.")] = False,
) -> None:
    """Batch normalization that works at any batch size."""
    if version:
        import torch

        from anybatch.version import __version__

        print(f"anybatch {__version__}, torch {torch.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    start(app)
