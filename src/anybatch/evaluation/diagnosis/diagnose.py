"""Is batch normalization the problem here: each norm measured on data, and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.conversion.decisions import is_fresh
from anybatch.conversion.module_swap import unwrapped
from anybatch.core.arguments import check_count, check_module
from anybatch.evaluation.batches import Forward, Shown, device_of, reading, recut, run
from anybatch.evaluation.diagnosis.probe import LayerNoise, Spread, Watch, watched
from anybatch.evaluation.restore_model import borrowed
from anybatch.layers.control import no_update
from anybatch.registry import METHODS

NOISY_BELOW = 8.0  # independent values
QUIET_FROM = 16.0
WANTED = 32.0  # what a method that averages is set to reach
ROUGH_BELOW = 20  # batches
ONE_STEP_TOO_FEW = 4.0  # below it, mabn; from it on, mbn
_REMEMBER = ("mbn", "mabn", "brn")

Word = Literal["noisy", "borderline", "quiet", "averaged", "dead"]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Reading:
    """What the numbers say.

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


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; print it for a table.

    Attributes:
        layers: One `LayerNoise` a norm, in the order of the network.
        batch_size: Examples in a batch.
        batches: Batches seen.
        train_loss: Mean loss with the batches' statistics; None without a loss.
        eval_loss: Mean loss of the same batches in evaluation mode; None without a loss or where
            running statistics are as they started.
        reading: What the numbers say.
        notes: What else a reader must know.
    """

    layers: tuple[LayerNoise, ...]
    batch_size: int
    batches: int
    train_loss: float | None
    eval_loss: float | None
    reading: Reading
    notes: tuple[str, ...] = ()

    def word(self, layer: LayerNoise) -> Word:
        """The reading of one norm."""
        return word(layer)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists and dictionaries, ready for json.

        Returns:
            A dictionary; numbers that are not finite are None.
        """
        layers = [{**layer.to_dict(), "reading": word(layer)} for layer in self.layers]
        reading = {**asdict(self.reading), "options": dict(self.reading.options)}
        rest = {n: getattr(self, n) for n in ("batch_size", "batches", "train_loss", "eval_loss")}
        found = {**rest, "reading": reading, "notes": self.notes, "layers": layers}
        return _plain(found)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        lines = [HEAD, *(cells(layer) for layer in self.layers)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*table, "", *self.reading.sentences, *self.notes])

    def plot(self, path: str | Path) -> Path:
        """Write the noise of every norm as a picture, and the distributions of the noisiest.

        Args:
            path: of the file; its ending says which kind (.png, .svg, .pdf).

        Returns:
            The path.

        Raises:
            ImportError: Matplotlib is missing.
        """
        from anybatch.evaluation.diagnosis.report import figure

        figure(self).savefig(path, dpi=144)
        return Path(path)

    def report(self, path: str | Path) -> Path:
        """Write all of it as one HTML file that needs no other.

        Args:
            path: of the file.

        Returns:
            The path.

        Raises:
            ImportError: Matplotlib or Jinja is missing.
        """
        path = Path(path)
        path.write_text(self.page(), encoding="utf-8")
        return path

    def page(self) -> str:
        """What `report` writes.

        Returns:
            The HTML.
        """
        from anybatch.evaluation.diagnosis.report import page

        return page(self)


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
        "-" if layer.gap is None else f"{layer.gap:.2f}",
        word(layer) + (", stale" if is_stale(layer) else ""),
    )


def _noise(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.measured:.2f} ({spread.expected:.2f})"


def _count(values: float) -> str:
    return f"{values:.1f}" if values < 9.95 else f"{values:.0f}" if values < 1e6 else "many"


def word(layer: LayerNoise) -> Word:
    """Read one norm: see `diagnose` for the rules."""
    if layer.dead == layer.channels:
        return "dead"
    if any(layer.kind.startswith(METHODS[name].class_name) for name in _REMEMBER):
        return "averaged"
    worst = _worst(layer)
    return "noisy" if worst < NOISY_BELOW else "borderline" if worst < QUIET_FROM else "quiet"


def is_stale(layer: LayerNoise) -> bool:
    """Whether a norm's running statistics are further from the data's than their noise allows."""
    return layer.stale is not None and layer.stale > layer.stale_limit


