"""The report of a comparison: a table, JSON and CSV, plots, and an HTML page."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybatch.core.text_tables import csv_text
from anybatch.evaluation.figures import png
from anybatch.registry import get_method
from anybatch.tools import compare_figures as figures
from anybatch.tools.compare import Comparison, Line
from anybatch.tools.machine import machine
from anybatch.tools.report_files import terminal_table, write_report
from anybatch.tools.timing import StepTime
from anybatch.tools.training import Row

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
COLUMNS = ("method", "batch", "accuracy", "spread", "recovered", "step time")


@dataclass(frozen=True)
class FinishedComparison:
    """A finished comparison; printed, it is its table.

    Attributes:
        comparison: What was compared.
        lines: The table.
        results: Results by key.
        times: Time of a step of each method; empty where it was not measured.
        command: What was typed.
        seconds: From start to end, this time.
    """

    comparison: Comparison
    lines: list[Line]
    results: dict[str, Row]
    times: dict[str, StepTime]
    command: str
    seconds: float

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=80, color_system=None)
        with console.capture() as captured:
            console.print(comparison_table(self))
            for line in advice(self):
                console.print(line, markup=False, highlight=False)
        return captured.get().rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Return table, settings and runs as plain data."""
        times = {row: asdict(time) for row, time in self.times.items()}
        lines = [
            {
                "row": line.row,
                "name": row_name(line),
                "run": line.run.as_dict(),
                "accuracies": list(line.accuracies),
                "accuracy": line.mean,
                "spread": line.spread,
                "recovered": line.recovered,
                "step_time": times.get(line.row),
            }
            for line in self.lines
        ]
        return {
            "schema": SCHEMA,
            "command": self.command,
            "seconds": self.seconds,
            "machine": machine(),
            "seeds": list(self.comparison.seeds),
            "notes": notes(self.comparison),
            "table": lines,
            "runs": [self.results[run.key] for run in self.comparison.runs()],
        }

    def report(self, folder: str | Path) -> Path:
        """Write ``results.json``, ``results.csv``, PNG plots and ``report.html``.

        Args:
            folder: Where; it is made if it is not there.

        Returns:
            The path of the page.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        return write(self, path)


def row_name(line: Line) -> str:
    """Return the name of a row of the table: a method's short name."""
    if line.row == "target":
        return "batch norm (target)"
    return "batch norm" if line.row == "baseline" else line.row


def advice(outcome: FinishedComparison) -> tuple[str, str]:
    """The advice of the comparison: a sentence, and the call to make, if there is one."""
    baseline, best = outcome.lines[1:3]
    size, seeds = baseline.run.statistics_size, len(outcome.comparison.seeds)
    if seeds == 1:
        return "One seed per method is no evidence: give three or more.", ""
    if best.mean - baseline.mean <= max(best.spread, baseline.spread):
        return (
            f"No method is ahead of batch norm at {size} by more than the spread of the seeds: "
            "keep it.",
            "",
        )
    if best.recovered is None:
        sentence = f"Batch norm loses nothing at {size}, and {best.row} is ahead of it."
    else:
        sentence = f"Best at {size}: {best.row}."
    method = get_method(best.row)
    if method.scheduled:
        sentence += " It also needs an anybatch.NormScheduler, stepped once an epoch."
    sizes = (("batch_size", size),) if "batch_size" in method.options else ()
    options = "".join(f", {name}={value!r}" for name, value in (*sizes, *best.run.options))
    return sentence, f'model = anybatch.convert(model, "{best.row}"{options})'


def cells(line: Line, times: dict[str, StepTime]) -> tuple[str, ...]:
    """Return the cells of a row of the table."""
    time = times.get(line.row)
    recovered = line.recovered if line.row not in ("target", "baseline") else None
    return (
        row_name(line),
        str(line.run.statistics_size),
        f"{100 * line.mean:.1f} %",
        f"± {100 * line.spread:.1f}" if len(line.accuracies) > 1 else "one seed",
        "" if recovered is None else f"{100 * recovered:.0f} %",
        "" if time is None or line.row == "target" else f"{time.ratio:.2f}",
    )


