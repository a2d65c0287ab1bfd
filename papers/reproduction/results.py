"""Numbers of what was reproduced, beside the papers': tables of stored rows."""

import functools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anybatch.tools.objective import objective
from papers.reproduction.readings import MeasuredValue, of_costs, of_noise
from papers.reproduction.runs import CostRun, Job, RecordedRun, job_of, trained
from papers.reproduction.spec import MEASURED, Cell, Number, Reproduction, Size, start_of
from papers.reproduction.store import Row

NOT_RUN = "not run"


@dataclass(frozen=True)
class Value:
    """A number of ours.

    Attributes:
        values: A value per seed that was run, in per cent or as measured.
        wanted: Seeds that there should be.
        ids: Of the rows it is from.
        text: What a table has of one seed, where it is not the number.
    """

    values: tuple[float, ...]
    wanted: int
    ids: tuple[str, ...]
    text: str = ""

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Their standard deviation; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        digits = 2 if self.text else 1
        text = self.text or f"{self.mean:.1f}"
        if len(self.values) > 1:
            text = f"{self.mean:.{digits}f} ± {self.spread:.{digits}f}"
        if len(self.values) < self.wanted:
            text += f" ({len(self.values)} of {self.wanted} seeds)"
        return text


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes:
        head: Of each column.
        rows: Texts, as many as there are columns.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table for a page of the documentation."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows_of(cell: Cell, rows: Mapping[str, Row]) -> list[Row]:
    """The stored rows of a cell, in the order of their seeds."""
    seeds = sorted({int(row["seed"]) for row in rows.values()})
    found = [rows.get(_identity(cell.run, seed)) for seed in seeds]
    return [
        row
        for row in found
        if row is not None and (cell.measure != "tuned" or "weighing" in row["result"])
    ]


@functools.cache
def _identity(run: Job, seed: int) -> str:
    return run.but(seed=seed).identity


def value(cell: Cell, unit: str, seeds: int, rows: Mapping[str, Row]) -> Value | None:
    """Our number in a cell; None where nothing was run for it.

    Args:
        cell: The cell.
        unit: Of the reproduction.
        seeds: Runs that there should be.
        rows: Of the store.

    Returns:
        The number.
    """
    found = rows_of(cell, rows)
    if not found:
        return None
    if unit in MEASURED:
        return _measured(cell, seeds, found)
    reached = [_reached(row["result"], cell) for row in found]
    values = tuple(100 * (1 - a if unit == "error" else a) for a in reached)
    return Value(values, seeds, tuple(row["id"] for row in found))


def _measured(cell: Cell, seeds: int, found: list[Row]) -> Value | None:
    """A number that is no accuracy; None where a method could not be measured."""
    readings = [_reading(cell, row["result"]) for row in found]
    there = [(one, row["id"]) for one, row in zip(readings, found, strict=True) if one is not None]
    if not there:
        return None
    values, ids = tuple(one.value for one, _ in there), tuple(key for _, key in there)
    return Value(values, seeds, ids, there[0][0].text)


def _reading(cell: Cell, result: Mapping[str, Any]) -> MeasuredValue | None:
    if isinstance(cell.run, CostRun):
        return of_costs(result, cell.run, cell.row, cell.measure)
    assert isinstance(cell.run, RecordedRun)
    return of_noise(result, cell.run, cell.measure)


def columns_of(one: Reproduction) -> str:
    """Describe the columns of a reproduction."""
    return one.across if one.unit in MEASURED else f"{one.unit} (%) by {one.across}"


def _reached(result: Mapping[str, Any], cell: Cell) -> float:
    learned = objective(trained(cell.run))
    if cell.measure == "mean of 5":
        return statistics.fmean(result[learned.curve][-5:])
    if cell.measure == "tuned":
        return _tuned(result["weighing"])
    if cell.measure in learned.numbers:
        return float(result[cell.measure])
    return float(result[learned.metric])


def _tuned(weighing: Mapping[str, Any]) -> float:
    """Accuracy on each half of the held-out examples with the weight that is best on the other."""
    one, other = weighing["halves"]
    reached = [
        judge["top1"][weighing["alphas"].index(guide["best"])] * judge["examples"]
        for guide, judge in ((one, other), (other, one))
    ]
    return float(sum(reached)) / int(one["examples"] + other["examples"])


def share(value: Value, low: Value, high: Value) -> Number | None:
    """The share of a loss that is recovered, from 0 to 1 and beyond, and its spread.

    ::

        share  = (value - low) / (high - low)                                     of the means
        spread = sqrt(s_value^2 + (1 - share)^2 s_low^2 + share^2 s_high^2) / |high - low|

    which is the standard deviation over seeds that are independent, to first order.

    Args:
        value: What a method reaches.
        low: What is reached with nothing recovered.
        high: What there was to lose.

    Returns:
        Share and spread; None where nothing was lost.
    """
    lost = high.mean - low.mean
    if abs(lost) < 1e-9:
        return None
    part = (value.mean - low.mean) / lost
    square = value.spread**2 + ((1 - part) * low.spread) ** 2 + (part * high.spread) ** 2
    return part, square**0.5 / abs(lost)


