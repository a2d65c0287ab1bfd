"""Inference example weighing on trained networks (four-things, section 3.1)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anybatch.conversion.convert import convert
from anybatch.conversion.module_swap import move_hooks, swap, unwrapped
from anybatch.conversion.norm_types import listed, norm_kind
from anybatch.core.arguments import check_between, check_module
from anybatch.core.name_patterns import Where, matches
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.running_group_norm import RunningGroupNorm


@contextmanager
def example_weighing(
    model: nn.Module, alpha: float, *, where: Where | None = None
) -> Iterator[nn.Module]:
    """A context in which norms mix an example's own statistics with the running ones.

    At inference, of each example and channel (four-things, equation 3)::

        mean = alpha * E[x]   + (1 - alpha) * running_mean
        E2   = alpha * E[x^2] + (1 - alpha) * (running_var + running_mean^2)
        y    = weight * (x - mean) / sqrt(E2 - mean^2 + eps) + bias

    For ``torch.nn.BatchNorm*``, ``SyncBatchNorm``, this library's layers, and
    ``torch.nn.GroupNorm`` whose averages `recalibrate` has collected (there mean and
    E2 are averaged over each channel group). With alpha = 0 batch norms, with
    alpha = 1 group norms compute what they always do, to the bit. Layers in
    training mode, without running statistics or averages, and frozen by their class
    are as ever. The network itself is not changed; in place, the same is done by
    `set_example_weight`, or ``convert(model, "bn", example_weight=alpha)``.

    Args:
        model: A trained network.
        alpha: The example's share, from 0 to 1.
        where: Which layers: a name pattern or a predicate ``(name, module)``.

    Yields:
        The network; where it was wrapped or compiled, the one inside.

    Raises:
        ValueError: For alpha out of range, no layer that can be weighed, or a
            batch norm of a class that changes what batch norms do.
        TypeError: For alpha that is no number.

    Source: four-things, section 3.1.

    Example:
        >>> net, x = nn.Sequential(nn.BatchNorm2d(2)).eval(), torch.randn(3, 2, 4, 4)
        >>> with example_weighing(net, 1.0) as weighed:
        ...     y = weighed(x)
        >>> torch.allclose(y, nn.functional.instance_norm(x), atol=1e-6)
        True
    """
    weighing = Weighing(unwrapped(model)[0], where)
    try:
        weighing.set(alpha)
        yield weighing.model
    finally:
        weighing.undo()


def set_example_weight(model: nn.Module, alpha: float, *, where: Where | None = None) -> nn.Module:
    """Give a trained network's norms an example weight, in place and for good.

    torch's batch norms become `anybatch.BatchNorm` layers (unless alpha is 0), this
    library's layers get the attribute, group norms whose averages `recalibrate` has
    collected become `anybatch.RunningGroupNorm` (unless alpha is 1). Parameters and
    buffers stay the same objects. See `example_weighing`.

    Args:
        model: A trained network.
        alpha: The example's share, from 0 to 1.
        where: Which layers: a name pattern or a predicate ``(name, module)``.

    Returns:
        The model; its replacement where the model is itself a norm.

    Raises:
        ValueError: As `example_weighing` does, and as `convert` does.
        TypeError: For alpha that is no number.

    Example:
        >>> set_example_weight(nn.Sequential(nn.BatchNorm1d(2)), 0.1)[0].example_weight
        0.1
    """
    check_between("alpha", alpha, 0.0, 1.0)
    layers = weighable(model, where)
    groups: dict[nn.Module, RunningGroupNorm] = {}
    for layer in layers.values():
        if isinstance(layer, NormLayer):
            layer.example_weight = float(alpha)
        elif isinstance(layer, nn.GroupNorm) and alpha != 1:
            groups[layer] = _stand_in(layer)
    plain = {m for m in layers.values() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if plain and alpha:
        model = convert(model, "bn", where=lambda _, m: m in plain, example_weight=float(alpha))
    for group, new in groups.items():
        new.train(group.training)
        move_hooks(group, new)
        new.example_weight = float(alpha)
    return swap(model, groups)


class Weighing:
    """The norms of a network that can be weighed, and their weight.

    Args:
        model: The network.
        where: Which layers.

    Example:
        >>> weighing = Weighing(nn.Sequential(nn.BatchNorm1d(2)), None)
        >>> weighing.set(0.5); weighing.undo()
    """

    def __init__(self, model: nn.Module, where: Where | None) -> None:
        self.model = model
        layers = weighable(model, where).values()
        self.own = [(m, m.example_weight) for m in layers if isinstance(m, NormLayer)]
        self.torchs = [(m, _stand_in(m)) for m in layers if not isinstance(m, NormLayer)]

    @property
    def plain(self) -> float:
        """The weight of the network as it is: 0 for torch's batch norms, 1 for its group norms."""
        weights = {alpha for _, alpha in self.own}
        weights |= {1.0 if isinstance(m, nn.GroupNorm) else 0.0 for m, _ in self.torchs}
        return weights.pop() if len(weights) == 1 else 0.0

    def set(self, alpha: float) -> None:
        """Weigh by alpha from now on."""
        check_between("alpha", alpha, 0.0, 1.0)
        for layer, _ in self.own:
            layer.example_weight = float(alpha)
        for norm, stand_in in self.torchs:
            stand_in.example_weight = float(alpha)
            if alpha == (1 if isinstance(norm, nn.GroupNorm) else 0):
                norm.__dict__.pop("forward", None)
            else:
                norm.__dict__["forward"] = _forward(norm, stand_in)

    def undo(self) -> None:
        """Leave all layers as they were found."""
        for layer, alpha in self.own:
            layer.example_weight = alpha
        for norm, _ in self.torchs:
            norm.__dict__.pop("forward", None)


