"""Forwards that are computed again in backward: activation checkpointing.

A forward that runs inside a backward pass must not count as a step, and must
normalize as the first time, though memory has moved on since, and a mask or
`no_update` may be over. While a forward may be checkpointed, how it normalized
is kept beside a fingerprint of its input; the forward that runs again finds it
by that. No value is read from the device.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from anybatch.backends import is_channels_last, is_traced
from anybatch.backends.layout import PLAIN_TYPES
from anybatch.backends.protocol import Statistics
from anybatch.core.reduction_scope import ReductionScope

_SELECTIVE = (_CachedTorchDispatchMode, _CachingTorchDispatchMode)
_FINGERPRINT = 256  # values from all over the batch, beside the sum of all
_MASKS = 8  # forwards with a mask that are kept, for masks are large
_ALIKE = 0.02  # apart by less, in proportion: the same batch, computed in another order
_LOST = (
    "a layer ran more often before one backward than the 64 times that it can tell apart under "
    "activation checkpointing, or what is checkpointed computes something else when it runs again, "
    "as after the end of masked(..., zero=True): call backward() within it"
)


_task, _records = torch._C._current_graph_task_id, torch.is_grad_enabled
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def in_backward() -> bool:
    """True if this forward runs inside a backward pass."""
    if torch.compiler.is_compiling():
        return False
    return _task() != -1


def may_run_again() -> bool:
    """True if this forward may be one that is checkpointed.

    Such a forward runs without gradients (reentrant checkpoints) or under hooks on
    what is saved for backward (the others).
    """
    if torch.compiler.is_compiling():
        return False
    if not _records():
        return True
    return _hooks is None or _hooks(True) is not None


def is_selective() -> bool:
    """True within a selective checkpoint, which gives operators the results of the first time."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode) in _SELECTIVE for mode in _get_current_dispatch_mode_stack())


@contextmanager
def computed_again() -> Iterator[None]:
    """A context that a selective checkpoint knows nothing of: what is in it is computed again.

    Such a checkpoint knows operators by their order, and a layer that finds its statistics of the
    first time runs others.
    """
    with _disable_current_modes() as modes, ExitStack() as kept:
        for mode in reversed(modes):
            if type(mode) not in _SELECTIVE:
                kept.enter_context(mode)
        yield


def hooks_on_saved() -> bool:
    """True if hooks may give backward another tensor than the one that this forward saves.

    A checkpoint gives one that was computed again, perhaps by other kernels with other last bits.
    """
    if torch.compiler.is_compiling() or not _records():
        return False
    return _hooks is None or _hooks(True) is not None


def runs_once() -> bool:
    """True if this forward neither is nor may be one that runs again.

    The same as `in_backward` and `may_run_again`, at once, where no compiler is.
    """
    return _task() == -1 and _records() and _hooks is not None and _hooks(True) is None


class Noted(NamedTuple):
    """A forward that may run again.

    Attributes:
        statistics: Statistics that it normalized by.
        source: The elements that contributed to them; None for all of the batch.
        update: Whether it updated the state.
    """

    statistics: Statistics
    source: ReductionScope | None
    update: bool


