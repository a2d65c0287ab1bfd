"""Normalization by given statistics: at inference, and of what a rule chose."""

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch import backends
from anybatch.backends.protocol import BackwardMemory, Formula, Statistics
from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import check_between
from anybatch.core.autograd import normalize_by
from anybatch.core.grouping import Partition, partition
from anybatch.core.norm_batch import updates
from anybatch.core.reduction_scope import ReductionScope
from anybatch.core.rule_layer import RuleLayer


class InferenceLayer(RuleLayer):
    """A layer that normalizes by running statistics at inference.

    Attributes:
        example_weight: Share of an example's own statistics at inference.
    """

    example_weight: float

    def formula(self, x: Tensor, cut: Partition, source: ReductionScope | None) -> Formula | None:
        """The method's own gradient by torch's operators; None for that of all.

        Args:
            x: The batch.
            cut: Its normalization batches.
            source: Which elements contribute to its statistics; None for all.
        """
        return None

    def track_none(self, x: Tensor) -> None:
        """Take part in what processes track together, with an empty batch of groups."""

    def _apply_statistics(
        self,
        x: Tensor,
        cut: Partition,
        chosen: Statistics,
        memory: BackwardMemory | None,
        source: ReductionScope | None = None,
    ) -> Tensor:
        """Normalize by what the rule decided."""
        weight, bias = self._parameters_like(chosen.var)
        how = (cut.sizes, chosen, self.eps, memory, source, self.formula(x, cut, source))
        return normalize_by(x, weight, bias, *how)

    def _empty(self, x: Tensor, training: bool = False) -> Tensor:
        """An empty batch: no statistics, no trace, gradients of zero."""
        if training and self.group_size is not None and updates.enabled and not in_backward():
            with torch.no_grad():
                self.track_none(x)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = x
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                y = y + parameter.view(shape)
        return y.to(x.dtype)

    def _infer(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        dtype = backends.statistics_dtype(x)
        mean, var = self.running_mean, self.running_var
        if var.dtype != dtype:
            mean, var = mean.to(dtype), var.to(dtype)
        if torch.is_grad_enabled() and not backends.is_traced():
            mean, var = mean.clone(), var.clone()  # a training forward may come before backward
        weight, bias = self._parameters_like(var)
        if self.num_statistics == self.num_features and not self.example_weight:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if backends.is_traced() and mask is None:  # operators that every exporter knows
            own = backends.example_moments(x, self.centered)
            statistics = self._mixed(*own, mean, var)
            return backends.example_affine(
                x, statistics.mean, statistics.var, weight, bias, self.eps
            )
        if x.numel() == 0:
            return self._empty(x)
        sizes = (1,) * x.shape[0]
        cut = partition(x.shape[0], 1)
        if mask is None:
            with torch.no_grad():
                own_mean, own_var, _ = self._moments(x.detach(), sizes, None)
                statistics = self._mixed(own_mean, own_var, mean, var)
            return self._apply_statistics(x, cut, statistics, None)
        source = ReductionScope(self._fit(mask, x).valid)
        with torch.no_grad():
            own_mean, own_var, counts = self._moments(x.detach(), sizes, source)
            assert counts is not None
            alpha = self.example_weight * (counts > 0).to(counts.dtype)  # none, no statistics
            statistics = self._mixed(own_mean, own_var, mean, var, alpha).of(counts)
        return self._apply_statistics(x, cut, statistics, None, source)

    def _mixed(
        self,
        own_mean: Tensor | None,
        own_var: Tensor,
        mean: Tensor,
        var: Tensor,
        alpha: float | Tensor | None = None,
    ) -> Statistics:
        """Each example's statistics mixed with the running ones (four-things, equation 3)."""
        check_between("example_weight", self.example_weight, 0.0, 1.0)
        alpha = self.example_weight if alpha is None else alpha
        if own_mean is None:
            return Statistics(
                None, torch.lerp(var.expand_as(own_var), own_var, alpha), batch_weight=alpha
            )
        # E[x^2] - E[x]^2 of the mixture, without the difference of two large numbers.
        apart = (own_mean - mean).square() * (alpha * (1 - alpha))
        mixed_mean = torch.lerp(mean.expand_as(own_mean), own_mean, alpha)
        mixed_var = torch.lerp(var.expand_as(own_var), own_var, alpha) + apart
        if self.num_statistics != self.num_features:
            mixed_mean, mixed_var = backends.pool_channels(
                mixed_mean, mixed_var, self.num_statistics
            )
        return Statistics(mixed_mean, mixed_var, batch_weight=alpha)

    def inference_obstacle(self) -> str | None:
        """The reason why inference is no affine map per channel; None where it is one."""
        if self.running_mean is None or self.running_var is None:
            return "track_running_stats=False: it normalizes by the batch at inference too"
        if self.example_weight:
            return f"example_weight={self.example_weight}: each example has statistics of its own"
        if self.num_statistics != self.num_features:
            return f"{self.num_statistics} channel groups: channels share statistics"
        return None
