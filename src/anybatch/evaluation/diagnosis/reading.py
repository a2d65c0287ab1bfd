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
NETWORK_NOISY_BELOW = 2.5  # all norms together
NETWORK_QUIET_FROM = 5.0
_SEAM_FROM = 0.05  # of an output's standard deviation
_WANTED = 32.0  # independent values that a method with averages is set to reach
_WANTED_TOGETHER = 8.0
_MABN_ABOVE = 8.0  # times the values that a batch has, that are wanted; up to it, mbn
_AVERAGING = ("mbn", "mabn", "brn")

Word = Literal["noisy", "borderline", "quiet", "averaged", "dead"]


@dataclass(frozen=True)
class Reading:
    """The interpretation of a diagnosis.

    Attributes:
        problem: Whether batch normalization is the problem: "yes", "perhaps" or "no".
        network_values: Independent values that are as noisy as all norms together: the inverse of
            the sum of theirs.
        noisy: Names of the norms whose statistics are too noisy.
        stale: Names of the norms whose running statistics are not those of the data.
        method: Short name of the method to use; None where none is needed.
        options: Its options.
        sentences: The same in words.
    """

    problem: Literal["yes", "perhaps", "no"]
    network_values: float
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
    together = _together(layers)
    problem: Literal["yes", "perhaps", "no"] = "no"
    if noisy or together < NETWORK_NOISY_BELOW:
        problem = "yes"
    elif edge or together < NETWORK_QUIET_FROM:
        problem = "perhaps"
    sentences = [_first_sentence(layers, noisy, edge, words, together)]
    method, options = (None, {}) if problem != "yes" else _method(layers, batch_size, together)
    if method is not None:
        sentences.append(_remedy(layers, noisy, method, options, batch_size))
    if problem == "yes" and trained:
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
    names = tuple(layer.name for layer in noisy)
    return Reading(problem, together, names, stale, method, options, tuple(sentences))


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


def _uses_batches(layer: LayerNoise) -> bool:
    return word(layer) not in ("averaged", "dead")


def _together(layers: Iterable[LayerNoise]) -> float:
    """Independent values that are as noisy as all norms together: their noise adds up."""
    noise = sum(1 / max(_worst(layer), 1e-9) for layer in layers if _uses_batches(layer))
    return 1 / noise if noise else math.inf


def _first_sentence(
    layers: tuple[LayerNoise, ...],
    noisy: list[LayerNoise],
    edge: list[LayerNoise],
    words: Mapping[str, Word],
    together: float,
) -> str:
    if not layers:
        return "No norm depends on the batch."
    several = sum(map(_uses_batches, layers)) > 1
    all_norms = (
        f"as those of {_count(together)} independent values ({NETWORK_QUIET_FROM:.0f} do no harm)"
    )
    if noisy:
        worst = min(noisy, key=_worst)
        some = f"{len(noisy)} of {len(layers)} norms" if len(noisy) < len(layers) else "every norm"
        return (
            f"Batch normalization is the problem here, in {some}. A batch's statistics are as "
            f"noisy as those of {_count(_worst(worst))} independent values in "
            f"{worst.name or 'the model'!r}, the worst ({QUIET_FROM:.0f} do no harm)"
            + (f", and in all norms together {all_norms}." if several else ".")
        )
    together_said = f"All norms together are as noisy {all_norms}."
    if together < NETWORK_NOISY_BELOW:
        return (
            "Batch normalization is the problem here: no norm is very noisy alone, but their "
            f"noise adds up. {together_said}"
        )
    if edge or together < NETWORK_QUIET_FROM:
        where = f", in {_list(layer.name for layer in edge)}" if edge else ""
        first = f"Batch normalization may cost a little here{where}; larger batches would tell."
        return f"{first} {together_said}" if several else first
    if all(found == "averaged" for found in words.values()):
        return "Every norm averages over steps already: a batch's own noise is not what they use."
    return "Batch normalization is not the problem here: look elsewhere."


def _method(
    layers: tuple[LayerNoise, ...], batch_size: int, together: float
) -> tuple[str, dict[str, Any]]:
    worst = min(_worst(layer) for layer in layers if _uses_batches(layer))
    wanted = max(_WANTED / worst, _WANTED_TOGETHER / together)  # times what a batch has
    if wanted > _MABN_ABOVE:
        return "mabn", {"window": max(math.ceil(wanted - 0.05), 16)}
    return "mbn", {"batch_size": batch_size, "ideal_batch_size": round(batch_size * wanted)}


def _remedy(
    layers: tuple[LayerNoise, ...],
    noisy: list[LayerNoise],
    method: str,
    options: Mapping[str, Any],
    batch_size: int,
) -> str:
    given = "".join(f", {name}={value}" for name, value in options.items())
    some, rest = "", [layer for layer in layers if layer not in noisy]
    if rest and noisy and _together(rest) >= NETWORK_QUIET_FROM:
        some = ", where=lambda name, _: name in diagnosis.reading.noisy"
    scheduled = "; step an anybatch.NormScheduler once an epoch" if method == "mbn" else ""
    parts = []
    if any(layer.forward_values < NOISY_BELOW for layer in noisy):
        parts.append("mean and variance")
    if any((layer.backward_values or math.inf) < NOISY_BELOW for layer in noisy):
        parts.append("the backward statistics")
    what = " and ".join(parts) or "all norms together"
    return (
        f"Too noisy at batch {batch_size}: {what}. Train with "
        f'anybatch.convert(model, "{method}"{given}{some}){scheduled}; or larger batches.'
    )


def _list(names: Iterable[str]) -> str:
    names = [name or "the model" for name in names]
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
