"""Joint forwards and target networks, for critics of reinforcement learning."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.core.arguments import check_between, check_module, shown
from anybatch.core.nested import mapped
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.uncentered_norm_layer import UncenteredNormLayer
from anybatch.layers.weight_centralization import is_centralized, match_centralization


def joint_forward(module: nn.Module, *batches: Any) -> tuple[Any, ...]:
    """Run several batches as one, so that their statistics are those of all together.

    A critic sees the pairs of the replay buffer and those of the policy in one forward (CrossQ,
    Bhatt et al. 2024), and needs no target network. It counts as one step.

    Args:
        module: The network.
        *batches: What it takes: a tensor, or a tuple of tensors, with examples along dimension 0.

    Returns:
        The output for each batch; tuples, lists, mappings and dataclasses of tensors are split as
        well.

    Raises:
        ValueError: If there is no batch, the batches have different numbers of tensors, or an
            output's first dimension does not count examples.
        TypeError: For other inputs.

    Example:
        >>> import anybatch
        >>> norm = anybatch.BatchNorm1d(3)
        >>> now, later = joint_forward(norm, torch.randn(4, 3), torch.randn(2, 3))
        >>> len(now), len(later), norm.num_batches_tracked.item()
        (4, 2, 1)
    """
    given = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    counts = [len(batch) for batch in given]
    if not counts or len(set(counts)) > 1 or not counts[0]:
        raise ValueError(
            f"batches of {counts} tensors: give one batch or more, each with the same number"
        )
    if not all(isinstance(part, Tensor) for batch in given for part in batch):
        kinds = ", ".join(shown(batch) for batch in batches)
        raise TypeError(f"batches of {kinds}: give a tensor or a tuple of tensors each")
    sizes = [len(batch[0]) for batch in given]
    output = module(*(torch.cat(parts) for parts in zip(*given, strict=True)))
    return tuple(mapped(partial(_part, sizes, number), output) for number in range(len(sizes)))


def _part(sizes: list[int], number: int, joint: Tensor) -> Any:
    """One batch's part of a joint output."""
    if not joint.dim() or len(joint) != sum(sizes):
        raise ValueError(
            f"an output of shape {tuple(joint.shape)}: the first dimension has to count the "
            f"{sum(sizes)} examples of all batches"
        )
    return joint.split(sizes)[number]


@torch.no_grad()
def update_target(target: nn.Module, source: nn.Module, weight: float = 0.005) -> nn.Module:
    """Move a target network towards the network that is trained, running statistics included.

    ::

        target <- (1 - weight) * target + weight * source

    for parameters and running statistics. Counters and the state of methods are copied.

    Args:
        target: The target network, a copy of the other one.
        source: The network that is trained.
        weight: Of the new values, from 0 to 1 (default 0.005).

    Returns:
        The target.

    Raises:
        ValueError: If the networks differ, or the weight is out of range.

    Example:
        >>> import copy, anybatch
        >>> critic = anybatch.BatchRenorm1d(3)
        >>> target = copy.deepcopy(critic)
        >>> _ = critic(torch.randn(8, 3) + 1)
        >>> _ = update_target(target, critic, weight=1.0)
        >>> torch.equal(target.running_mean, critic.running_mean)
        True
    """
    check_module("target", target)
    check_module("source", source)
    check_between("weight", weight, 0.0, 1.0)
    _match_centring(target, source)
    new, old = source.state_dict(), target.state_dict(keep_vars=True)
    everyone = target.named_modules(remove_duplicate=False)
    layers = [(n, m) for n, m in everyone if isinstance(m, NormLayer)]
    kept = {f"{name}.{key}".lstrip(".") for name, layer in layers for key in layer.state_keys()}
    if any(name in new and not value.numel() and new[name].numel() for name, value in old.items()):
        # A window has its slots from the first batch on, and the target may have seen none.
        target.load_state_dict({**old, **{n: v for n, v in new.items() if n in kept}}, strict=False)
        old = target.state_dict(keep_vars=True)
    if {name: value.shape for name, value in new.items()} != {n: v.shape for n, v in old.items()}:
        raise ValueError(
            "target: its state_dict differs from that of source; make it with copy.deepcopy(source)"
        )
    done = set[int]()  # a tensor may have several names
    for name, value in old.items():
        if id(value) in done:
            continue
        done.add(id(value))
        if value.is_floating_point() and name not in kept:
            value.lerp_(new[name].to(value), weight)
        else:
            value.copy_(new[name])
    return target


def _match_centring(target: nn.Module, source: nn.Module) -> None:
    """Let layers before mabn use their weights as those of the source do."""
    theirs = dict(source.named_modules())
    for name, layer in target.named_modules():
        other = theirs.get(name)
        if not isinstance(layer, UncenteredNormLayer) or not isinstance(other, UncenteredNormLayer):
            continue
        if layer.feeder is not None and other.feeder is not None:
            centred = is_centralized(other.feeder)
            why = match_centralization(name, layer.feeder, centred, told=True)
            if why is not None:
                raise ValueError(f"target: {why}")
