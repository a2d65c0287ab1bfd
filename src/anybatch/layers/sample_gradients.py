"""Statistics of a sample of the batch, and the gradient that passes them (bn-sampling)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch import backends
from anybatch.backends.aten import recorded
from anybatch.backends.protocol import Gradients, NormCall
from anybatch.core.reduction_scope import ReductionScope
from anybatch.layers.sample_positions import Part, part_moments


def mean_and_var(x: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, Tensor]:
    """Statistics of a normalization batch (equations 3 and 4)."""
    found = part_moments(x, parts)
    if len(parts) == 1:
        return found[0]
    (mean, var), (other_mean, other_var) = found
    share = parts[1].share
    return torch.lerp(mean, other_mean, share), torch.lerp(var, other_var, share)


class SampleFormula(NamedTuple):
    """The gradient of a norm by the statistics of a sample (equation 6).

    Attributes:
        parts: The parts of each normalization batch's sample; None where it has none here.
        mix: Weight of the virtual examples.
        scoped: Whether a mask or other processes contribute.
    """

    parts: tuple[tuple[Part | None, ...], ...]
    mix: float
    scoped: bool = False

    @property
    def moments(self) -> Callable[[Tensor, NormCall], tuple[Tensor, Tensor]] | None:
        """The sample's mean and variance, by operators that autograd records."""
        return None if self.scoped else self._moments

    def _moments(self, x: Tensor, call: NormCall) -> tuple[Tensor, Tensor]:
        found = []
        for piece, parts in zip(x.split(call.cut[0]), self.parts, strict=True):
            samples = [
                backends.take_dense(piece, part.sample) for part in parts if part is not None
            ]
            table = [recorded.moments(values, (values.shape[0],)) for values in samples]
            mean, var = (row[0] for row in table[0])
            if len(parts) > 1 and parts[1] is not None:
                share = parts[1].share
                mean = torch.lerp(mean, table[1][0][0], share)
                var = torch.lerp(var, table[1][1][0], share)
            found.append((mean, var))
        if len(found) == 1:
            return found[0]
        return torch.stack([mean for mean, _ in found]), torch.stack([var for _, var in found])

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, call: NormCall, needs: Sequence[bool]
    ) -> Gradients:
        chosen, sizes = call.statistics, call.cut[0]
        assert chosen is not None and chosen.mean is not None
        if call.scope is not None:
            return _shared_gradients(dy, x, weight, self, call, needs)
        if len(sizes) == 1:
            table = (chosen.mean, chosen.var, chosen.batch_weight)
            return _gradients(dy, x, weight, table, self.parts[0], call.eps, needs)
        share = chosen.batch_weight
        pieces = [
            _gradients(
                one_dy,
                one_x,
                weight,
                (chosen.mean[g], chosen.var[g], share[g] if isinstance(share, Tensor) else share),
                self.parts[g],
                call.eps,
                needs,
            )
            for g, (one_dy, one_x) in enumerate(zip(dy.split(sizes), x.split(sizes), strict=True))
        ]
        return _joined(pieces, needs)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    table: tuple[Tensor, Tensor, float | Tensor],
    parts: tuple[Any, ...],
    eps: float,
    needs: Sequence[bool],
) -> Gradients:
    """Equation 6: everywhere as by constants, then what passes the statistics, in the sample."""
    mean, var, share = table
    inner = needs[0] and not (isinstance(share, float) and share == 0)
    mask = (needs[0], needs[1] or inner, needs[2] or inner)
    dx, dw, db = backends.fixed_gradient(dy, x, mean, var, weight, eps, mask)
    if inner:
        assert dx is not None and dw is not None and db is not None
        inv = torch.rsqrt(var + backends.scalar(eps))
        on_dy = inv if weight is None else weight * inv
        passing = on_dy * share
        on_x, constant = passing * inv * dw, passing * db
        centers = [mean]
        if len(parts) > 1:  # of each part's variance; micro-batches pool by moving all of them
            own = [first for first, _ in part_moments(x, parts)]
            shift = mean - torch.lerp(own[0], own[1], parts[1].share)
            centers = [first + shift for first in own]
        for part, center in zip(parts, centers, strict=True):
            factor = backends.scalar(-part.share / part.values)
            dx = backends.put_gradient(
                dx, dy, x, part.sample, center, on_dy, on_x * factor, constant * factor
            )
    return dx, dw if needs[1] else None, db if needs[2] else None


