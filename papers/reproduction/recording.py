"""The statistics of one norm along a training, forward and backward.

A norm cuts a batch into normalization batches, whose statistics are noted beside those of the whole
batch: what few examples tell, and what many would have told of the same weights. The average over
recent normalization batches stands between them.
"""

from collections import deque
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from anybatch.core.grouping import partition
from anybatch.core.norm_layer import NormLayer
from anybatch.evaluation.diagnosis.probe import measurable_norms
from anybatch.tools.run import Run
from anybatch.tools.training import Observe
from papers.reproduction.readings import STATISTICS
from papers.reproduction.runs import RecordedRun

_FORWARD, _BACKWARD = STATISTICS[:3], STATISTICS[3:]


class Recorder:
    """Record the statistics of a norm, step by step.

    With Y the normalized input before scale and shift, and L the loss of an example::

        mean = E[X],   variance = E[(X - mean)^2],   second moment = E[X^2]
        g    = E[dL/dY],   Psi = E[Y dL/dY]

    over the examples and positions of a normalization batch, of the first one in a batch; over all
    of the batch, or its first `reference` examples; and averaged over the last `window`
    normalization batches up to that first one. Y is what the layer made, whatever statistics it
    took, so that Psi of the whole batch is the mean of those of its parts.

    Args:
        run: What is noted, and how often.
        model: The network; it is in training mode when its steps are noted.
        steps: Steps in an epoch.

    Raises:
        ValueError: If the network has no such norm or channel.

    Source: moving-average-bn, equation 5, section 4.2 and figures 2 to 4; momentum-bn, figure 1.

    Example:
        >>> run = RecordedRun(method="bn", keeps="channel", epochs=1)
        >>> model = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4))
        >>> recorder = Recorder(run, model, steps=1)
        >>> _ = model(torch.randn(2, 64))
        >>> sorted(recorder.series())
        ['mean', 'step', 'variance']
    """

    def __init__(self, run: RecordedRun, model: nn.Module, steps: int) -> None:
        norms = list(measurable_norms(model)[0].values())
        if run.norm >= len(norms):
            raise ValueError(f"norm={run.norm}: give 0 to {len(norms) - 1}, the norms there are")
        self.run, self.norm, self.steps = run, cast(Any, norms[run.norm]), steps
        if run.channel >= self.norm.num_features:
            raise ValueError(f"channel={run.channel}: give 0 to {self.norm.num_features - 1}")
        self.done = 0
        self.notes: dict[str, list[float]] = {}
        self.past: dict[str, deque[Tensor]] = {
            name: deque(maxlen=max(run.window - 1, 1)) for name in STATISTICS
        }
        self.norm.register_forward_hook(self._forward)

    @property
    def _recording(self) -> bool:
        """Whether the step under way is one of those that are noted."""
        since = self.done - 1 - (self.run.first_epoch - 1) * self.steps
        return since >= 0 and since % self.run.every == 0

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        self.done += 1
        x = _rows(args[0].detach())
        sizes = self._sizes(len(x))
        mean, square = (_pooled(t.mean(2), sizes) for t in (x, x.square()))
        variance = square - mean.square()
        if self.run.keeps == "channel":
            if self._recording:
                found = {"mean": mean, "variance": variance}
                self._add("step", float(self.done))
                for name, table in found.items():
                    self._add(name, float(table[0, self.run.channel]))
            return
        weights = self._weights(sizes, mean)
        whole_mean, whole_square = weights @ mean, weights @ square
        if self._recording:
            self._add("step", float(self.done))
        tables = (mean, variance, square)
        wholes = (whole_mean, whole_square - whole_mean.square(), whole_square)
        for name, table, whole in zip(_FORWARD, tables, wholes, strict=True):
            self._note(name, table, whole)
        recording, y = self._recording, output.detach()
        if output.requires_grad:
            output.register_hook(lambda dy: self._backward(dy, y, sizes, recording))

    @torch.no_grad()
    def _backward(self, dy: Tensor, y: Tensor, sizes: tuple[int, ...], recording: bool) -> None:
        """Note g and Psi; the product with Y needs no division by a scale, which may be 0."""
        slope = _rows(dy) * len(dy)  # of an example's loss, where that of the batch is their mean
        shape = (1, -1, 1)
        weight, bias = (None if t is None else t.detach() for t in self._affine())
        product = slope * (_rows(y) if bias is None else _rows(y) - bias.to(slope).view(shape))
        if weight is not None:
            slope = slope * weight.to(slope).view(shape)
        weights = self._weights(sizes, slope)
        for name, each in zip(_BACKWARD, (slope, product), strict=True):
            table = _pooled(each.mean(2), sizes)
            self._note(name, table, weights @ table, recording)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.norm.weight, self.norm.bias

    def _note(self, name: str, table: Tensor, whole: Tensor, recording: bool | None = None) -> None:
        """Note the Euclidean norms of a statistic, and how far it is from the whole batch's."""
        if self._recording if recording is None else recording:
            past = list(self.past[name])[-(self.run.window - 1) :] if self.run.window > 1 else []
            average = torch.stack([*past, table[0]]).mean(0)
            for which, vector in (("batch", table[0]), ("whole", whole), ("average", average)):
                self._add(f"{name}, {which}", float(vector.norm()))
                if which != "whole":
                    self._add(f"{name}, error of {which}", float((vector - whole).norm()))
        self.past[name].extend(table)

    def _add(self, name: str, value: float) -> None:
        self.notes.setdefault(name, []).append(float(f"{value:.4g}"))

    def _sizes(self, examples: int) -> tuple[int, ...]:
        if not isinstance(self.norm, NormLayer):
            return (examples,)
        return partition(examples, self.norm.norm_batch_size, self.norm.group_size).sizes

    def _weights(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        """The share of each normalization batch in what stands for all."""
        left = self.run.reference or sum(sizes)
        ends = accumulate(sizes)
        kept = [size if end <= left else 0 for size, end in zip(sizes, ends, strict=True)]
        return torch.tensor(kept, dtype=like.dtype, device=like.device) / sum(kept)

    def series(self) -> dict[str, list[float]]:
        """Return the record: numbers by name, one per recorded step, beside the steps from 1 on."""
        return {name: list(values) for name, values in self.notes.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        past = {name: list(values) for name, values in self.past.items()}
        return {"done": self.done, "notes": self.series(), "past": past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self.done = state["done"]
        self.notes = {name: list(values) for name, values in state["notes"].items()}
        for name, values in state["past"].items():
            self.past[name].clear()
            self.past[name].extend(values)


def _rows(x: Tensor) -> Tensor:
    """``(N, C, L)``, in float64: the variance of few values is a difference."""
    return x.double().reshape(x.shape[0], x.shape[1], -1)


def _pooled(table: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Means over the examples of each part: ``(N, C)`` to ``(parts, C)``."""
    return torch.stack([part.mean(0) for part in table.split(sizes)])


def record(run: Run) -> Observe | None:
    """Return what records a run's statistics, None for a run that asks for no record."""
    return _recorder if isinstance(run, RecordedRun) else None


def _recorder(run: Run, model: nn.Module, steps: int) -> Recorder:
    assert isinstance(run, RecordedRun)
    return Recorder(run, model, steps)
