"""Rows of measurements: one form for all benchmarks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from anybatch.core.text_tables import csv_text
from anybatch.tools.machine import machine
from anybatch.tools.timing import quartiles, summaries

SHARES = ("forward", "backward")


class Measurement(NamedTuple):
    """One figure, and its ratio to the baseline's.

    Attributes:
        question: What was asked: "layer", "way", "step", "inference", "kept", "peak" ... Of
            `SHARES` the ratio is a share of the bandwidth of a copy, of which more is better.
        case: What it was measured on: a shape, or a network and its batch.
        format: "contiguous" or "channels_last".
        precision: "float32", "bfloat16" or "float16".
        mode: "eager", "compiled" or "graph".
        name: Of the method, the layer or the network.
        value: Median.
        low: Lower quartile.
        high: Upper quartile.
        unit: "ms", "MB" or "MFLOP".
        ratio: To the baseline, median of the rounds.
        ratio_low: Its lower quartile.
        ratio_high: Its upper quartile.
        rounds: Behind all of these.
    """

    question: str
    case: str
    format: str
    precision: str
    mode: str
    name: str
    value: float
    low: float
    high: float
    unit: str
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


class Setting(NamedTuple):
    """The settings that the measurements of one table share; see `Measurement`."""

    question: str
    case: str
    format: str = "contiguous"
    precision: str = "float32"
    mode: str = "eager"


def timed(
    setting: Setting, times: Mapping[str, Sequence[float]], baseline: str
) -> list[Measurement]:
    """Times as rows."""
    ratios = summaries({name: list(values) for name, values in times.items()}, baseline)
    found = []
    for name, values in times.items():
        low, middle, high = (_short(1e3 * value) for value in quartiles(list(values)))
        own = ratios[name]
        spread = [_short(value) for value in (own.ratio, own.low, own.high)]
        row = (*setting, name, middle, low, high, "ms", *spread, len(values))
        found.append(Measurement._make(row))
    return found


def counted(
    setting: Setting, sizes: Mapping[str, int | None], baseline: str, unit: str = "MB"
) -> list[Measurement]:
    """Bytes or operations as rows.

    A count that is None gives no row. The unit is a million of what is counted.
    """
    base, found = sizes[baseline], []
    for name, size in sizes.items():
        if size is not None:
            value = _short(size / 1e6)
            ratio = _short(size / base) if base else math.nan
            row = (*setting, name, *(value,) * 3, unit, *(ratio,) * 3, 1)
            found.append(Measurement._make(row))
    return found


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def surroundings(device: str = "cpu") -> dict[str, Any]:
    """Return what measurements are made on: machine, commit, versions.

    Example:
        >>> surroundings()["device"]
        'cpu'
    """
    found = machine()
    wanted = ("commit", "anybatch", "torch", "python", "system", "processor", "cores")
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        **{key: found[key] for key in wanted},
        **{name: _version(name) for name in ("numba", "triton")},
        "cuda": torch.version.cuda or "",
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def as_csv(rows: Iterable[tuple[Any, ...]], columns: Sequence[str], device: str = "cpu") -> str:
    """Rows as CSV, each with what it was measured on."""
    around = surroundings(device)
    return csv_text((*columns, *around), [(*row, *around.values()) for row in rows])


def tables(rows: Iterable[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    """Rows by question, precision and mode."""
    found: dict[tuple[str, str, str], list[Measurement]] = {}
    for row in rows:
        found.setdefault((row.question, row.precision, row.mode), []).append(row)
    return found


def cases(rows: Iterable[Measurement]) -> list[tuple[str, str]]:
    """Cases and formats, in the order they come in."""
    return list(dict.fromkeys((row.case, row.format) for row in rows))
