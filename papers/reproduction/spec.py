"""Specs of the papers' tables and figures: what each cell trains and measures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any

from anybatch.core.arguments import closest
from anybatch.tools.objective import objective
from papers.paper_run import PaperRun
from papers.reproduction.readings import COSTS, NOISE, STATISTICS
from papers.reproduction.runs import CostRun, Job, RecordedRun, trained

FOLDER = Path(__file__).parents[1] / "specs"
WEIGHTS = Path(__file__).parents[1] / "weights"
SIZES = ("small", "paper")
MEASURES = ("last", "mean of 5", "tuned")
UNITS = ("accuracy", "error", "mean IoU", "AP")
MEASURED = ("ratio", "noise")  # units of what is measured beside or in place of an accuracy
FIGURES = ("lines", "bars", "curves", "weights", "ratios", "series", "noise")
_UNGROUPED = ("gn", "ln", "in", "frozen")  # their statistics do not depend on the batch
# Training and held-out examples, where the data say so by their name.
_KNOWN = {
    "digits": (1297, 500),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "cifar100-corrupted": (50_000, 10_000),
    "camvid": (367, 233),
}
# A pixel, from what torchvision states of such networks at 800x1333.
_TWO_STAGE_FLOPS = {
    "fasterrcnn50": 5.2e5,
    "fasterrcnn101": 6.6e5,
    "maskrcnn50": 6.2e5,
    "maskrcnn101": 7.6e5,
}

Number = tuple[float, float | None]


@dataclass(frozen=True)
class Cell:
    """One number of a table: what is trained for it, seeds aside, and what is read off.

    Attributes:
        row: Label of its row.
        column: Label of its column.
        run: The training, with seed 0 and no root, or the measurement.
        measure: "last" (after the last epoch), "mean of 5" (over the last five) or "tuned" (with
            the example weight that is best on the other half of the held-out examples), of the
            objective's first number; or the name of another one, after the last epoch. Of what is
            measured, see `papers.reproduction.readings`.
        paper: The paper's number and its spread; None where it gives none.
    """

    row: str
    column: str
    run: Job
    measure: str
    paper: Number | None


@dataclass(frozen=True)
class Reproduction:
    """A table or figure of a paper.

    Attributes:
        name: As in ``python -m papers NAME``.
        paper: The paper's short name.
        source: Table or figure there.
        title: What it is of.
        claim: What the paper finds.
        unit: One of `UNITS`, in per cent; "ratio" of a cost to that of the first row, whose
            paper's numbers are turned into ratios, too; or "noise" of statistics.
        down: What its rows are.
        across: What its columns are.
        figure: How it is drawn: "lines", "bars", "curves" or "weights"; "ratios" of costs;
            "series" along a training, or "noise" with its distribution.
        sizes: What is trained, by size.
        share: Rows between which the share recovered is counted; None where it is not.
        notes: Readings of what the paper leaves open.
    """

    name: str
    paper: str
    source: str
    title: str
    claim: str
    unit: str
    down: str
    across: str
    figure: str
    sizes: Mapping[str, "Size"]
    share: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """The cells of one size of a reproduction.

    Attributes:
        cells: Row by row.
        seeds: Runs per cell.
        folder: Of the data, in the root, where the data have no name of their own.
        examples: Training and held-out examples there are.
        text: What was shrunk, or where the settings are from.
    """

    cells: tuple[Cell, ...]
    seeds: int
    folder: str | None
    examples: tuple[int, int]
    text: str

    @property
    def rows(self) -> list[str]:
        """Labels of the rows, in order."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> list[str]:
        """Labels of the columns, in order."""
        return list(dict.fromkeys(cell.column for cell in self.cells))

    @property
    def learning_rate(self) -> str:
        """The learning rates of the trainings, as a sentence; empty where nothing is trained."""
        runs = [cell.run for cell in self.cells if isinstance(cell.run, PaperRun)]
        rates = sorted({run.lr * run.batch_size / 64 for run in runs})
        if not rates:
            return ""
        if len(rates) == 1:
            return f"The learning rate is {rates[0]:.3g}."
        return f"The learning rate is {rates[0]:.3g} to {rates[-1]:.3g}, by row or column."

    def cell(self, row: str, column: str) -> Cell | None:
        """The cell of a row and a column; None where the table has none."""
        return next((c for c in self.cells if (c.row, c.column) == (row, column)), None)