def grid(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> Grid:
    """A reproduction as a table, the paper's numbers beside ours.

    Args:
        one: The reproduction.
        size: What was trained.
        rows: Of the store.

    Returns:
        The table.
    """
    cited = [column for column in size.columns if any(_cited(size, r, column) for r in size.rows)]
    head = [one.down]
    for column in size.columns:
        head += [column, f"{column}, paper"] if column in cited else [column]
    if one.share:
        head += ["recovered", "recovered, paper"] if cited else ["recovered"]
    lines, recovered = [], shares(one, size, rows)
    for row in size.rows:
        line = [row]
        for column in size.columns:
            cell = size.cell(row, column)
            ours = None if cell is None else value(cell, one.unit, size.seeds, rows)
            line.append(NOT_RUN if ours is None else str(ours))
            if column in cited:
                line.append(_number(_cited(size, row, column)))
        if one.share:
            line.append(_share(recovered.get(row)))
            if cited:
                line.append(_share(_paper_share(one, size, row)))
        lines.append(tuple(line))
    return Grid(tuple(head), tuple(lines))


def shares(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> dict[str, Number]:
    """The share recovered of each row that has one: not of the two that it is counted between."""
    if one.share is None:
        return {}
    ours = {cell.row: value(cell, one.unit, size.seeds, rows) for cell in size.cells}
    low, high = (ours[name] for name in one.share)
    if low is None or high is None:
        return {}
    found = {
        name: share(number, low, high)
        for name, number in ours.items()
        if number is not None and name not in one.share
    }
    return {name: part for name, part in found.items() if part is not None}


def _paper_share(one: Reproduction, size: Size, row: str) -> Number | None:
    low, high = (_cited(size, name, size.columns[0]) for name in one.share or ())
    number = _cited(size, row, size.columns[0])
    if None in (low, high, number) or row in (one.share or ()):
        return None
    assert low is not None and high is not None and number is not None
    return (number[0] - low[0]) / (high[0] - low[0]), None


def _cited(size: Size, row: str, column: str) -> Number | None:
    cell = size.cell(row, column)
    return None if cell is None else cell.paper


def _number(number: Number | None) -> str:
    if number is None:
        return ""
    mean, spread = number
    return str(mean) if spread is None else f"{mean} ± {spread}"


def _share(part: Number | None) -> str:
    if part is None:
        return ""
    mean, spread = part
    return f"{100 * mean:.0f} %" if not spread else f"{100 * mean:.0f} ± {100 * spread:.0f} %"


def as_data(one: Reproduction, name: str, rows: Mapping[str, Row]) -> dict[str, Any]:
    """A reproduction as plain data.

    Args:
        one: The reproduction.
        name: Of the size.
        rows: Of the store.

    Returns:
        Its cells, with the identities of the rows behind them.
    """
    size = one.sizes[name]
    recovered = shares(one, size, rows)
    cells = []
    for cell in size.cells:
        ours = value(cell, one.unit, size.seeds, rows)
        cells.append(
            {
                "row": cell.row,
                "column": cell.column,
                "values": [] if ours is None else list(ours.values),
                "mean": None if ours is None else ours.mean,
                "spread": None if ours is None else ours.spread,
                "ids": [] if ours is None else list(ours.ids),
                "seeds": size.seeds,
                "paper": None if cell.paper is None else cell.paper[0],
                "recovered": recovered[cell.row][0] if cell.row in recovered else None,
            }
        )
    return {"name": one.name, "size": name, "unit": one.unit, "cells": cells}


def backing(one: Reproduction, size: Size, rows: Mapping[str, Row]) -> list[Row]:
    """The rows behind a table, each once, and those of the networks that they start from."""
    found = {row["id"]: row for cell in size.cells for row in rows_of(cell, rows)}
    for row in list(found.values()):
        start = start_of(job_of(row["settings"]))
        if start is not None and start.identity in rows:
            found[start.identity] = rows[start.identity]
    return list(found.values())


def checked(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by identity, after a look at whether their settings are what the identity is of.

    Args:
        rows: The rows.

    Returns:
        The same.

    Raises:
        ValueError: If one's settings were changed.
    """
    found = {}
    for row in rows:
        if job_of(row["settings"]).identity != row["id"]:
            raise ValueError(f"id={row['id']!r}: the settings of this row are not those it is of")
        found[row["id"]] = row
    return found
