"""The interpretation of the measured noise: a word per norm, a verdict, and a method to use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anybatch.evaluation.diagnosis.layer_noise import LayerNoise, Spread
from anybatch.evaluation.diagnosis.outputs import ExampleNorm
from anybatch.registry import METHODS

NOISY_BELOW = 8.0  # independent values
QUIET_FROM = 16.0
_SEAM_FROM = 0.05  # of an output's standard deviation
_WANTED = 32.0  # independent values that a method with averages is set to reach
_ONE_STEP_TOO_FEW = 4.0  # below it, mabn; from it on, mbn
_AVERAGING = ("mbn", "mabn", "brn")

Word = Literal["noisy", "borderline", "quiet", "averaged", "dead"]


@dataclass(frozen=True)
class Reading:
    """The interpretation of a diagnosis.

    Attributes:
        problem: Whether batch normalization is the problem: "yes", "perhaps" or "no".
        noisy: Names of the norms whose statistics are too noisy.
        stale: Names of the norms whose running statistics are not those of the data.
        method: Short name of the method to use; None where none is needed.
        options: Its options.
        sentences: The same in words.
    """

    problem: Literal["yes", "perhaps", "no"]
    noisy: tuple[str, ...]
    stale: tuple[str, ...]
    method: str | None
    options: Mapping[str, Any]
    sentences: tuple[str, ...]


HEAD = (
    "norm",
    "kind",
    "values",
    "acts as",
    "mean",
    "variance",
    "g",
    "Psi",
    "noise",
    "gap",
    "disparity",
    "seam",
    "reading",
)


def cells(layer: LayerNoise) -> tuple[str, ...]:
    """The text of a norm's row: measured noise, and in brackets what its examples let expect."""
    return (
        layer.name or "(the model)",
        layer.kind,
        f"{layer.values:.0f}",
        _count(_worst(layer)),
        *(_noise(spread) for spread in (layer.mean, layer.var, layer.g, layer.psi)),
        f"{layer.output:.2f}",
        *map(_number, (layer.gap, layer.disparity, layer.seam)),
        word(layer) + (", stale" if is_stale(layer) else ""),
    )


def example_cells(norm: ExampleNorm) -> tuple[str, ...]:
    """The text of the row of a norm that takes statistics from each example alone."""
    return (norm.name or "(the model)", norm.kind, *"-" * 9, _number(norm.seam), "each example")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _noise(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.measured:.2f} ({spread.expected:.2f})"


def _count(values: float) -> str:
    return f"{values:.1f}" if values < 9.95 else f"{values:.0f}" if values < 1e6 else "many"


def word(layer: LayerNoise) -> Word:
    """The reading of one norm; see `diagnose` for the rules."""
    if layer.dead == layer.channels:
        return "dead"
    if any(layer.kind.startswith(METHODS[name].class_name) for name in _AVERAGING):
        return "averaged"
    worst = _worst(layer)
    return "noisy" if worst < NOISY_BELOW else "borderline" if worst < QUIET_FROM else "quiet"


def is_stale(layer: LayerNoise) -> bool:
    """True if a norm's running statistics are further from the data's than their noise allows."""
    return layer.stale is not None and layer.stale > layer.stale_limit


def _worst(layer: LayerNoise) -> float:
    back = layer.backward_values
    return min(layer.forward_values, math.inf if back is None else back)