@dataclass(frozen=True)
class Task:
    """A training or a measurement that is to be made.

    Attributes:
        run: What to train or to measure.
        weighed: Whether its example weight is tuned afterwards.
        name: Of the first reproduction that needs it.
        flops: Operations of training it, about.
        steps: Optimizer steps.
    """

    run: Job
    weighed: bool = False
    name: str = ""
    flops: float = field(default=0.0, compare=False)
    steps: int = field(default=0, compare=False)


@cache
def reproductions() -> dict[str, Reproduction]:
    """Everything that can be reproduced, by name, in the order of the papers.

    Returns:
        A reproduction a file in ``papers/specs``.

    Raises:
        ValueError: If a file is wrong; it says which and why.
    """
    found = {}
    for path in sorted(FOLDER.glob("*.json"), key=_order):
        try:
            found[path.stem] = read(path.stem, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error!r}") from error
    return found


def _order(path: Path) -> tuple[str, ...]:
    """The key experiment first, then paper by paper."""
    return ("",) if path.stem == "recovery" else (path.stem,)


def chosen(names: list[str]) -> list[Reproduction]:
    """Reproductions by name.

    Args:
        names: Their names, or a paper's short name for all of its.

    Returns:
        Each once, in the order of `reproductions`.

    Raises:
        ValueError: For a name that there is not.
    """
    known = reproductions()
    papers = {one.paper for one in known.values()}
    for name in names:
        if name not in known and name not in papers:
            hint = closest(name, [*known, *papers])
            raise ValueError(f"name={name!r}: {hint}python -m papers --list shows the names")
    return [one for one in known.values() if one.name in names or one.paper in names]


def read(name: str, data: Mapping[str, Any]) -> Reproduction:
    """A reproduction of what its file holds.

    Args:
        name: Its name.
        data: The file's content.

    Returns:
        The reproduction.

    Raises:
        ValueError: For settings that do not go together.
        KeyError: For something that is missing.
    """
    _only(data, _FIELDS)
    for key, choices in (("unit", (*UNITS, *MEASURED)), ("figure", FIGURES)):
        _one_of(key, data[key], choices)
    if set(data["sizes"]) != set(SIZES):
        raise ValueError(f"sizes={list(data['sizes'])}: give {' and '.join(SIZES)}")
    sizes = {size: _size(data, size) for size in SIZES}
    share = data.get("share")
    for size in sizes.values():
        if share is not None and (len(size.columns) > 1 or not set(share) <= set(size.rows)):
            raise ValueError(f"share={share!r}: give two rows of a table of one column")
    for cell in (cell for size in sizes.values() for cell in size.cells):
        if data["unit"] in MEASURED:
            continue
        run = trained(cell.run)
        _one_of("unit", data["unit"], objective(run).units)
        if cell.measure == "tuned" and run.task != "classification":
            raise ValueError(f"measure='tuned': data={run.data!r} are not classified")
    _check_numbers(data.get("paper_numbers", {}), sizes["paper"])
    return Reproduction(
        name,
        **{key: data[key] for key in _TEXTS},
        sizes=sizes,
        share=None if share is None else (share[0], share[1]),
        notes=tuple(data.get("notes", ())),
    )


_TEXTS = ("paper", "source", "title", "claim", "unit", "down", "across", "figure")
_FIELDS = (*_TEXTS, "rows", "columns", "cells", "paper_numbers", "sizes", "share", "notes")
_ENTRY = ("label", "run", "measure", "sizes", *SIZES)
_SIZE = ("run", "seeds", "folder", "examples", "text")


