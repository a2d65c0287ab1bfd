"""Gradients of a batch's mean and variance with respect to the weights of the bound layer.

As cross-iteration-bn has them (appendix B): of the mean the average input patch, of the variance
twice the covariance of output and patch; in the second order the patches' covariance too.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.backends.aten import patches
from anybatch.backends.aten.patches import ConvCall, Geometry
from anybatch.core.gradient_accumulation import AccumulatedMoments
from anybatch.core.reduction_scope import ReductionScope


class StatisticsGradients(NamedTuple):
    """Settings for the gradients of statistics.

    Attributes:
        order: Terms of the Taylor polynomial, 1 or 2.
        sample: Positions that they are estimated from; None for all.
        first: The first of these, in the sequence of `patches.covering_points`.
    """

    order: int
    sample: int | None
    first: Tensor

    def of_batch(self, feed: ConvCall, y: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Gradients of a batch's own mean and variance with respect to the weights (appendix B)."""
        geometry, dtype = feed.geometry, mean.dtype
        x, y = feed.x.to(dtype), y.to(dtype)
        plain = nullcontext() if y.is_meta else torch.autocast(y.device.type, enabled=False)
        with plain:
            sample = self.sample
            few = sample is not None and sample < y.numel() // y.shape[1]
            if not few and self.order == 1:
                patch = patches.mean_patch(geometry, x, y)
                slope = patches.var_gradient(geometry, x, y, mean, patch)
                return {"mean_gradient": patch, "var_gradient": slope}
            points = self._points(sample, y) if few else patches.all_points(y)
            values, seen = patches.sampled_patches(geometry, x, y, points)
            patch = seen.mean(0)
            apart, seen = values - mean, (seen - patch).transpose(0, 1)  # (groups, n, fan_in)
            apart = apart.unflatten(1, (geometry.groups, -1)).permute(1, 2, 0)
            slope = torch.matmul(apart, seen).flatten(0, 1).mul_(2 / points.shape[1])
            found = {"mean_gradient": patch, "var_gradient": slope}
            if self.order == 2:
                product = torch.matmul(seen.transpose(1, 2), seen)
                found["patch_covariance"] = product.div_(points.shape[1])
            return found

    def of_source(
        self, feed: ConvCall, y: Tensor, mean: Tensor, source: ReductionScope
    ) -> dict[str, Tensor]:
        """`of_batch` where a mask or processes decide which elements contribute.

        Args:
            feed: What the bound layer did in this process.
            y: What it put out.
            mean: Of all processes' values.
            source: Which these are.
        """
        geometry, dtype = feed.geometry, mean.dtype
        x, y = feed.x.to(dtype), y.to(dtype)
        with torch.autocast(y.device.type, enabled=False):
            weight, *sums = self._sums(geometry, x, y, mean, source.mask)
            count = mean.new_tensor(float(y.numel() // y.shape[1]))
            if source.mask is not None:
                count = source.mask.sum().to(dtype)
            count = count * (weight > 0)  # a sample may have missed what is valid
            scale = count / weight.clamp(min=1)
            total, *summed = source.sum(count, *(table * scale for table in sums))
            assert total is not None
            patch, slope, apart, *square = (t / total.clamp(min=1) for t in summed if t is not None)
            apart = apart.view(geometry.groups, -1, 1) * patch.unsqueeze(1)
            found = {"mean_gradient": patch, "var_gradient": 2 * (slope - apart.flatten(0, 1))}
            if square:
                outer = patch.unsqueeze(2) * patch.unsqueeze(1)
                found["patch_covariance"] = square[0] - outer
            return found

    def _sums(
        self, geometry: Geometry, x: Tensor, y: Tensor, mean: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        """The number of valid positions, or of some of them, and sums over them.

        Of patches; of ``y - mean`` times patches; of ``y - mean``; in the second order of products
        of patches.
        """
        groups, fan_in, sample = geometry.groups, geometry.fan_in, self.sample
        if y.numel() == 0:
            shapes: list[tuple[int, ...]] = [(groups, fan_in), (y.shape[1], fan_in), (y.shape[1],)]
            shapes += [(groups, fan_in, fan_in)] if self.order == 2 else []
            return [mean.new_zeros(()), *(mean.new_zeros(shape) for shape in shapes)]
        few = sample is not None and sample < y.numel() // y.shape[1]
        offset = y - mean.view(1, -1, *(1,) * (y.dim() - 2))
        if not few and self.order == 1:
            valid = torch.ones_like(y) if mask is None else mask.to(y.dtype).expand_as(y)
            met = patches.raw_gradient(geometry, x, valid.contiguous())
            offset = offset * valid
            slope = patches.raw_gradient(geometry, x, offset)
            aside = offset.transpose(0, 1).flatten(1).sum(1)
            return [valid[:, 0].sum(), met.unflatten(0, (groups, -1))[:, 0], slope, aside]
        points = self._points(sample, y) if few else patches.all_points(y)
        values, seen = patches.sampled_patches(geometry, x, offset, points)
        if mask is not None:
            weights = patches.values_at(mask, points).to(values.dtype)  # (n, 1)
            values, seen = values * weights, seen * weights.unsqueeze(2)
        number = values.new_tensor(float(len(values))) if mask is None else weights.sum()
        grouped = values.unflatten(1, (groups, -1)).permute(1, 2, 0)  # (groups, outputs, n)
        rows = seen.transpose(0, 1)  # (groups, n, fan_in)
        sums = [number, seen.sum(0), torch.matmul(grouped, rows).flatten(0, 1), values.sum(0)]
        if self.order == 2:
            sums.append(torch.matmul(rows.transpose(1, 2), rows))
        return sums

    def _points(self, count: int | None, y: Tensor) -> Tensor:
        """The positions of this step: the next ones of a sequence that covers the unit cube."""
        assert count is not None
        return patches.covering_points(self.first, count, y.dim() - 1)


def pool_gradients(
    new: dict[str, Tensor], old: dict[str, Tensor], seen: AccumulatedMoments
) -> None:
    """Join a micro-batch's gradients with those of the optimizer step before it."""
    assert seen.own_mean is not None and seen.earlier_mean is not None
    share = seen.share
    both = share * (1 - share)
    patch_apart = new["mean_gradient"] - old["mean_gradient"]
    groups = patch_apart.shape[0]
    means_apart = (seen.own_mean - seen.earlier_mean).view(groups, -1, 1)
    across = (means_apart * patch_apart.unsqueeze(1)).flatten(0, 1)
    for name in ("mean_gradient", "var_gradient", "patch_covariance"):
        if name in new:
            new[name] = torch.lerp(old[name], new[name], share)
    new["var_gradient"] = new["var_gradient"] + across * (2 * both)
    if "patch_covariance" in new:
        square = patch_apart.unsqueeze(2) * patch_apart.unsqueeze(1)
        new["patch_covariance"] = new["patch_covariance"] + square * both


def settle(new: dict[str, Tensor], feed: ConvCall, order: int) -> None:
    """Add what the compensation subtracts: the products with the weights of this step."""
    rows = feed.rows.to(new["var"].dtype)
    grouped = rows.view(feed.geometry.groups, -1, feed.geometry.fan_in)
    new["mean_base"] = (new["mean_gradient"].unsqueeze(1) * grouped).sum(-1).flatten()
    new["var_base"] = (new["var_gradient"] * rows).sum(-1)
    if feed.bias is not None:
        new["mean"] = new["mean"] - feed.bias
    if order == 2:
        new["weight_rows"] = rows


def compensated(
    slot: dict[str, Tensor], feed: ConvCall | None, order: int
) -> tuple[Tensor, Tensor]:
    """Means and variances of all slots at today's weights (equations 7, 8 and 10).

    In variances equations 8 and 10 are ``max(var + (d var / d w) dw - ((d mean / d w) dw)^2,
    0)``. The gradients' products with the weights of their step are kept, not the weights:
    ``(d var / d w) (w - w_t) = (d var / d w) w - var_base``. A bias moves the mean by itself.
    """
    means, variances = slot["mean"], slot["var"]
    if feed is None:
        return means, variances
    rows = feed.rows.to(means.dtype)
    grouped = rows.view(feed.geometry.groups, -1, feed.geometry.fan_in)
    moved = (slot["mean_gradient"].unsqueeze(2) * grouped).sum(-1).flatten(1)
    shift = moved - slot["mean_base"]
    change = (slot["var_gradient"] * rows).sum(-1) - slot["var_base"]
    if order == 1:
        change = change - shift.square()
    else:
        apart = (rows - slot["weight_rows"]).unflatten(1, grouped.shape[:2])
        curved = torch.matmul(apart, slot["patch_covariance"])
        change = change + (curved * apart).sum(-1).flatten(1)
    means = means + shift
    if feed.bias is not None:
        means = means + feed.bias
    return means, (variances + change).clamp_(min=0)
