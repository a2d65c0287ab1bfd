"""Checkpoints of other libraries' batch renormalization, for `anybatch.BatchRenorm1d`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_OF_SB3_CONTRIB = {
    "ra_mean": "running_mean",
    "ra_var": "running_var",
    "scale": "weight",
    "bias": "bias",
}


def from_torchrl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map a ``state_dict`` with layers of torchrl to one with `anybatch.BatchRenorm1d`.

    Build the network with ``BatchRenorm1d(..., warmup_steps=...)`` of the same constants, and load.
    The warm-up goes on where it was. Past it, torchrl's factor grows without bound; here it is 1.

    Args:
        state: Of a network in which all norms with running statistics are torchrl's.

    Returns:
        The tensors by key.

    Raises:
        ValueError: If there is no such layer.

    Example:
        >>> import torch
        >>> state = {"0.num_batches_tracked": torch.tensor(7), "0.running_mean": torch.zeros(3)}
        >>> from_torchrl(state)["0.step"]
        tensor(7)
    """
    mapped = dict(state)
    for key, value in state.items():
        prefix, _, name = key.rpartition(".")
        if name == "num_batches_tracked":
            mapped[_join(prefix, "step")] = value.clone()
    if len(mapped) == len(state):
        raise ValueError("state has no num_batches_tracked, which layers of torchrl have")
    return mapped


def from_sb3_contrib(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map a ``state_dict`` with layers of sb3-contrib to one with `anybatch.BatchRenorm1d`.

    Build the network with ``BatchRenorm1d.crossq(...)``, whose constants are theirs, and load. The
    warm-up goes on where it was. Output in evaluation is the same. In training they differ by
    rounding and by Bessel's correction, which sb3-contrib applies to the variance that normalizes.

    Args:
        state: Of a network; keys of other modules stay as they are.

    Returns:
        The tensors by key.

    Raises:
        ValueError: If there is no such layer.

    Example:
        >>> import torch
        >>> sorted(from_sb3_contrib({"bn.ra_mean": torch.zeros(3), "bn.steps": torch.tensor(4)}))
        ['bn.num_batches_tracked', 'bn.running_mean', 'bn.step']
    """
    prefixes = {key.rpartition(".")[0] for key in state if key.split(".")[-1] == "ra_mean"}
    if not prefixes:
        raise ValueError("state has no ra_mean, which layers of sb3-contrib have")
    mapped = {}
    for key, value in state.items():
        prefix, _, name = key.rpartition(".")
        if prefix in prefixes and name == "steps":
            mapped[_join(prefix, "num_batches_tracked")] = value.clone()
            mapped[_join(prefix, "step")] = (value - 1).clamp(min=0)  # it opens one forward later
        elif prefix in prefixes and name in _OF_SB3_CONTRIB:
            mapped[_join(prefix, _OF_SB3_CONTRIB[name])] = value
        else:
            mapped[key] = value
    return mapped


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
