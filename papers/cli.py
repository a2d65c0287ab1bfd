"""``python -m papers``: make the papers' tables and figures again."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli.console import (
    Command,
    console,
    errors,
    plain_errors,
    print_path,
    start,
    typed_command,
)
from anybatch.cli.options import AsJson, Device, Root, starting_with
from anybatch.cli.progress import progress_bars, show_runs
from anybatch.cli.settings import check_device, count_workers, parse_seeds
from anybatch.tools.report_files import terminal_table

if TYPE_CHECKING:
    from papers.reproduction.spec import Reproduction, Task
    from papers.reproduction.store import Row as StoredRow

_YEAR = 365 * 86_400
PROGRAM = "python -m papers"


def _complete_reproduction(incomplete: str) -> list[tuple[str, str]]:
    from papers.reproduction.spec import reproductions

    known = {name: f"{one.source}: {one.title}" for name, one in reproductions().items()}
    return [(name, known[name]) for name in starting_with(incomplete, known)]


def _complete_size(incomplete: str) -> list[str]:
    from papers.reproduction.spec import SIZES

    return starting_with(incomplete, SIZES)


app = typer.Typer(
    name=PROGRAM,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(cls=Command)
@plain_errors(PROGRAM, keeps=True)
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
        int | None, typer.Option(help="Processes. [dim]Default: one per core; 1 on a GPU.[/]")
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

        python -m papers recovery --root data

    What there is, and one of its figures with the paper's settings:

        python -m papers --list

        python -m papers momentum-bn-figure-4 --size paper --root data --device cuda --workers 8

    Stopped, it goes on where it was when started again with the same command.
    """
    from anybatch.tools.report_files import output_folder
    from papers.reproduction import pages
    from papers.reproduction.make import ROWS, make, missing, placed, to_train
    from papers.reproduction.results import as_data
    from papers.reproduction.spec import chosen, reproductions, tasks
    from papers.reproduction.store import Store

    everything = [] if names else list(reproductions().values())
    if not names and not (list_ or draw or docs):
        raise ValueError("names: give some, as --list shows them, or --draw what the store holds")
    wanted = chosen(names) if names else everything
    numbers = None if seeds is None else parse_seeds(seeds)
    asked = tasks(wanted, size, numbers)
    rows = Store(store / ROWS).rows()
    count = count_workers(workers, device)
    if list_:
        _list_reproductions(wanted, numbers, rows, device, count, as_json)
        return
    if dry_run:
        _show_tasks(missing(asked, rows), rows, device, count, as_json)
        return
    elsewhere = 0
    folder = output_folder(store)
    if names and not draw:
        check_device(device)
        here = [placed(task, None if root is None else Path(root), device) for task in asked]
        given = f" --size {size} --device {device}" + ("" if seeds is None else f" --seeds {seeds}")
        with progress_bars(as_json) as bars:
            show = show_runs(bars, [task.run for task in to_train(here, rows, folder)])
            made = make(here, folder, count, show, given)
        rows, elsewhere = made.rows, made.elsewhere
    page = pages.write_report(wanted, size, rows, folder, typed_command(PROGRAM))
    if docs is not None:
        for path in pages.write_docs(docs, rows):
            errors.print(f"written {path}", soft_wrap=True, highlight=False)
    if as_json:
        print(json.dumps([as_data(one, size, rows) for one in wanted], indent=2))
        return
    for one in wanted:
        console.print(pages.section_table(pages.section(one, size, rows)))
    if elsewhere:
        console.print(f"{elsewhere} trainings are made by another process; start again to wait.")
    print_path("report", page)


def _list_reproductions(
    wanted: "list[Reproduction]",
    seeds: tuple[int, ...] | None,
    rows: "dict[str, StoredRow]",
    device: str,
    workers: int,
    as_json: bool,
) -> None:
    from papers.reproduction.make import estimate, missing
    from papers.reproduction.spec import SIZES, tasks

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
    titled = console.width >= 160  # names are typed: none is cut for its title
    table = []
    for line in found:
        sizes = [
            f"{line[s]['done']}/{line[s]['runs']}, {_duration(line[s]['seconds_left'])}"
            for s in SIZES
        ]
        table.append((line["name"], *sizes, *([line["title"]] if titled else [])))
    columns = ("name", *SIZES, *(["what"] if titled else []))
    caption = f"runs done, and about how long the others take: {device} x {workers}"
    console.print(terminal_table(columns, table, caption=caption, left=columns))


def _show_tasks(
    left: "list[Task]", rows: "dict[str, StoredRow]", device: str, workers: int, as_json: bool
) -> None:
    from papers.reproduction.make import estimate
    from papers.reproduction.runs import described

    costs = [estimate(task, rows, device) for task in left]
    if as_json:
        lines = [
            {"name": task.name, "settings": task.run.as_dict(), "seconds": cost}
            for task, cost in zip(left, costs, strict=True)
        ]
        print(json.dumps(lines, indent=2))
        return
    columns = ("for", "run", "seed", "data, network", "about")
    table = [
        (task.name, task.run.label, str(task.run.seed), described(task.run), _duration(cost))
        for task, cost in zip(left, costs, strict=True)
    ]
    caption = f"about {_duration(sum(costs) / workers)} in {workers} process(es)"
    console.print(terminal_table(columns, table, caption=caption, left=columns, wrapped=columns))


def _duration(seconds: float) -> str:
    """A time for a person.

    >>> _duration(95), _duration(7300), _duration(200_000), _duration(2e9)
    ('2 min', '2.0 h', '2.3 days', '63 years')
    """
    if seconds >= _YEAR:
        return f"{seconds / _YEAR:.0f} years" if seconds >= 1.5 * _YEAR else "1 year"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129_600 else f"{seconds / 86_400:.1f} days"


def main() -> None:
    """Run the command line."""
    start(app)