def _worst(layer: LayerNoise) -> float:
    back = layer.backward_values
    return min(layer.forward_values, math.inf if back is None else back)


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batch_size: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    max_batches: int = 100,
    progress: Shown = None,
) -> Diagnosis:
    """Measure how noisy the statistics of each batch norm are on data, and say what to do.

    The network runs in training mode, forward and back, and is left exactly as it was. Of each norm
    of torch or of this library that uses the statistics of a batch, it measures

    - the noise of a batch's mean (xi_mu) and variance (xi_sigma, momentum-bn, equation 2) and of
      the two backward statistics g and Psi (moving-average-bn, equation 5): the standard deviation
      from batch to batch, in units of a single value's; beside it what the same examples drawn at
      random let expect, and what as many independent Gaussian values would give;
    - the number of independent Gaussian values that are as noisy: the lower of ``1 /
      noise(mean)^2`` and ``2 / noise(variance)^2`` forward, of ``1 / noise(g)^2`` and ``1 /
      noise(Psi)^2`` backward, and of both in the table ("acts as");
    - the difference that the noise makes to the output ("noise", the output being 1), and that
      between a batch's and the running statistics ("gap", training against evaluation).

    The reading follows from these numbers, not from the batch size:

    - a norm is *noisy* if it acts as fewer than 8 values forward or backward, *borderline* below
      16, else *quiet*; one that averages over steps (mbn, mabn, brn) is *averaged*;
    - it is *stale* if its running statistics are further from the data's than 0.1 and three times
      what the noise of both explains;
    - batch normalization is the problem if a norm is noisy, perhaps if one is borderline;
    - the method is mabn if the noisiest norm acts as fewer than 4 values, with the window that
      reaches 32, else mbn with the batch size and the ideal one in the proportion to reach 32 (on
      the way back it weighs the batch's statistics by 1 - lambda);
    - batches are not drawn at random if the first norm's mean is half as noisy again as its
      examples let expect; further on, noise of norms before does that, too.

    Args:
        model: the network, in the mode that its norms shall be measured in; one in evaluation mode
            is measured in training mode. Of a wrapped or compiled one, the network inside is run.
        loader: gives batches; they are taken to the model's device.
        batch_size: examples in a batch; batches are cut and joined to it (default None: as they
            come).
        forward: `forward(model, batch)` gives the output (default: the model is called with the
            first of a tuple or list, with a mapping as keyword arguments, or with the tensor).
        loss: `loss(output, batch)` gives a scalar (default: the output's own "loss"; else cross
            entropy, where the second of the batch holds whole numbers, one an example; else there
            is no backward pass).
        max_batches: how many batches to measure (default 100); the noise is then known to 7 % for
            one channel, to 1 % for fifty.
        progress: show a bar (default None: where standard error is a terminal), or a function
            that is called with the batches done and their number.

    Returns:
        The `Diagnosis`.

    Raises:
        ValueError: there is no norm to measure, or there are fewer than two batches.
        TypeError: an argument of another type.

    Source: momentum-bn, section 3; moving-average-bn, section 3 and Figure 2; the limits 8 and 16
    are where batch normalization begins to lose accuracy in Wu and He, Group Normalization, 2018,
    and on the digits of `anybatch compare`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 3))
        >>> data = [(torch.randn(64, 8), torch.randint(3, (64,))) for _ in range(40)]
        >>> print(diagnose(model, data, batch_size=2).reading.problem)
        yes
        >>> print(diagnose(model, data).reading.problem)
        no
    """
    check_module("model", model)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_count("max_batches", max_batches)
    model, _ = unwrapped(model)
    norms, notes = watched(model)
    if not norms:
        raise ValueError(
            f"model: {type(model).__name__} has no batch norm to measure; layer, group and "
            "instance norms do not depend on the batch"
        )
    watches = [Watch(name, norm, max_batches) for name, norm in norms.items()]
    fresh = is_fresh(model)
    taken = _Run(model, watches, forward, loss, fresh)
    cut = loader if batch_size is None else recut(loader, batch_size)
    device = device_of(model)
    reader = reading(cut, device=device, max_batches=max_batches, progress=progress)
    with borrowed(model, None if model.training else True), no_update(), reader as batches:
        taken.measure(batches)
    used = [watch for watch in watches if watch.batch]
    for watch in watches:
        if not watch.called:
            still = "it uses no statistics of a batch" if not watch.active else "it was not called"
            notes.append(f"{watch.name or 'the model'}: {still}; it is not measured.")
        elif watch.skipped:
            notes.append(f"{watch.name}: {watch.skipped} groups of another size are left out.")
    if taken.done < 2:
        raise ValueError(
            f"loader: {taken.done} batch of {batch_size or 'its'} examples; noise takes two or more"
        )
    if not used:
        raise ValueError("model: none of its batch norms uses the statistics of a batch here")
    layers = tuple(watch.summary(fresh) for watch in used if len(watch.batch) > 1)
    if taken.losses == [] and not taken.has_loss:
        notes.append("No targets and no loss: g and Psi are not measured. Give loss=.")
    size = batch_size or used[0].examples
    if taken.done < ROUGH_BELOW:
        notes.append(f"Only {taken.done} batches were seen: the noise is known roughly.")
    train_loss, eval_loss = taken.mean_losses()
    said = read(layers, size, trained=not fresh)
    return Diagnosis(layers, size, taken.done, train_loss, eval_loss, said, tuple(notes))