def _size(data: Mapping[str, Any], size: str) -> Size:
    own = data["sizes"][size]
    _only(own, _SIZE)
    cells = []
    numbers = data.get("paper_numbers", {})
    for parts in data.get("cells", {}).values():
        for part in parts.values():
            _only(part, ("run", *SIZES))
    rows, columns = (_entries(data[name], size) for name in ("rows", "columns"))
    if data["unit"] == "ratio":
        return _costs(rows, columns, own, numbers, size)
    kind = RecordedRun if data["unit"] == "noise" else PaperRun
    for row in rows:
        for column in columns:
            own_part = data.get("cells", {}).get(row["label"], {}).get(column["label"], {})
            changes = _settings((column, row, own_part), own.get("run", {}), size)
            measure = row.get("measure", column.get("measure", "last"))
            run, statistic = _run(changes, kind), ""
            if data["unit"] == "noise":  # a row is a statistic, or a method; a column a number
                measure, statistic = column["measure"], row["measure"]
                _one_of("measure", statistic, STATISTICS)
                _one_of("measure", measure, NOISE)
            else:
                _one_of("measure", measure, (*MEASURES, *objective(trained(run)).numbers))
            number = numbers.get(row["label"], {}).get(column["label"])
            paper = None if number is None else _number(number)
            measured = f"{measure} of {statistic}" if statistic else measure
            cells.append(Cell(row["label"], column["label"], run, measured, paper))
    known = _KNOWN.get(trained(cells[0].run).data, (0, 0))
    examples = tuple(own.get("examples", known))
    return Size(tuple(cells), own["seeds"], own.get("folder"), examples, own["text"])


def _costs(
    rows: list[dict[str, Any]],
    columns: list[dict[str, Any]],
    own: Mapping[str, Any],
    numbers: Mapping[str, Mapping[str, Any]],
    size: str,
) -> Size:
    """One measurement of all rows in turn; a column is what is asked of it."""
    methods = []
    for row in rows:
        settings = _settings((row,), {}, size)
        options = sorted(settings.pop("options").items())
        methods.append([row["label"], settings.pop("method"), options])
        if settings:
            raise ValueError(f"rows: {row['label']!r}: a method has costs here, and options")
    for column in columns:
        _one_of("measure", column.get("measure"), tuple(COSTS))
    questions = list(dict.fromkeys(COSTS[column["measure"]].question for column in columns))
    run = CostRun.from_dict({**own["run"], "methods": methods, "questions": questions})
    cells = []
    for row in rows:
        for column in columns:
            label = column["label"]
            number, base = (
                numbers.get(one, {}).get(label) for one in (row["label"], methods[0][0])
            )
            paper = None if number is None else (round(number / base, 3), None)
            cells.append(Cell(row["label"], label, run, column["measure"], paper))
    return Size(tuple(cells), own["seeds"], None, (1, 0), own["text"])


def _settings(
    entries: tuple[Mapping[str, Any], ...], settings: dict[str, Any], size: str
) -> dict[str, Any]:
    """Settings with those of columns, rows and cells put over them, in this order."""
    parts = [entry.get(key, {}) for entry in entries for key in ("run", size)]
    return reduce(_merged, parts, settings)


