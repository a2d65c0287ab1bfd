"""Measuring each batch norm of a network on data: is batch normalization the problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.conversion.decisions import is_fresh
from anybatch.conversion.module_swap import unwrapped
from anybatch.core.arguments import check_count, check_module
from anybatch.evaluation.batches import Forward, Shown, device_of, examples_in, reading, recut, run
from anybatch.evaluation.diagnosis.outputs import OutputProbe, compare_outputs, example_norms
from anybatch.evaluation.diagnosis.probe import NormProbe, measurable_norms
from anybatch.evaluation.diagnosis.reading import read
from anybatch.evaluation.diagnosis.result import Diagnosis
from anybatch.evaluation.restore_model import borrowed, kept_modes
from anybatch.layers.control import no_update

_ROUGH_BELOW = 20  # batches
_COMPARED = 8  # batches whose outputs are compared, between modes and between tiles

Loss = Callable[[Any, Any], Tensor]


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
      between a batch's and the running statistics ("gap");
    - on the first 8 batches, the difference between its output in the network with the norms in
      training and in evaluation mode ("disparity"), and the change of its output in evaluation
      where halves of an image are normalized apart ("seam"; of group and instance norms as well)::

          disparity = rms(y_train - y_eval) / std(y_eval)    seam = rms(y_halves - y) / std(y)

    The reading follows from these numbers, not from the batch size:

    - a norm is *noisy* if it acts as fewer than 8 values forward or backward, *borderline* below
      16, else *quiet*; one that averages over steps (mbn, mabn, brn) is *averaged*;
    - it is *stale* if its running statistics are further from the data's than 0.1 and three times
      what the noise of both explains;
    - the noise of the norms adds up: all together act as ``1 / sum(1 / values)`` values, each norm
      with those that it acts as;
    - batch normalization is the problem if a norm is noisy or all together act as fewer than 2.5
      values, perhaps if a norm is borderline or they act as fewer than 5;
    - the method shall have 32 values in the noisiest norm and 8 in all together. Where that is more
      than 8 times what a batch has, it is mabn with such a window, else mbn with the batch size and
      an ideal one in that proportion (on the way back it weighs the batch's statistics by 1 -
      lambda). The whole network is converted, unless its other norms together act as 5 or more;
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
        loss: `loss(output, batch)` gives a scalar (default: the output's own "loss", or the sum of
            a mapping of losses; else cross entropy, where the second of the batch holds whole
            numbers, one an example; else there is no backward pass).
        max_batches: how many batches to measure (default 100); the noise is then known to 7 % for
            one channel, to 1 % for fifty.
        progress: show a bar (default None: where standard error is a terminal), or a function
            that is called with the batches done and their number.

    Returns:
        The `Diagnosis`.

    Raises:
        ValueError: there is no norm to measure, or there are fewer than two batches.
        TypeError: an argument of another type.

    Source: momentum-bn, section 3; moving-average-bn, section 3 and Figure 2; the limits are where
    batch normalization begins to lose accuracy in Wu and He, Group Normalization, 2018, on the
    digits of `anybatch compare`, and on residual networks on CIFAR-100.

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
    norms, notes = check_measurable(model)
    others = [OutputProbe(name, norm) for name, norm in example_norms(model).items()]
    probes = [NormProbe(name, norm, max_batches) for name, norm in norms.items()]
    fresh = is_fresh(model)
    taken = _Measurement(model, probes, others, forward, loss, fresh)
    cut = loader if batch_size is None else recut(loader, batch_size)
    device = device_of(model)
    reader = reading(cut, device=device, max_batches=max_batches, progress=progress)
    with borrowed(model, None if model.training else True), no_update(), reader as batches:
        taken.measure(batches)
    used = [probe for probe in probes if probe.batch]
    for probe in probes:
        if not probe.called:
            still = "it uses no statistics of a batch" if not probe.active else "it was not called"
            notes.append(f"{probe.name or 'the model'}: {still}; it is not measured.")
        elif probe.skipped:
            notes.append(f"{probe.name}: {probe.skipped} groups of another size are left out.")
    if taken.done < 2:
        raise ValueError(
            f"loader: {taken.done} batch of {batch_size or 'its'} examples; noise takes two or more"
        )
    if not used and not others:
        raise ValueError("model: none of its batch norms uses the statistics of a batch here")
    layers = tuple(probe.summary(fresh) for probe in used if len(probe.batch) > 1)
    alone = tuple(probe.of_examples() for probe in others)
    if layers and taken.losses == [] and not taken.has_loss:
        notes.append(
            "No loss is known for the model's output: g and Psi are not measured. Give loss=."
        )
    if taken.no_eval_loss is not None:
        notes.append(
            "loss cannot be taken of what the model gives in evaluation mode "
            f"({taken.no_eval_loss}): there is no loss in evaluation."
        )
    size = batch_size or (used[0].examples if used else taken.size)
    if taken.done < _ROUGH_BELOW:
        notes.append(f"Only {taken.done} batches were seen: the noise is known roughly.")
    train_loss, eval_loss = taken.mean_losses()
    said = read(layers, size, trained=not fresh, others=alone)
    return Diagnosis(layers, size, taken.done, train_loss, eval_loss, said, tuple(notes), alone)


def check_measurable(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Find a network's batch norms, with a note on each that is not measured.

    Raises:
        ValueError: If there is none, and no norm of examples either.
    """
    norms, notes = measurable_norms(model)
    if not norms and not example_norms(model):
        raise ValueError(
            f"model: {type(model).__name__} has no batch norm to measure, and no group or instance "
            "norm; layer norms depend neither on the batch nor on the image"
            + "".join(f"; {note}" for note in notes)
        )
    return norms, notes


