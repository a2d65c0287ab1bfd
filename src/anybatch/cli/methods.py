"""``anybatch methods``: list the methods, or show one."""

import json
from dataclasses import fields
from typing import Annotated, Any

import typer

from anybatch.cli.console import console, plain_errors
from anybatch.cli.options import AsJson, complete_methods
from anybatch.registry import METHODS, Method, get_method

Name = Annotated[
    str | None,
    typer.Argument(help="Short name. Default: all methods.", autocompletion=complete_methods),
]


@plain_errors()
def methods(name: Name = None, as_json: AsJson = False) -> None:
    """List the methods, or show the one of a short name, with options and the call to make."""
    from anybatch.tools.report_files import terminal_table

    method = None if name is None else get_method(name)
    if as_json:
        print(json.dumps(_data(method) if method else [_data(m) for m in METHODS.values()]))
    elif method:
        _print_card(method)
    else:
        columns = ("name", "what it does", "when to use it")
        table = [(m.name, m.summary, m.when) for m in METHODS.values()]
        console.print(terminal_table(columns, table, left=columns, wrapped=columns[1:], ruled=True))
        console.print("anybatch methods NAME shows a method's options and the call to make.")


def _data(method: Method) -> dict[str, Any]:
    """A method as plain data."""
    names = [f.name for f in fields(method) if f.name != "builder"]
    return {name: getattr(method, name) for name in names} | {"options": sorted(method.options)}


def _print_card(method: Method) -> None:
    from rich.table import Table
    from rich.text import Text

    layer = method.layer(2).__name__.removesuffix("2d")
    card = {
        "what it does": method.summary,
        "when to use it": method.when,
        "call": f'model = anybatch.convert(model, "{method.name}")',
        "scheduler": "anybatch.NormScheduler, stepped once an epoch" if method.scheduled else "",
        "wrapper": "anybatch.VirtualDataset, for training" if method.wraps else "",
        "trained network": "keeps its output" if method.exact_eval else "changes its output",
        "inference": "folds into the layer before"
        if method.folds
        else "costs more than batch norm",
        "options": _settings({name: p.default for name, p in method.options.items()}),
        "convert sets": _settings({**method.suggested, **method.at_start}),
        "on a trained one": _settings(method.when_trained),
        "with norm_batch_size": _settings(method.when_cut),
        "layers": "torch.nn.GroupNorm" if method.builder else f"{layer}1d, {layer}2d, {layer}3d",
        "paper": method.paper,
    }
    grid = Table.grid(padding=(0, 2))
    for title, text in card.items():
        if text:
            grid.add_row(Text(title, style="dim"), Text(text))
    console.print(Text(f"{method.name}: {method.title}", style="bold"))
    console.print(grid)


def _settings(options: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