def _entries(entries: list[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    for entry in entries:
        _only(entry, _ENTRY)
    return [entry for entry in entries if size in entry.get("sizes", SIZES)]


def _merged(settings: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others put over them; a method's options one by one."""
    options = {**settings.get("options", {}), **more.get("options", {})}
    return {**settings, **more, "options": options}


def _run(settings: Mapping[str, Any], kind: type[PaperRun]) -> PaperRun:
    """A run of settings; what makes no difference is said in one way, so that runs are shared."""
    plain = dict(settings)
    devices = plain.pop("devices", 1)  # with a memory each, where the batch is cut
    if plain.get("method") in _UNGROUPED or plain.get("norm_batch_size") == plain["batch_size"]:
        plain["norm_batch_size"] = None
    if devices > 1 and plain.get("norm_batch_size") is not None:
        plain["options"] = {**plain.get("options", {}), "memories": devices}
    plain |= {name: sorted(plain.get(name, {}).items()) for name in ("options", "start")}
    return kind.from_dict(plain)


def _number(value: Any) -> Number:
    mean, spread = value if isinstance(value, list) else (value, None)
    return float(mean), None if spread is None else float(spread)


def _check_numbers(numbers: Mapping[str, Mapping[str, Any]], size: Size) -> None:
    for row, columns in numbers.items():
        for column in columns:
            if size.cell(row, column) is None:
                raise ValueError(f"paper_numbers: there is no cell {row!r}, {column!r}")


def _only(data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"{key}={data[key]!r}: give only {', '.join(known)}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(choices)}")


def tasks(
    wanted: list[Reproduction], size: str, seeds: tuple[int, ...] | None = None
) -> list[Task]:
    """The trainings of some reproductions, each once, whole tables for the first seed first.

    Args:
        wanted: The reproductions.
        size: "small" or "paper".
        seeds: One run of each cell a seed (default None: as many as the files say, from 0).

    Returns:
        The tasks; their runs have neither root nor device.
    """
    _one_of("size", size, SIZES)
    found: dict[str, Task] = {}
    for one in wanted:
        scale = one.sizes[size]
        for cell in scale.cells:
            flops, steps = _cost(cell.run, scale.examples)
            for seed in range(scale.seeds) if seeds is None else seeds:
                run = cell.run.but(seed=seed)
                before = found.get(run.identity)
                weighed = cell.measure == "tuned" or (before is not None and before.weighed)
                name = one.name if before is None else before.name
                found[run.identity] = Task(run, weighed, name, flops, steps)
    for task in list(found.values()):
        start = start_of(task.run)
        if start is None or start.identity in found or shipped_weights(start).is_file():
            continue
        costs = _cost(start, _KNOWN.get(start.data, (1, 0)))
        found[start.identity] = Task(start, False, task.name, *costs)
    return sorted(found.values(), key=lambda task: (task.run.seed, -task.flops))


def start_of(job: Job) -> PaperRun | None:
    """The run whose trained network a job starts from; None if it starts from scratch."""
    return job.start_run if isinstance(job, PaperRun) else None


def shipped_weights(job: Job) -> Path:
    """The file of a start network's weights that comes with the papers, which may not exist."""
    return WEIGHTS / f"{job.identity}.pt"


@cache
def starts() -> frozenset[str]:
    """Identities of the runs that a reproduction starts from; their weights are kept."""
    sizes = (size for one in reproductions().values() for size in one.sizes.values())
    found = (start_of(cell.run) for size in sizes for cell in size.cells)
    return frozenset(start.identity for start in found if start is not None)


def _cost(run: Job, examples: tuple[int, int]) -> tuple[float, int]:
    """Operations of a run, backward ones twice those of forward, and its steps."""
    if isinstance(run, CostRun):
        steps = len(run.methods) * len(run.questions) * run.rounds
        return 3.0 * steps * run.batch_size * _forward_flops(run.model, run.example), steps
    train = examples[0] if run.train_size is None else run.train_size
    test = examples[1] if run.test_size is None else run.test_size
    if run.validation_size is not None:
        train = examples[0] - run.validation_size if run.train_size is None else train
        test = run.validation_size if run.test_size is None else test
    flops = run.epochs * (3 * train + test) * _forward_flops(run.model, _shape(run))
    return flops, run.epochs * (train // run.batch_size)


def _shape(run: PaperRun) -> tuple[int, ...]:
    """Return the shape of an example."""
    if run.data == "digits":
        return (64,)
    side = 32 if run.data.startswith("cifar") else run.image_size
    return (3, side, side * 4 // 3) if run.data == "camvid" else (3, side, side)


@cache
def _forward_flops(model: str, shape: tuple[int, ...]) -> float:
    """Operations of one example's forward, counted without doing them; 0 if it cannot be built."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from anybatch.tools.network_factory import factory
    from anybatch.tools.networks import BUILDERS, LIBRARIES, build

    if model in _TWO_STAGE_FLOPS:  # which boxes they look at is no matter of shapes
        return _TWO_STAGE_FLOPS[model] * shape[1] * shape[2]
    own = model in BUILDERS or model.partition(":")[0] in LIBRARIES
    with torch.device("meta"):
        try:
            net = (build(model, 100, shape) if own else factory(model)()).eval()
        except ValueError:  # its library is not installed, and a list of tables needs none
            return 0.0
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, *shape))
    return float(counter.get_total_flops())