def read(
    layers: tuple[LayerNoise, ...],
    batch_size: int,
    *,
    trained: bool,
    others: tuple[ExampleNorm, ...] = (),
) -> Reading:
    """Interpret the measurements of all norms; see `diagnose` for the rules.

    ``trained`` says whether running statistics are those of a training.
    """
    words = {layer.name: word(layer) for layer in layers}
    noisy = [layer for layer in layers if words[layer.name] == "noisy"]
    edge = [layer for layer in layers if words[layer.name] == "borderline"]
    stale = tuple(layer.name for layer in layers if is_stale(layer))
    sentences = [_first_sentence(layers, noisy, edge, words)]
    method, options = (None, {}) if not noisy else _method(noisy, batch_size)
    if method is not None:
        sentences.append(_remedy(layers, noisy, method, options, batch_size))
    if noisy and trained:
        sentences.append(
            "Without retraining: anybatch.tune_example_weight weighs the example at hand into the "
            "statistics of inference."
        )
    if stale:
        sentences.append(
            f"Running statistics of {_list(stale)} are not those of this data: evaluation is off. "
            "anybatch.recalibrate takes them from data."
        )
    sentences += _seams([*layers, *others])
    first = layers[0].mean if layers else None
    if first is not None and first.expected and first.measured > 1.5 * first.expected:
        sentences.append(
            f"The mean of {layers[0].name or 'the model'} is {first.measured / first.expected:.1f} "
            "times as noisy as its examples let expect: the examples of a batch are alike. Shuffle "
            "them, or take them from different sources."
        )
    problem: Literal["yes", "perhaps", "no"] = "yes" if noisy else "perhaps" if edge else "no"
    names = tuple(layer.name for layer in noisy)
    return Reading(problem, names, stale, method, options, tuple(sentences))


def _seams(norms: Sequence[LayerNoise | ExampleNorm]) -> list[str]:
    """A sentence on the norm with the largest seam, if it is large."""
    worst = max(norms, key=lambda norm: norm.seam or 0.0)
    if (worst.seam or 0.0) < _SEAM_FROM:
        return []
    return [
        f"Tiles of an image are normalized differently: the output of {worst.name or 'the model'} "
        f"changes by {worst.seam:.2f} where halves go through it apart. Norms with running "
        "statistics, such as bn, brn and mabn, have no such seams."
    ]


def _first_sentence(
    layers: tuple[LayerNoise, ...],
    noisy: list[LayerNoise],
    edge: list[LayerNoise],
    words: Mapping[str, Word],
) -> str:
    if not layers:
        return "No norm depends on the batch."
    if noisy:
        worst = min(noisy, key=_worst)
        some = f"{len(noisy)} of {len(layers)} norms" if len(noisy) < len(layers) else "every norm"
        return (
            f"Batch normalization is the problem here, in {some}: at worst, in "
            f"{worst.name or 'the model'!r}, a batch's statistics are as noisy as those of "
            f"{_count(_worst(worst))} independent values; from {QUIET_FROM:.0f} on they do no harm."
        )
    if edge:
        names = _list(layer.name for layer in edge)
        return f"Batch normalization may cost a little here, in {names}; larger batches would tell."
    if all(found == "averaged" for found in words.values()):
        return "Every norm averages over steps already: a batch's own noise is not what they use."
    return "Batch normalization is not the problem here: look elsewhere."


def _method(noisy: list[LayerNoise], batch_size: int) -> tuple[str, dict[str, Any]]:
    worst = min(map(_worst, noisy))
    if worst < _ONE_STEP_TOO_FEW:
        return "mabn", {"window": max(math.ceil(_WANTED / worst - 0.05), 16)}
    return "mbn", {
        "batch_size": batch_size,
        "ideal_batch_size": round(batch_size * _WANTED / worst),
    }


def _remedy(
    layers: tuple[LayerNoise, ...],
    noisy: list[LayerNoise],
    method: str,
    options: Mapping[str, Any],
    batch_size: int,
) -> str:
    given = "".join(f", {name}={value}" for name, value in options.items())
    some = (
        ", where=lambda name, _: name in diagnosis.reading.noisy"
        if len(noisy) < len(layers)
        else ""
    )
    scheduled = "; step an anybatch.NormScheduler once an epoch" if method == "mbn" else ""
    parts = []
    if any(layer.forward_values < NOISY_BELOW for layer in noisy):
        parts.append("mean and variance")
    if any((layer.backward_values or math.inf) < NOISY_BELOW for layer in noisy):
        parts.append("the backward statistics")
    return (
        f"Too noisy at batch {batch_size}: {' and '.join(parts)}. Train with "
        f'anybatch.convert(model, "{method}"{given}{some}){scheduled}; or larger batches.'
    )


def _list(names: Iterable[str]) -> str:
    names = [name or "the model" for name in names]
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