class RecomputeCache:
    """The latest forwards of a layer that may run again.

    Args:
        length: Forwards before one backward that are told apart (default 64).
    """

    def __init__(self, length: int = 64) -> None:
        self.kept: deque[tuple[Tensor, Noted]] = deque(maxlen=length)
        self.found: list[Noted] = []  # with a mask, since the latest was noted

    def note(
        self, x: Tensor, chosen: Statistics, source: ReductionScope | None, update: bool
    ) -> None:
        """Keep a forward of ``x``, if other calls can use its tensors."""
        # A fake tensor has no data.
        if type(x) not in PLAIN_TYPES or torch._C._are_functorch_transforms_active():
            return
        if _has_mask(noted := Noted(chosen, source, update)):
            self._drop_masks()
        self.kept.append((_fingerprint(x), noted))

    def _drop_masks(self) -> None:
        """Drop the forwards with masks that backward has run again, and all but the latest."""
        masked = [noted for _, noted in self.kept if _has_mask(noted)]
        over = {id(noted) for noted in (*self.found, *masked[: 1 - _MASKS])}
        left = [pair for pair in self.kept if id(pair[1]) not in over]
        self.kept.clear()
        self.kept.extend(left)
        self.found.clear()

    def find(self, x: Tensor, rows: tuple[int, ...]) -> Noted | None:
        """Find the forward that had this input.

        Args:
            x: The input.
            rows: Leading shape of the statistics, () for one group.

        Returns:
            The forward, or None if none of this shape was noted.

        Raises:
            RuntimeError: If none of the forwards noted had such an input (on a GPU the device
                fails, later).
        """
        own = _fingerprint(x)
        fitting = [  # the latest first, which is taken of equals
            (noted, kept)
            for noted, kept in reversed(self.kept)
            if noted.shape == own.shape and kept.statistics.var.shape[:-1] == rows
        ]
        if not fitting:
            return None
        apart = (torch.stack([noted for noted, _ in fitting]) - own).abs().sum(1)
        least = apart.amin()
        # What is not finite is not compared: it has no statistics to mistake.
        alike = torch.le(least, _ALIKE * own.abs().sum()).logical_or_(
            least.isfinite().logical_not_()
        )
        torch._assert_async(alike, _LOST)
        nearest = apart.argmin(keepdim=True)
        if len(fitting) == 1 or (x.device.type == "cpu" and not is_traced()):  # to read is no wait
            found: Noted = fitting[0 if len(fitting) == 1 else int(nearest)][1]
            self.found += [found] if _has_mask(found) else []
            return found
        return _select([kept for _, kept in fitting], nearest)


def _has_mask(noted: Noted) -> bool:
    return noted.source is not None and noted.source.mask is not None


def _fingerprint(x: Tensor) -> Tensor:
    """Values at even distances in memory, and the sum of all: borders and first rows are alike."""
    x = x.detach()
    flat = (x.movedim(1, -1) if is_channels_last(x) else x).flatten()
    step = max(flat.shape[0] // _FINGERPRINT, 1) | 1  # odd: not the same column of every row
    some = flat[::step].to(torch.float32, copy=True)
    return torch.cat([some, flat.sum(dtype=torch.float32).view(1)])


def _select(choices: list[Noted], index: Tensor) -> Noted:
    """One of several forwards, by an index on the device."""
    statistics = _select_statistics([one.statistics for one in choices], index)
    source = next((one.source for one in choices if one.source is not None), None)
    masks = [None if one.source is None else one.source.mask for one in choices]
    mask = next((one for one in masks if one is not None), None)
    if source is not None and mask is not None:
        all_valid = torch.ones_like(mask)
        table = torch.stack([all_valid if one is None else one for one in masks])
        source = source._replace(mask=table.index_select(0, index).squeeze(0))
    return Noted(statistics, source, all(one.update for one in choices))


def _select_statistics(choices: list[Statistics], index: Tensor) -> Statistics:
    def pick(name: str) -> Tensor | None:
        values = [getattr(one, name) for one in choices]
        if values[0] is None:
            return None
        values = [v if isinstance(v, Tensor) else choices[0].var.new_tensor(v) for v in values]
        return torch.stack(values).index_select(0, index).squeeze(0)

    mean, var, r, d = (pick(name) for name in ("mean", "var", "r", "d"))
    batch_weight = choices[0].batch_weight
    others = [one.batch_weight for one in choices[1:]]
    if any(one is not batch_weight and one != batch_weight for one in others):
        chosen = pick("batch_weight")
        assert chosen is not None
        batch_weight = chosen
    assert var is not None
    use_batch_stats, counts = pick("use_batch_stats"), pick("counts")
    return Statistics(mean, var, r, d, pick("center"), batch_weight, use_batch_stats, counts)
