"""The command line: one module per command."""

import sys

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:  # the library itself needs neither
    sys.stderr.write(
        f"anybatch: the command line needs {error.name}: pip install 'anybatch[tools]'\n"
    )
    raise SystemExit(2) from error

from anybatch.cli.application import app, main

__all__ = ["app", "main"]
