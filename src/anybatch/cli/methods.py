"""``anybatch methods``: list the methods."""

import json
from dataclasses import fields

from anybatch.cli.console import console, plain_errors
from anybatch.cli.options import AsJson
from anybatch.registry import METHODS


@plain_errors()
def methods(as_json: AsJson = False) -> None:
    """List the methods, what they do and when to use them."""
    from anybatch.tools.report_files import terminal_table

    if as_json:
        names = [f.name for f in fields(next(iter(METHODS.values()))) if f.name != "builder"]
        rows = [
            {name: getattr(method, name) for name in names} | {"options": sorted(method.options)}
            for method in METHODS.values()
        ]
        print(json.dumps(rows, indent=2))
        return
    columns = ("name", "method", "what it does", "when", "options")
    table: list[tuple[str, ...]] = []
    for method in METHODS.values():
        own = [n for n in method.options if n not in ("norm_batch_size", "example_weight")]
        table.append((method.name, method.title, method.summary, method.when, ", ".join(own)))
    console.print(terminal_table(columns, table, left=columns, wrapped=columns[1:], ruled=True))
    console.print("every method of this library also takes norm_batch_size and example_weight")
