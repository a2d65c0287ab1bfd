"""Progress bars of the commands."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from anybatch.cli.console import errors


def progress_bars(quiet: bool) -> Progress:
    """Return progress bars on the error stream; none if quiet."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
        disable=quiet,
    )


def show_parts(bars: Progress, where: str = "") -> Callable[[str, int, int], None]:
    """Return what shows a bar for each part of the work."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(where + what, total=total)
        bars.update(tasks[what], completed=done)

    return show


def show_runs(bars: Progress, trained: Iterable[Any]) -> Callable[[str, int, Any], None]:
    """Return what shows a bar for all epochs, and one for each run under way.

    Each run has a key, a label, a seed and epochs.
    """
    runs = {run.key: run for run in trained}
    total = bars.add_task("[bold]all epochs[/]", total=sum(run.epochs for run in runs.values()))
    done = dict.fromkeys(runs, 0)
    tasks: dict[str, Any] = {}

    def show(key: str, epochs: int, row: Any) -> None:
        run = runs[key]
        done[key] = max(done[key], epochs)
        bars.update(total, completed=sum(done.values()))
        if row is None and key not in tasks:
            tasks[key] = bars.add_task(f"{run.label}, seed {run.seed}", total=run.epochs)
        if key in tasks:
            bars.update(tasks[key], completed=done[key], visible=row is None)

    return show