def comparison_table(outcome: FinishedComparison) -> "Table":
    """Build the table for the terminal."""
    base = outcome.comparison.base
    shown = len(COLUMNS) if outcome.times else len(COLUMNS) - 1
    caption = f"{len(outcome.comparison.seeds)} seed(s)"
    if outcome.times:
        caption += "; step time: torch.nn.BatchNorm at this batch size = 1"
    return terminal_table(
        COLUMNS[:shown],
        [cells(line, outcome.times)[:shown] for line in outcome.lines],
        title=f"{base.data_name}, {base.model_name}, {base.epochs} epochs",
        caption=caption,
        styles=["dim" if line.row in ("target", "baseline") else None for line in outcome.lines],
    )


def notes(comparison: Comparison) -> list[str]:
    """Return sentences that explain the settings."""
    base = comparison.base
    found = [
        "recovered: (accuracy - baseline) / (target - baseline), of the means; empty where the two "
        "batch norms differ by less than their spread.",
        f"spread: standard deviation over {len(comparison.seeds)} seed(s).",
        "every run: SGD, learning rate "
        f"{base.lr} x batch / 64, momentum {base.momentum}, weight decay {base.weight_decay}, "
        "cosine to 0 by step; a last batch that is not whole is left out, for every method.",
    ]
    if base.input_noise:
        found.append(f"inputs carry Gaussian noise of standard deviation {base.input_noise}.")
    if base.augments:
        found.append("training images are flipped and shifted by up to 4 pixels.")
    if "brn" in comparison.methods:
        found.append(
            "brn warms up over the first quarter of the run, smoothly; its default, "
            "10,000 steps, is meant for longer ones."
        )
    if "gn" in comparison.methods and base.model != "mlp":
        found.append("gn has 8 groups.")
    if "ghost" in comparison.methods and base.statistics_size <= 32:
        found.append("ghost groups are of up to 32 examples: at this batch size it is BatchNorm.")
    return found


def as_csv(outcome: FinishedComparison) -> str:
    """The table as CSV."""
    rows = []
    for line in outcome.lines:
        time = outcome.times.get(line.row)
        fixed = (line.row, line.run.method, line.run.statistics_size, line.mean, line.spread)
        recovered = "" if line.recovered is None else line.recovered
        rows.append((*fixed, recovered, "" if time is None else time.ratio))
    head = ("row", "method", "batch", "accuracy", "spread", "recovered", "step_time")
    return csv_text(head, rows)


def write(outcome: FinishedComparison, folder: Path) -> Path:
    """Write ``results.json``, ``results.csv``, PNG plots and ``report.html``, each whole."""
    base, lines = outcome.comparison.base, outcome.lines
    names = {line.row: f"{row_name(line)}, {line.run.statistics_size}" for line in lines}
    images = {
        "curves": png(figures.curves(outcome.comparison, lines, outcome.results, names)),
        "accuracy": png(figures.accuracy_bars(lines, names)),
    }
    if outcome.times:
        images["cost"] = png(figures.cost_bars(lines, outcome.times, names))
    by_row = {line.row: line for line in lines}
    return write_report(
        folder,
        "compare.html.j2",
        ("results.json", outcome.to_dict()),
        images,
        texts={"results.csv": as_csv(outcome)},
        base=base,
        columns=COLUMNS,
        rows=[(line.row, cells(line, outcome.times)) for line in lines],
        advice=advice(outcome),
        target=100 * by_row["target"].mean,
        target_size=by_row["target"].run.statistics_size,
        baseline=100 * by_row["baseline"].mean,
        size=base.statistics_size,
        settings=sorted((k, v) for k, v in base.as_dict().items() if k not in ("method", "seed")),
    )