class _Measurement:
    """The passes over the data: forwards, losses and backward passes."""

    def __init__(
        self,
        model: nn.Module,
        probes: list[NormProbe],
        others: list[OutputProbe],
        forward: Forward | None,
        loss: Loss | None,
        fresh: bool,
    ) -> None:
        self.model, self.probes, self.forward, self.loss = model, probes, forward, loss
        self.outputs = [*(probe.outputs for probe in probes), *others]
        self.fresh = fresh
        self.done = self.size = 0
        self.losses: list[tuple[float, float | None]] = []
        self.has_loss = False
        self.goal: Tensor | None = None
        self.no_eval_loss: str | None = None  # why

    def measure(self, batches: Iterable[Any]) -> None:
        for probe in self.probes:  # running statistics stay as they are
            probe.hold_still()
            probe.attach(lambda: self.goal)
        for batch in batches:
            loss = self._train(batch)
            self.losses += [] if loss is None else [(loss, self._evaluate(batch))]
            if self.done < _COMPARED:
                self._compare(batch)
            self.size = self.size or examples_in(batch)
            self.done += 1

    def _compare(self, batch: Any) -> None:
        """Measure disparities and seams, the probes of noise at rest."""
        for probe in self.probes:
            probe.paused = True
        forward = partial(run, self.model, batch, self.forward)
        compare_outputs(self.model, self.outputs, forward, not self.fresh)
        for probe in self.probes:
            probe.paused = False

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

    def _evaluate(self, batch: Any) -> float | None:
        """The loss of the batch in evaluation mode."""
        if self.fresh or any(probe.norm.running_mean is None for probe in self.probes):
            return None
        self.goal = None
        with kept_modes(self.model), torch.no_grad():
            self.model.eval()
            output = run(self.model, batch, self.forward)
            try:
                loss = self._loss(output, batch)
            except Exception as error:  # a loss of one's own, of what only training gives
                self.no_eval_loss = f"{type(error).__name__}: {error}".splitlines()[0]
                return None
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
        parts = list(output.values()) if isinstance(output, Mapping) else []
        if parts and all(isinstance(p, Tensor) and p.dim() == 0 and p.requires_grad for p in parts):
            return torch.stack(parts).sum()  # those of a detector
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
