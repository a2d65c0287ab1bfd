"""A comparison of methods: its runs, in several processes, and its table."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from anybatch.conversion.decisions import is_fresh
from anybatch.conversion.frozen_norms import is_frozen_norm
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.conversion.observe import random_states_restored
from anybatch.core.arguments import check_count
from anybatch.core.norm_layer import NormLayer
from anybatch.registry import FROZEN, get_method
from anybatch.tools.data import Dataset, steps_per_epoch
from anybatch.tools.network_factory import build
from anybatch.tools.processes import OnProgress, in_processes
from anybatch.tools.run import BASELINE, Option, Run
from anybatch.tools.training import Row, prepare, stored_result, train

# Those for the small batches of the default setting; a sample of these is smaller still.
DEFAULT_METHODS = ("bn", "gn", "mbn", "mabn", "cbn", "brn", "ghost", "bgn")


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison.

    Attributes:
        base: The setting that all runs share; its method is not used.
        methods: Short names, at the base's batch size.
        seeds: One run each.
        target_batch_size: Of the batch norm that shows what can be reached.
        options: Of each method.
        centralize: Centralize weights before norms, whatever the method.
    """

    base: Run
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    target_batch_size: int = 32
    options: tuple[tuple[str, tuple[Option, ...]], ...] = ()
    centralize: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods=(): give one or more")
        if not self.seeds:
            raise ValueError("seeds=(): give one or more")
        for name in self.methods:
            if name == BASELINE:
                raise ValueError("methods: torch's batch norm is the baseline of every comparison")
            get_method(name)
        for name, _ in self.options:
            if name not in self.methods:
                known = ", ".join(self.methods)
                raise ValueError(f"options={name!r}: it is none of the methods {known}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: give each once")
        check_count("target_batch_size", self.target_batch_size)

    def groups(self) -> dict[str, list[Run]]:
        """The runs, by row of the table: the target, the baseline, then each method."""
        base = self.base.but(options=())
        large = {"batch_size": self.target_batch_size, "norm_batch_size": None, "accumulate": 1}
        target = base.but(method=BASELINE, **large)
        if base.norm_batch_size is not None:  # the same steps, with larger statistics
            size = min(self.target_batch_size, base.batch_size)
            whole = size == base.batch_size
            target = base.but(method="bn", norm_batch_size=None if whole else size)
        # torch's layer refuses a single value
        apart = base.norm_batch_size is not None or base.micro_batch_size == 1
        baseline = base.but(method="bn" if apart else BASELINE)
        rows = {"target": target, "baseline": baseline}
        for name in self.methods:
            own = dict(self.options).get(name, ())
            rows[name] = base.but(method=name, options=own, centralize=self.centralize)
        return {row: [run.but(seed=seed) for seed in self.seeds] for row, run in rows.items()}

    def timed(self) -> dict[str, Run]:
        """A run of each row whose step is timed: of all but the target, whose batch is larger."""
        return {row: runs[0] for row, runs in self.groups().items() if row != "target"}

    def runs(self) -> list[Run]:
        """Every run once, longest first so that no process is left with one at the end."""
        unique = {run.key: run for runs in self.groups().values() for run in runs}
        return sorted(unique.values(), key=lambda run: (run.batch_size, run.method != "mabn"))


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        row: "target", "baseline" or a method's name.
        run: One of its runs.
        accuracies: Of each seed, from 0 to 1.
        mean: Of the accuracies.
        spread: Their standard deviation; 0 for one seed.
        recovered: Share of the lost accuracy that is won back; None without a loss that is larger
            than the spread of the two batch norms.
    """

    row: str
    run: Run
    accuracies: tuple[float, ...]
    mean: float
    spread: float
    recovered: float | None


def table(comparison: Comparison, results: dict[str, Row]) -> list[Line]:
    """The table of finished runs.

    Args:
        comparison: What was compared.
        results: Results by key.

    Returns:
        A line for the target, one for the baseline, then one per method, the best first.
    """
    groups = comparison.groups()
    accuracies = {
        row: tuple(as_number(results[run.key]["accuracy"]) for run in runs)
        for row, runs in groups.items()
    }
    means = {row: statistics.fmean(values) for row, values in accuracies.items()}
    spreads = {
        row: statistics.stdev(values) if len(values) > 1 else 0.0
        for row, values in accuracies.items()
    }
    lost = means["target"] - means["baseline"]
    loses = lost > max(spreads["target"], spreads["baseline"], 1e-9)
    lines = [
        Line(
            row,
            groups[row][0],
            values,
            means[row],
            spreads[row],
            (means[row] - means["baseline"]) / lost if loses else None,
        )
        for row, values in accuracies.items()
    ]
    return lines[:2] + sorted(lines[2:], key=lambda line: -line.mean)


def as_number(stored: float | None) -> float:
    """A number as results keep it, where nan is None."""
    return math.nan if stored is None else float(stored)


def check_data(comparison: Comparison, data: Dataset) -> None:
    """Check that methods can be compared on the data, before anything is trained.

    Raises:
        ValueError: For a batch larger than the training set, a network without batch norms or with
            layers of this library, one that does not fit the data or a method, and for `frozen`
            with a fresh network.
    """
    examples, wanted = len(data.train_y), comparison.target_batch_size
    if comparison.base.batch_size <= examples < wanted:
        raise ValueError(
            f"target_batch_size={wanted}: give a number from 1 to {examples}, the training "
            "examples there are"
        )
    for run in comparison.runs():
        steps_per_epoch(run, data)
    with random_states_restored():
        model = build(comparison.base.model, data)
    converted = [name for name, module in model.named_modules() if isinstance(module, NormLayer)]
    if converted:
        raise ValueError(
            f"model: its {converted[0]!r} is a layer of anybatch already, and the comparison is "
            "with torch's batch norm; give the network before convert"
        )
    norms = [module for module in model.modules() if is_batch_norm(module)]
    if norms and all(map(is_frozen_norm, norms)):
        raise ValueError(
            f"model: the norms of {type(model).__name__} are frozen, and a comparison trains batch "
            "norm beside the methods; give the network with torch's batch norm"
        )
    if not norms:
        raise ValueError(
            f"model: {type(model).__name__} has no batch norm, and a comparison replaces those; "
            "give a network with torch's"
        )
    if is_fresh(model) and any(get_method(name) is FROZEN for name in comparison.methods):
        raise ValueError(
            "methods: frozen keeps the statistics of a trained network, and those of this one are "
            "still the initial ones, so that its norms would change nothing; leave frozen out, or "
            "give a trained network"
        )
    with random_states_restored():
        for first, *_ in comparison.groups().values():  # the last fails as early as the first
            prepare(first, data)


def train_runs(
    runs: list[Run], folder: Path, workers: int, on_progress: OnProgress
) -> dict[str, Row]:
    """Train those of the runs that are not finished, in order, in processes of one thread each.

    The folder keeps their results; a run that was stopped goes on. `on_progress` is called with a
    run's key, the epochs done, and its result at the end.

    Raises:
        KeyboardInterrupt: After Ctrl-C; the processes are stopped first.
    """
    results: dict[str, Row] = {}
    waiting: list[Run] = []
    for run in runs:
        row = stored_result(folder / "runs" / f"{run.key}.json", run)
        if row is None:
            waiting.append(run)
        else:
            results[run.key] = row
            on_progress(run.key, run.epochs, row)
    if waiting:
        results |= in_processes(waiting, folder, workers, on_progress, train)
    return results
