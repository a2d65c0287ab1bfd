"""``anybatch methods``: list the methods, or show one."""

import json
from dataclasses import fields
from typing import Annotated, Any

import typer

from anybatch.cli.console import console, plain_errors
from anybatch.cli.options import AsJson, complete_methods
from anybatch.registry import METHODS, Method, get_method


@plain_errors()
def methods(
    method: Annotated[
        str | None,
        typer.Argument(help="Short name of a method to show.", autocompletion=complete_methods),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one with its options and the call to make."""
    chosen = None if method is None else get_method(method)
    if as_json:
        print(json.dumps([_data(m) for m in METHODS.values()] if chosen is None else _data(chosen)))
    elif chosen is None:
        _print_list()
    else:
        _print_card(chosen)


def _data(method: Method) -> dict[str, Any]:
    """A method as plain data."""
    names = [f.name for f in fields(method) if f.name != "builder"]
    return {name: getattr(method, name) for name in names} | {"options": sorted(method.options)}


def _print_list() -> None:
    from anybatch.tools.report_files import terminal_table

    columns = ("name", "what it does", "when to use it")
    table = [(method.name, method.summary, method.when) for method in METHODS.values()]
    console.print(terminal_table(columns, table, left=columns, wrapped=columns[1:], ruled=True))
    console.print("anybatch methods NAME shows a method's options and the call to make.")


def _print_card(method: Method) -> None:
    from rich.table import Table
    from rich.text import Text

    card = Table.grid(padding=(0, 2))
    for name, value in _card(method).items():
        card.add_row(Text(name, style="dim"), Text(value))
    console.print(Text(f"{method.name}: {method.title}", style="bold"))
    console.print(card)


def _card(method: Method) -> dict[str, str]:
    """Rows of a method's card."""
    name = method.layer(2).__name__.removesuffix("2d")
    scheduler = "anybatch.NormScheduler(model, total_epochs=...), stepped once an epoch"
    rows = {
        "what it does": method.summary,
        "when to use it": method.when,
        "call": f'model = anybatch.convert(model, "{method.name}")',
        "scheduler": scheduler if method.scheduled else "",
        "wrapper": "anybatch.VirtualDataset, for training" if method.wraps else "",
        "trained network": "keeps its output in evaluation"
        if method.exact_eval
        else "changes its output: train it again",
        "inference": "folds into the layer before it"
        if method.folds
        else "costs more than batch norm",
        "options": _settings({n: p.default for n, p in method.options.items()}),
        "convert sets": _settings(method.suggested),
        "on a trained one": _settings(method.when_trained),
        "layers": "torch.nn.GroupNorm" if method.builder else f"{name}1d, {name}2d, {name}3d",
        "paper": method.paper,
    }
    return {title: text for title, text in rows.items() if text}


def _settings(options: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
