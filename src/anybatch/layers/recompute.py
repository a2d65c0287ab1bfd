"""Forwards that are computed again in backward: activation checkpointing.

A forward that runs inside a backward pass must not count as a step, and must
normalize as the first time, though memory has moved on since. While a forward
may be checkpointed, its statistics are kept beside a fingerprint of its input;
the forward that runs again finds them by it. No value is read from the device.
"""

from collections import deque

import torch
from torch import Tensor

from anybatch.layers.compiled import Kept, as_statistics
from anybatch.layers.statistics import Statistics

_FINGERPRINT = 64  # values of the first example


def in_backward() -> bool:
    """Whether this forward runs inside a backward pass."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def may_run_again() -> bool:
    """Whether this forward may be one that is checkpointed.

    Such a forward runs without gradients (reentrant checkpoints) or under hooks on
    what is saved for backward (the others).
    """
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return True
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None


class Recent:
    """Statistics of a layer's latest forwards that may run again.

    Args:
        length: Forwards before one backward that are told apart (default 16).
    """

    def __init__(self, length: int = 16) -> None:
        self.kept: deque[tuple[Tensor, Statistics | list[Kept]]] = deque(maxlen=length)

    def note(self, x: Tensor, chosen: Statistics | list[Kept]) -> None:
        """Keep the statistics of a forward of ``x``."""
        self.kept.append((_fingerprint(x), chosen))

    def find(self, x: Tensor, rows: tuple[int, ...]) -> Statistics | None:
        """The statistics of the forward whose input this was.

        Args:
            x: The input.
            rows: Leading shape of the statistics, () for one group.

        Returns:
            The statistics, or None if no forward of such a shape was noted.
        """
        own = _fingerprint(x)
        noted = [(f, _tables(kept, x)) for f, kept in self.kept if f.shape == own.shape]
        fitting = [(f, tables) for f, tables in noted if tables.var.shape[:-1] == rows]
        if len(fitting) < 2:
            return fitting[0][1] if fitting else None
        apart = torch.stack([(f - own).abs().sum() for f, _ in fitting])
        nearest = apart.flip(0).argmin(keepdim=True)  # the latest of equals
        return _select([tables for _, tables in reversed(fitting)], nearest)


def _fingerprint(x: Tensor) -> Tensor:
    return x.detach()[:1].flatten()[:_FINGERPRINT].to(torch.float32, copy=True)


def _tables(kept: Statistics | list[Kept], like: Tensor) -> Statistics:
    return as_statistics(kept, like) if isinstance(kept, list) else kept


def _select(choices: list[Statistics], index: Tensor) -> Statistics:
    """One of several statistics, by an index on the device."""

    def pick(name: str) -> Tensor | None:
        values = [getattr(one, name) for one in choices]
        if values[0] is None:
            return None
        values = [v if isinstance(v, Tensor) else choices[0].var.new_tensor(v) for v in values]
        return torch.stack(values).index_select(0, index).squeeze(0)

    mean, var, r, d = (pick(name) for name in ("mean", "var", "r", "d"))
    share = choices[0].share
    if any(one.share is not share and one.share != share for one in choices[1:]):
        chosen = pick("share")
        assert chosen is not None
        share = chosen
    assert var is not None
    return Statistics(mean, var, r, d, pick("center"), share, pick("own"), pick("counts"))
