"""The command line: one module per command."""

import sys

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:  # the library itself needs neither
    sys.stderr.write(
        f"anybatch: the command line needs {error.name}: pip install 'anybatch[tools]'\n"
    )
    raise SystemExit(2) from error

from anybatch.cli.bench import bench
from anybatch.cli.compare import compare
from anybatch.cli.console import start
from anybatch.cli.diagnose import diagnose
from anybatch.cli.methods import methods
from anybatch.cli.train import train
from anybatch.cli.tune import tune

__all__ = ["app", "main"]

app = typer.Typer(
    name="anybatch",
    help="Batch normalization that works at any batch size.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (compare, train, tune, bench, diagnose, methods):
    app.command()(command)


def main() -> None:
    """Run the command line."""
    start(app)