def weighable(model: nn.Module, where: Where | None) -> dict[str, nn.Module]:
    """The norms that example weighing applies to, by name.

    Raises:
        ValueError: If there is none, or one that cannot be weighed.

    Example:
        >>> list(weighable(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()), None))
        ['0']
    """
    check_module("model", model)
    found: dict[str, nn.Module] = {}
    refused: list[tuple[str, str]] = []
    waiting: list[str] = []
    for name, module in model.named_modules():
        if not matches(where, name, module):
            continue
        if isinstance(module, nn.GroupNorm):
            if getattr(module, "running_var", None) is None:
                waiting.append(name)
            elif type(module).forward is not nn.GroupNorm.forward or "forward" in vars(module):
                refused.append((name, "a group norm with its own forward"))
            else:
                found[name] = module
            continue
        kind = norm_kind(module)
        if kind is None or kind.family != "batch" or getattr(module, "running_var", None) is None:
            continue
        sync = type(module) is nn.SyncBatchNorm and "forward" not in vars(module)
        if kind.refusal is None or sync or isinstance(module, NormLayer):
            found[name] = module
        else:
            refused.append((name, kind.refusal))
    if refused:
        raise ValueError(f"model: norms that cannot be weighed:\n{listed(refused)}")
    if not found:
        raise ValueError(_nothing(model, where, waiting))
    return found


def _nothing(model: nn.Module, where: Where | None, waiting: list[str]) -> str:
    if waiting:
        return (
            f"model: the group norms ({', '.join(waiting[:3])} ...) have no averages to mix in: "
            "collect them from training data with anybatch.recalibrate(model, loader)"
        )
    given = f"model: {type(model).__name__}" if where is None else f"where={where!r}: it"
    return f"{given} has no batch norm with running statistics and no group norm"


def _forward(norm: nn.Module, stand_in: RunningGroupNorm) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        y: Tensor = type(norm).forward(norm, input) if norm.training else stand_in(input)
        return y

    return forward


def _stand_in(norm: nn.Module) -> RunningGroupNorm:
    """A layer that weighs, with a torch norm's own parameters and statistics."""
    channels = norm._buffers["running_var"].shape[0]  # type: ignore[union-attr]
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else channels
    eps = float(norm.eps)  # type: ignore[arg-type]
    new = RunningGroupNorm(int(groups), channels, eps, affine=False, device="meta")
    new.affine = norm._parameters.get("weight") is not None
    for name in ("weight", "bias"):
        new._parameters[name] = norm._parameters.get(name)
    for name in ("running_mean", "running_var"):
        new._buffers[name] = norm._buffers[name]
    counter = norm._buffers.get("num_batches_tracked")
    device = norm._buffers["running_var"].device  # type: ignore[union-attr]
    new._buffers["num_batches_tracked"] = (
        torch.zeros((), dtype=torch.long, device=device) if counter is None else counter
    )
    return new.eval()
