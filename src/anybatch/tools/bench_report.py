"""The report of `anybatch bench`: a table, JSON and CSV, an image, and an HTML page."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anybatch.evaluation.figures import png
from anybatch.registry import get_method
from anybatch.tools import measurement_figures
from anybatch.tools.bench import Bench, Costs
from anybatch.tools.measurements import Measurement, as_csv, surroundings
from anybatch.tools.report_files import terminal_table, write_report
from anybatch.tools.run import BASELINE

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
COLUMNS = ("method", "step, ms", "step", "quartiles", "kept", "peak", "inference")


class FinishedBench(NamedTuple):
    """A finished benchmark of a network.

    Attributes:
        benches: How it was measured, one per batch size.
        found: What was measured, likewise.
        command: What was typed.
        seconds: From start to end.
    """

    benches: list[Bench]
    found: list[Costs]
    command: str
    seconds: float

    @property
    def rows(self) -> list[Measurement]:
        """The rows of all batch sizes."""
        return [row for costs in self.found for row in costs.rows]


def row_name(method: str) -> str:
    """Return the name of a row of the table."""
    return "as it is" if method == BASELINE else f"{get_method(method).title} ({method})"


def lines(costs: Costs) -> list[tuple[str, tuple[str, ...]]]:
    """Each method's short name and the cells of its row; ratios are to the network's own."""
    by_name: dict[str, dict[str, Measurement]] = {}
    for row in costs.rows:
        by_name.setdefault(row.name, {})[row.question] = row
    found = []
    for name, own in by_name.items():
        step = own["step"]
        ratios = (own.get(question) for question in ("kept", "peak", "inference"))
        texts = ("" if row is None else f"{row.ratio:.2f}" for row in ratios)
        quartiles = f"{step.ratio_low:.2f}-{step.ratio_high:.2f}"
        cells = (f"{step.value:.4g}", f"{step.ratio:.2f}", quartiles, *texts)
        found.append((name, (row_name(name), *cells)))
    return found


def title(bench: Bench) -> str:
    """Return the title of a table."""
    form = ", channels last" if bench.channels_last else ""
    mode = "" if bench.mode == "eager" else f", {bench.mode}"
    where = f"{bench.device}, {bench.precision}{form}{mode}"
    return f"{bench.name}, batch {bench.examples}, {where}"


def costs_table(bench: Bench, costs: Costs) -> "Table":
    """Build the table of one batch size for the terminal."""
    found = lines(costs)
    return terminal_table(
        COLUMNS,
        [(name, *cells) for name, (_, *cells) in found],
        title=title(bench),
        caption="torch: the network as it is = 1",
        styles=["dim" if name == BASELINE else None for name, _ in found],
    )


def notes(outcome: FinishedBench) -> list[str]:
    """Return sentences that explain the figures."""
    first = outcome.benches[0]
    found = [
        "step: forward, mean square of what comes out, backward, and SGD with momentum, on random "
        f"inputs; median of {first.rounds} rounds, in each of which all methods have their turn, "
        "in another order.",
        "ratios are medians of the ratios by round; their quartiles are beside them.",
        "kept: what a forward keeps for its backward. peak: the most that a step takes at a time, "
        "beyond parameters and optimizer.",
        "inference: the converted network in evaluation mode; where it was batch normalization, "
        "anybatch.to_batchnorm and anybatch.fold take the difference away.",
        "methods are beyond their warm-up.",
    ]
    failed = {name: why for costs in outcome.found for name, why in costs.failed.items()}
    found += [f"{name} could not be measured: {why}" for name, why in failed.items()]
    return found


def as_data(outcome: FinishedBench) -> dict[str, Any]:
    """The benchmark as plain data."""
    first = outcome.benches[0]
    return {
        "schema": SCHEMA,
        "command": outcome.command,
        "seconds": outcome.seconds,
        "machine": surroundings(first.device),
        "settings": settings(outcome),
        "notes": notes(outcome),
        "failed": [
            {"batch": bench.examples, "method": name, "reason": why}
            for bench, costs in zip(outcome.benches, outcome.found, strict=True)
            for name, why in costs.failed.items()
        ],
        "measurements": [row._asdict() for row in outcome.rows],
    }


def settings(outcome: FinishedBench) -> dict[str, Any]:
    """Return the settings as plain data."""
    first = outcome.benches[0]
    return {
        "model": first.name,
        "inputs": [list(shape) for shape in first.inputs],
        "batch_sizes": [bench.examples for bench in outcome.benches],
        "device": first.device,
        "precision": first.precision,
        "channels_last": first.channels_last,
        "mode": first.mode,
        "rounds": first.rounds,
    }


def write(outcome: FinishedBench, folder: Path) -> Path:
    """Write ``bench.json``, ``bench.csv``, ``bench.png`` and ``report.html``, each whole."""
    pairs = zip(outcome.benches, outcome.found, strict=True)
    text = as_csv(outcome.rows, Measurement._fields, outcome.benches[0].device)
    return write_report(
        folder,
        "bench.html.j2",
        ("bench.json", as_data(outcome)),
        {"bench": png(measurement_figures.ratios(outcome.rows))},
        texts={"bench.csv": text},
        name=outcome.benches[0].name,
        columns=COLUMNS,
        tables=[(title(bench), lines(costs)) for bench, costs in pairs],
        sentences=list(sentences(outcome)),
        baseline=BASELINE,
    )


def sentences(outcome: FinishedBench) -> Iterable[str]:
    """Yield a sentence per batch size that names the cheapest and the dearest step."""
    for bench, costs in zip(outcome.benches, outcome.found, strict=True):
        steps = [r for r in costs.rows if r.question == "step" and r.name != BASELINE]
        if steps:
            low, high = (f(steps, key=lambda row: row.ratio) for f in (min, max))
            yield (
                f"At batch {bench.examples} a training step takes from {low.ratio:.2f} "
                f"({low.name}) to {high.ratio:.2f} ({high.name}) of what it takes as it is."
            )
