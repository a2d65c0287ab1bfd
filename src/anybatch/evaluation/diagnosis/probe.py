"""Measuring the noise of the statistics that one norm takes from batches.

A batch gives each channel a mean and a variance forward, and two more statistics in the backward
pass (moving-average-bn, equation 5), with Y the normalized input before scale and shift::

    g   = mean(dL/dY)          Psi = mean(Y * dL/dY)

Each estimates a value of the whole data set. Its noise is its standard deviation from batch to
batch, in units of the standard deviation of a single value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch import theory
from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import first_input
from anybatch.core.grouping import partition
from anybatch.core.norm_layer import NormLayer
from anybatch.core.tensor_subclasses import as_plain, on_plain
from anybatch.evaluation.diagnosis.layer_noise import LayerNoise, Spread, histogram
from anybatch.evaluation.diagnosis.outputs import OutputProbe
from anybatch.evaluation.valid_positions import valid_positions
from anybatch.layers.l1_range_batch_norm import SpreadNorm
from anybatch.layers.sampled_batch_norm import SampledBatchNorm

KEPT_EXAMPLES = 512  # a layer, for what the examples alone let expect


class NormProbe:
    """Collects what goes into one norm, and the gradient of what comes out.

    Args:
        name: What to call it.
        norm: A batch norm of torch or of this library.
        total: Batches that are to come.
    """

    def __init__(self, name: str, norm: nn.Module, total: int) -> None:
        self.name, self.total = name, total
        self.norm = cast(Any, norm)
        self.centered = norm.centered if isinstance(norm, NormLayer) else True
        self.momentum: float | None = self.norm.momentum
        self.outputs = OutputProbe(name, norm)
        self.paused = False
        self.examples = 0
        self.called = self.skipped = 0
        self.positions = 0.0
        self.batch: list[tuple[Tensor, Tensor]] = []  # mean and variance, a row a batch
        self.each: list[tuple[Tensor, Tensor]] = []  # the same, a row an example
        self.back: list[tuple[Tensor, Tensor]] = []  # g and Psi, a row a batch
        self.back_each: list[tuple[Tensor, Tensor]] = []
        self.squares: list[tuple[Tensor, Tensor]] = []  # of dL/dY and Y dL/dY

    @property
    def active(self) -> bool:
        """True if the norm uses the statistics of a batch, as it stands."""
        if isinstance(self.norm, NormLayer):
            return self.norm.training and not self.norm.frozen
        return self.norm.training or self.norm.running_mean is None

    def hold_still(self) -> None:
        """Have torch's norm leave its running statistics alone, and take any batch.

        Layers of this library do both in `no_update`.
        """
        if isinstance(self.norm, _BatchNorm):
            self.norm.momentum = 0.0
            if "forward" not in self.norm.__dict__:
                self.norm.__dict__["forward"] = partial(_forward_of_any_batch, self.norm)

    def attach(self, source: Callable[[], Tensor | None]) -> Any:
        """Hook the norm.

        `source` gives the tensor that gradients are led to, or None for no backward pass. The
        result is a handle to take the hook off.
        """

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            given = as_plain(first_input(args, kwargs))
            if self.paused or not self.active or not given.numel():
                return None
            recomputed = in_backward()  # by activation checkpointing: seen before
            self.called += not recomputed
            mask = valid_positions(module, args, kwargs, given)
            valid = None if mask is None else mask.reshape(len(mask), 1, -1)
            moments = self._forward(given.detach(), valid, note=not recomputed)
            goal = source()
            if goal is None:
                return None
            # A copy: what follows may write into it, as an in-place ReLU does.
            return on_plain(lambda y: _probed(y, goal, given, valid, moments, self), output)

        return self.norm.register_forward_hook(hook, with_kwargs=True)

    def _sizes(self, examples: int) -> tuple[int, ...]:
        if not isinstance(self.norm, NormLayer):
            return (examples,)
        return partition(examples, self.norm.norm_batch_size, self.norm.group_size).sizes

    @torch.no_grad()
    def _forward(self, x: Tensor, valid: Tensor | None, note: bool) -> tuple[Tensor, Tensor] | None:
        """Note the statistics of a batch's groups; those of its first group, for backward."""
        rows = _rows(x)
        mean = _means(rows, valid).double()
        apart = rows - mean.to(rows.dtype).unsqueeze(2)
        var = _means(apart.square(), valid).double()
        if not self.centered:
            mean, var = torch.zeros_like(mean), var + mean.square()
        positions = _positions(rows, valid)
        first = None
        sizes = self._sizes(len(rows))
        self.examples = self.examples or sizes[0]
        tables = zip(mean.split(sizes), var.split(sizes), positions.split(sizes), strict=True)
        for means, variances, counts in tables:
            if len(means) != self.examples or not counts.any():
                self.skipped += note
                continue
            share = (counts / counts.sum()).unsqueeze(1)
            center = (means * share).sum(0)
            whole = center, ((variances + (means - center).square()) * share).sum(0)
            first = whole if first is None else first
            if not note:
                continue
            self.batch.append((whole[0].cpu(), whole[1].cpu()))
            self.positions += float(counts.mean())
            some = counts > 0
            self.each.append(self._part(means[some], variances[some]))
        return first if len(sizes) == 1 else None

    def _part(self, *tables: Tensor) -> tuple[Tensor, Tensor]:
        """As many rows of a batch as may be kept."""
        kept = max(KEPT_EXAMPLES // max(self.total, 1), 2)
        first, second = (table[:kept].float().cpu() for table in tables)
        return first, second

    @torch.no_grad()
    def backward(
        self, dy: Tensor, x: Tensor, valid: Tensor | None, mean: Tensor, var: Tensor
    ) -> None:
        """Note the two backward statistics of a batch (moving-average-bn, equation 5)."""
        weight = self.norm.weight
        slope = _rows(dy).float()
        if isinstance(weight, Tensor):
            slope = slope * weight.detach().to(slope.dtype).view(1, -1, 1)
        y = (_rows(x).to(slope.dtype) - mean.to(slope.dtype).view(1, -1, 1)) * torch.rsqrt(
            var + self._eps
        ).to(slope.dtype).view(1, -1, 1)
        product = y * slope
        positions = _positions(slope, valid)
        share = (positions / positions.sum()).unsqueeze(1)
        each = _means(slope, valid).double(), _means(product, valid).double()
        self.back.append(((each[0] * share).sum(0).cpu(), (each[1] * share).sum(0).cpu()))
        some = positions > 0
        self.back_each.append(self._part(each[0][some], each[1][some]))
        of_slope, of_product = (
            (_means(t.square(), valid).double() * share).sum(0).cpu() for t in (slope, product)
        )
        self.squares.append((of_slope, of_product))

    # --- the reading of what was noted -----------------------------------------

    def summary(self, fresh: bool) -> LayerNoise:
        """Summarize what was collected.

        With `fresh`, running statistics are as they started, and say nothing.

        Raises:
            ValueError: For fewer than two batches.
        """
        if len(self.batch) < 2:
            raise ValueError(f"{self.name}: {len(self.batch)} batch seen; noise takes two or more")
        means, variances = _table(self.batch)
        if not bool(means.isfinite().all() and variances.isfinite().all()):
            raise ValueError(
                f"model: the input of {self.name or 'it'} is not finite on these data; look for "
                "infinite inputs or weights before it"
            )
        mean, each_mean, each_var = means.mean(0), *_table(self.each, cat=True)
        var = variances.mean(0) + means.var(0, correction=0)
        alive = (var > 0) & torch.isfinite(var) & torch.isfinite(mean)
        unit = torch.where(alive, var, 1.0)
        values = self.examples * self.positions / len(self.batch)
        plain = theory.noise(values)
        xi_mean, xi_var = (mean - means) / unit.sqrt(), variances / unit
        apart = each_mean - mean
        square = each_var + apart.square()
        of_mean = _rms(apart.var(0) / unit / self.examples, alive)
        spread = Spread(_rms(xi_mean.var(0), alive), of_mean, plain.mean_std)
        of_var = _variance_of_variance(apart, square, self.examples, self.centered) / unit**2
        expected = _rms(of_var, alive)
        wanted = 1 / of_mean**2 if self.centered and of_mean else 2 / max(expected, 1e-12) ** 2
        effective = min(wanted, values)
        if not self.centered:
            plain = second_moment_noise(values)
        g, psi = self._backward_spreads(plain.mean_std)
        gap, stale = None, None
        if not fresh and not isinstance(self.norm, SpreadNorm):  # whose running_var is no variance
            gap, stale = self._against_running(means, variances, mean, var, alive)
        shift = _distance(means, variances, mean, var, self._eps)
        output = _root(shift[:, alive].square().mean())
        return LayerNoise(
            name=self.name,
            kind=type(self.norm).__name__,
            channels=means.shape[1],
            dead=int((~alive).sum()),
            examples=self.examples,
            values=values,
            effective=effective,
            mean=spread if self.centered else None,
            var=Spread(_rms(xi_var.var(0), alive), expected, plain.var_std),
            g=g if self.centered else None,
            psi=psi,
            output=output,
            gap=gap,
            stale=stale,
            stale_limit=max(0.1, 3 * output * math.sqrt(1 / len(means) + self._averaging())),
            disparity=self.outputs.root_mean_square("disparity"),
            seam=self.outputs.root_mean_square("seam"),
            mean_histogram=histogram(xi_mean[:, alive], plain.mean_std) if self.centered else None,
            var_histogram=histogram(xi_var[:, alive], plain.var_std, plain.var_mean),
        )

    @property
    def _eps(self) -> float:
        return float(self.norm.eps)

    def _averaging(self) -> float:
        """The share of a batch's noise that running statistics keep, as a variance."""
        return 0.0 if self.momentum is None else self.momentum / (2 - self.momentum)

    def _backward_spreads(self, independent: float) -> tuple[Spread | None, Spread | None]:
        if len(self.back) < 2:
            return None, None
        spreads: list[Spread | None] = []
        for batch, each, squares in zip(
            _table(self.back), _table(self.back_each, cat=True), _table(self.squares), strict=True
        ):
            single = squares.mean(0) - batch.mean(0).square()
            alive = (single > 0) & torch.isfinite(single)
            unit = torch.where(alive, single, 1.0)
            measured = _rms(batch.var(0) / unit, alive)
            expected = _rms(each.var(0) / unit / self.examples, alive)
            spread = Spread(measured, expected, independent)
            spreads.append(spread if bool(alive.any()) else None)
        return spreads[0], spreads[1]

    def _against_running(
        self, means: Tensor, variances: Tensor, mean: Tensor, var: Tensor, alive: Tensor
    ) -> tuple[float | None, float | None]:
        here, there = self.norm.running_mean, self.norm.running_var
        if not isinstance(here, Tensor) or not isinstance(there, Tensor):
            return None, None
        here, there = (row.detach().double().cpu() for row in (here, there))
        gap = _distance(means, variances, here, there, self._eps)
        stale = _distance(mean[None], var[None], here, there, self._eps)
        return _root(gap[:, alive].square().mean()), _root(stale[:, alive].square().mean())


def _probed(output: Tensor, *what: Any) -> Tensor:
    probed: Tensor = _GradientProbe.apply(output, *what)  # type: ignore[no-untyped-call]
    return probed


def _forward_of_any_batch(norm: _BatchNorm, input: Tensor) -> Tensor:
    """A torch norm's forward; its running statistics normalize a single value per channel."""
    if input.numel() > norm.num_features or not (norm.training or norm.running_mean is None):
        y: Tensor = type(norm).forward(norm, input)
        return y
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        mean = torch.zeros(norm.num_features, device=input.device, dtype=input.dtype)
        var = torch.ones_like(mean)
    return F.batch_norm(input, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)


class _GradientProbe(torch.autograd.Function):
    """Passes a norm's output on, and gives the gradient that comes back to a probe."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        goal: Tensor,
        given: Tensor,
        valid: Tensor | None,
        moments: tuple[Tensor, Tensor] | None,
        probe: NormProbe,
    ) -> Tensor:
        ctx.save_for_backward(given.detach(), goal, valid)
        ctx.moments, ctx.probe = moments, probe
        return output.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        given, goal, valid = ctx.saved_tensors
        if ctx.moments is not None:
            ctx.probe.backward(dy.detach(), given, valid, *ctx.moments)
        return dy, torch.zeros_like(goal), None, None, None, None


def second_moment_noise(values: float) -> theory.Noise:
    """The noise where no mean is subtracted: the second moment is a chi-square over m, all m free.

    Example:
        >>> second_moment_noise(8).var_std
        0.5
    """
    return theory.Noise(math.sqrt(1 / values), 1.0, math.sqrt(2 / values))


def measurable_norms(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """The batch norms of a network that can be measured, and a note on each of the others.

    Raises:
        ValueError: For a norm whose number of channels is not known yet.
    """
    found: dict[str, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._LazyNormBase):
            raise ValueError(
                f"model: the number of channels of {name!r} is not known yet; run one batch "
                "through it before"
            )
        if isinstance(module, NormLayer) and module.num_statistics != module.num_features:
            left.append(f"{name}: its channels share statistics; it is not measured.")
        elif isinstance(module, SampledBatchNorm):
            left.append(f"{name}: its statistics are those of a sample; it is not measured.")
        elif isinstance(module, (NormLayer, _BatchNorm)):
            found[name] = module
    return found, left


def _rows(x: Tensor) -> Tensor:
    """``(N, C, L)``, in a type that statistics can be taken in."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.reshape(x.shape[0], x.shape[1], -1)


def _positions(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Number of values per channel that count in each example."""
    if valid is None:
        return torch.full((len(rows),), rows.shape[2], dtype=torch.float64, device=rows.device)
    return valid.flatten(1).sum(1).double()


def _means(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of each example's values that count; 0 where there is none."""
    if valid is None:
        return rows.mean(2)
    return rows.masked_fill(~valid, 0).sum(2) / valid.sum(2).clamp(min=1)


def _table(rows: Sequence[tuple[Tensor, Tensor]], cat: bool = False) -> tuple[Tensor, Tensor]:
    first, second = zip(*rows, strict=True)
    join = torch.cat if cat else torch.stack
    return join(first).double(), join(second).double()


def _variance_of_variance(apart: Tensor, square: Tensor, n: int, centered: bool) -> Tensor:
    """Of the biased variance of n independent examples, from all examples' first two moments.

    With d the mean of an example less that of all data, and q its mean squared distance from that,
    the variance of a batch is ``mean(q) - mean(d)^2``; this is the variance of that, exactly.
    """
    q = square - square.mean(0)
    of_q = q.square().mean(0)
    if not centered:
        return of_q / n
    second, fourth = apart.square().mean(0), apart.pow(4).mean(0)
    both = (q * apart.square()).mean(0)
    of_square = (fourth - 3 * second.square()) / n**3 + 2 * second.square() / n**2
    return (of_q / n - 2 * both / n**2 + of_square).clamp(min=0)


def _distance(means: Tensor, variances: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Root mean square difference between a batch normalized by its own and by given statistics."""
    unit = (var + eps).sqrt()
    own = (variances + eps).sqrt() / unit
    return torch.hypot((means - mean) / unit, (own - 1) * (variances / (variances + eps)).sqrt())


def _rms(variances: Tensor, alive: Tensor) -> float:
    return _root(variances[alive].mean())


def _root(square: Tensor) -> float:
    return float(square.sqrt())