def part_source_moments(
    x: Tensor, part: Part | None, mask: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of a part, of valid positions, of all processes."""
    if part is None:
        values = x.new_empty(0, x.shape[1])
        valid = None
    else:
        values = backends.take_dense(x, part.sample)
        valid = None if mask is None else backends.take_dense(mask, part.sample)
    mean, var, count = ReductionScope(valid, group).moments(values, (values.shape[0],), True)
    assert mean is not None
    return mean, var, count


def mix_parts(
    means: Tensor, variances: Tensor, counts: Tensor, mix: float
) -> tuple[Tensor, Tensor]:
    """Equation 4 over parts ``(P, C)``; one of a single value has no share."""
    shares = _shares(counts, mix, means)
    return (means * shares).sum(0), (variances * shares).sum(0)


def _shares(counts: Tensor, mix: float, like: Tensor) -> Tensor:
    """Weights ``(P, 1)`` of the parts; one of a single value has none."""
    shares = (counts > 1).to(like.dtype)
    if len(counts) > 1:
        shares = shares * torch.tensor([mix, 1 - mix], dtype=like.dtype, device=like.device)
    return (shares / shares.sum().clamp(min=1e-30)).unsqueeze(1)


def table_of(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows of several groups as tables; one stays a row."""
    if len(rows) == 1:
        return rows[0]
    means, variances = zip(*rows, strict=True)
    return torch.stack(means), torch.stack(variances)


def _shared_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    sample: SampleFormula,
    call: NormCall,
    needs: Sequence[bool],
) -> Gradients:
    """Equation 6 where only valid positions are sampled, or those of several processes."""
    chosen, sizes, source = call.statistics, call.cut[0], call.scope
    assert (
        chosen is not None
        and source is not None
        and chosen.mean is not None
        and chosen.counts is not None
    )
    masks = [None] * len(sizes) if source.mask is None else source.mask.split(sizes)
    shape = (len(sizes), x.shape[1])
    means, variances = chosen.mean.view(shape), chosen.var.view(shape)
    given = torch.as_tensor(chosen.batch_weight, dtype=means.dtype, device=means.device)
    given = given.expand(len(sizes), 1) if given.dim() == 0 else given.view(-1, 1)
    grads: list[tuple[Tensor, Tensor, Tensor]] = []
    pieces = zip(dy.split(sizes), x.split(sizes), masks, sample.parts, strict=True)
    for g, (one_dy, one_x, mask, parts) in enumerate(pieces):
        mean, var = means[g], variances[g]
        if one_x.numel():
            all_three = (True, True, True)
            dx, dw, db = backends.fixed_gradient(
                one_dy, one_x, mean, var, weight, call.eps, all_three
            )
            assert dx is not None and dw is not None and db is not None
        else:
            dx, (dw, db) = torch.empty_like(one_x), mean.new_zeros(2, *mean.shape)
        if needs[0]:
            counts, centers = chosen.counts[g], [mean]
            shares = _shares(counts, sample.mix, mean)
            if len(parts) > 1:  # of each part's variance; micro-batches pool by moving all of them
                own = [part_source_moments(one_x, part, mask, source.group)[0] for part in parts]
                middle = (torch.stack(own) * shares).sum(0)
                centers = [first + (mean - middle) for first in own]
            all_dw, all_db = source.sum(dw, db)
            assert all_dw is not None and all_db is not None
            inv = torch.rsqrt(var + backends.scalar(call.eps))
            on_dy = inv if weight is None else weight * inv
            passing = on_dy * given[g]
            for p, part in enumerate(parts):
                if part is None:
                    continue
                factor = -shares[p] / counts[p].clamp(min=1)
                on_x, constant = passing * inv * all_dw * factor, passing * all_db * factor
                rows = (centers[p], on_dy, on_x, constant)
                dx = backends.put_gradient(dx, one_dy, one_x, part.sample, *rows, mask)
        grads.append((dx, dw, db))
    return _joined(grads, needs)


def _joined(groups: Sequence[Gradients], needs: Sequence[bool]) -> Gradients:
    """The gradients of all groups as those of the batch."""
    dxs, dws, dbs = zip(*groups, strict=True)
    return (
        torch.cat(dxs) if needs[0] else None,
        torch.stack(dws).sum(0) if needs[1] else None,
        torch.stack(dbs).sum(0) if needs[2] else None,
    )
