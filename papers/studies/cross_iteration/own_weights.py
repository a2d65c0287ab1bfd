"""Cross-iteration batch norm with the gradient that reaches the weights through the compensation.

Old statistics moved to today's weights are functions of these weights: of equation 9,
``mean_t + (d mean_t / d w) (w - w_t)`` has the gradient ``d mean_t / d w``. The layers take what is
compensated for constant. Here the gradient is added before each optimizer step, from that of the
norm's scale and shift: with ``y = gamma (x - mean) / sqrt(var + eps) + beta``::

    dL/dmean = -gamma / sqrt(var + eps) dL/dbeta
    dL/dvar  = -gamma / (2 (var + eps)) dL/dgamma

    python -m papers.studies.cross_iteration.own_weights [--seeds 3] [--data cifar10 --root DIR]
        [--json rows.json]
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch.backends.aten.patches import ConvCall
from anybatch.layers.cross_iteration_batch_norm import CrossIterationBatchNorm
from anybatch.layers.statistics_gradients import compensated
from anybatch.tools.data import Dataset, load
from anybatch.tools.run import Run
from anybatch.tools.training import prepare
from papers.studies.small_trainings import Trained, run_study, train_to_end, trained_rows

WINDOWS = (8, 16)


class Pair(NamedTuple):
    """A norm and the layer that it is bound to."""

    norm: CrossIterationBatchNorm
    bound: Any


class Seen(NamedTuple):
    """The window and the batch before a norm's forward, and the input of the bound layer."""

    window: dict[str, Tensor]
    x: Tensor
    made: Tensor


def bound_pairs(model: nn.Module) -> list[Pair]:
    """All cross-iteration norms of a network, each with its bound layer."""
    found = []
    for module in model.modules():
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, CrossIterationBatchNorm):
                found.append(Pair(owner, module))
    return found


def joint_statistics(pair: Pair, seen: Seen, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of the window, and how many steps were in it.

    They are functions of the weight by the compensation alone: the batch's own are constants.
    """
    norm, window, geometry = pair.norm, seen.window, pair.norm.geometry
    assert geometry is not None
    bias = None if pair.bound.bias is None else pair.bound.bias.detach()
    call = ConvCall(geometry, seen.made, geometry.rows(weight), bias, seen.x)
    means, variances = compensated(window, call, norm.order)
    age = (window["position"] - torch.arange(len(means))).remainder(len(means))
    used = ((age > 0) & (age <= window["entries"])).unsqueeze(1)
    values = torch.where(used, window["values"].unsqueeze(1), 0).to(means.dtype)
    own = seen.x.numel() / seen.x.shape[1]
    total = values.sum() + own
    dims = [0, *range(2, seen.x.dim())]
    var, mean = torch.var_mean(seen.x, dims, correction=0)
    pooled = ((torch.where(used, means, 0) * values).sum(0) + mean * own) / total
    spread = torch.where(used, variances + (means - pooled).square(), 0) * values
    spread = (spread.sum(0) + (var + (mean - pooled).square()) * own) / total
    return pooled, spread, used.sum()


class OwnWeights:
    """Adds the gradient through the compensation before each step of an optimizer.

    Args:
        model: A network with cross-iteration norms, one forward a step.
        optimizer: Of the network.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.pairs = bound_pairs(model)
        self.seen: dict[CrossIterationBatchNorm, Seen] = {}
        self._made: dict[CrossIterationBatchNorm, Tensor] = {}
        for norm, bound in self.pairs:
            bound.register_forward_pre_hook(lambda _, args, norm=norm: self._keep(norm, args[0]))
            norm.register_forward_pre_hook(lambda norm, args: self._see(norm, args[0]))
        optimizer.register_step_pre_hook(lambda *_: self.add())

    def _keep(self, norm: CrossIterationBatchNorm, x: Tensor) -> None:
        if norm.training:
            self._made[norm] = x.detach()

    def _see(self, norm: CrossIterationBatchNorm, x: Tensor) -> None:
        if norm.training and norm.window is not None and norm.window > 1 and not norm.burning:
            window = {name: tensor.clone() for name, tensor in norm.method_state.items()}
            self.seen[norm] = Seen(window, x.detach(), self._made[norm])

    def add(self) -> None:
        """Add to the gradients of the bound layers' weights."""
        for pair in self.pairs:
            seen, norm, grad = self.seen.pop(pair.norm, None), pair.norm, pair.bound.weight.grad
            by_scale, by_shift = norm.weight.grad, norm.bias.grad
            if seen is None or grad is None or by_scale is None or by_shift is None:
                continue
            weight = pair.bound.weight.detach().requires_grad_()
            mean, var, steps = joint_statistics(pair, seen, weight)
            if not steps:
                continue
            scale, inner = norm.weight.detach(), var.detach() + norm.eps
            of_mean = -scale * inner.rsqrt() * by_shift
            of_var = -scale / (2 * inner) * by_scale
            (through,) = torch.autograd.grad((mean * of_mean + var * of_var).sum(), weight)
            grad.add_(through)


def train_once(run: Run, data: Dataset, own_weights: bool) -> Trained:
    """Train a run, with or without the gradient through the compensation."""
    training = prepare(run, data)
    if own_weights:
        OwnWeights(training.model, training.optimizer)
    return train_to_end(run, training, data)


def table(base: Run, seeds: int) -> list[dict[str, Any]]:
    """Train every row with every seed."""
    plain, added = (partial(train_once, data=load(base), own_weights=own) for own in (False, True))
    rows = [("BN, 2", base.but(method="bn"), plain)]
    for window in WINDOWS:
        options = (("burn_in", 0.0), ("gradient_sample", None), ("window", window))
        run = base.but(method="cbn", options=options)
        rows += [(f"CBN of {window}", run, plain), (f"CBN of {window}, own weights", run, added)]
    return trained_rows(rows, seeds)


if __name__ == "__main__":
    run_study(__doc__ or "", table)