class _Run:
    """One taken: forwards, losses, backward passes."""

    def __init__(
        self,
        model: nn.Module,
        watches: list[Watch],
        forward: Forward | None,
        loss: Loss | None,
        fresh: bool,
    ) -> None:
        self.model, self.watches, self.forward, self.loss = model, watches, forward, loss
        self.fresh = fresh
        self.done = 0
        self.losses: list[tuple[float, float | None]] = []
        self.has_loss = False
        self.goal: Tensor | None = None

    def measure(self, batches: Iterable[Any]) -> None:
        modes = [(module, module.training) for module in self.model.modules()]
        for watch in self.watches:  # running statistics stay as they are
            watch.hold_still()
            watch.attach(lambda: self.goal)
        for batch in batches:
            loss = self._train(batch)
            self.losses += [] if loss is None else [(loss, self._evaluate(batch, modes))]
            self.done += 1

    def _train(self, batch: Any) -> float | None:
        with torch.enable_grad():
            self.goal = torch.zeros((), device=device_of(self.model), requires_grad=True)
            output = run(self.model, batch, self.forward)
            loss = self._loss(output, batch)
            if loss is None:
                return None
            self.has_loss = True
            if loss.requires_grad:
                torch.autograd.grad(loss, self.goal, allow_unused=True)
        return float(loss.detach())

    def _evaluate(self, batch: Any, modes: list[tuple[nn.Module, bool]]) -> float | None:
        """The loss of the batch in evaluation mode."""
        if self.fresh or any(watch.norm.running_mean is None for watch in self.watches):
            return None
        self.goal = None
        self.model.eval()
        try:
            with torch.no_grad():
                loss = self._loss(run(self.model, batch, self.forward), batch)
        finally:
            for module, mode in modes:
                module.training = mode
        return None if loss is None else float(loss)

    def _loss(self, output: Any, batch: Any) -> Tensor | None:
        if self.loss is not None:
            loss = self.loss(output, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"loss: it gave {loss!r}; let it give a tensor of one number")
            return loss.reshape(())
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(own, Tensor) and own.numel() == 1:
            return own.reshape(())
        if not (isinstance(output, Tensor) and isinstance(batch, (tuple, list)) and len(batch) > 1):
            return None
        target = batch[1]
        whole = isinstance(target, Tensor) and target.dtype == torch.long
        fits = whole and output.dim() >= 2 and target.shape == (len(output), *output.shape[2:])
        return F.cross_entropy(output, target) if fits else None

    def mean_losses(self) -> tuple[float | None, float | None]:
        """In training mode and in evaluation mode."""
        if not self.losses:
            return None, None
        train = sum(loss for loss, _ in self.losses) / len(self.losses)
        evaluated = [loss for _, loss in self.losses if loss is not None]
        return train, sum(evaluated) / len(evaluated) if evaluated else None


def read(layers: tuple[LayerNoise, ...], batch_size: int, *, trained: bool) -> Reading:
    """Say what the numbers of all norms come to: see `diagnose` for the rules.

    Args:
        layers: what was measured.
        batch_size: examples in a batch.
        trained: whether running statistics are those of a training.

    Returns:
        The reading.
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
    first = layers[0].mean
    if first is not None and first.expected and first.measured > 1.5 * first.expected:
        sentences.append(
            f"The mean of {layers[0].name or 'the model'} is {first.measured / first.expected:.1f} "
            "times as noisy as its examples let expect: the examples of a batch are alike. Shuffle "
            "them, or take them from different sources."
        )
    problem: Literal["yes", "perhaps", "no"] = "yes" if noisy else "perhaps" if edge else "no"
    names = tuple(layer.name for layer in noisy)
    return Reading(problem, names, stale, method, options, tuple(sentences))


def _first_sentence(
    layers: tuple[LayerNoise, ...],
    noisy: list[LayerNoise],
    edge: list[LayerNoise],
    words: Mapping[str, Word],
) -> str:
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
    if worst < ONE_STEP_TOO_FEW:
        return "mabn", {"window": max(math.ceil(WANTED / worst - 0.05), 16)}
    return "mbn", {"batch_size": batch_size, "ideal_batch_size": round(batch_size * WANTED / worst)}


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


def _plain(data: Any) -> Any:
    """Data as JSON knows it: lists, and None for numbers that are not finite."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
