"""Backward statistics of a forward, averaged with those of recent steps."""

from typing import Protocol

import torch
from torch import Tensor

from anybatch.backends import is_finite


class Averaging(Protocol):
    """A layer that averages backward statistics over steps."""

    def average_backward(self, new: Tensor, enough: Tensor | None, update: bool) -> Tensor:
        """Take the backward statistics of a step, give their average."""


class BackwardAverage:
    """The backward statistics of one forward, averaged along its groups.

    Args:
        layer: Keeps the averages.
        use_batch_stats: Where the batch's own count, see `Statistics`; None for nowhere.
        enough: Which groups have values enough for statistics, a number or ``(G, 1)``; None for
            all.
        update: Whether the averages may change.
    """

    def __init__(
        self, layer: Averaging, use_batch_stats: Tensor | None, enough: Tensor | None, update: bool
    ) -> None:
        self.layer, self.use_batch_stats = layer, use_batch_stats
        self.enough, self.update = enough, update

    def __call__(self, g: Tensor | None, psi: Tensor) -> tuple[Tensor | None, Tensor]:
        new = psi if g is None else torch.cat([g, psi], -1)
        average = self._average(new)
        if self.use_batch_stats is not None:
            average = torch.where(self.use_batch_stats, new, average)
        if g is None:
            return None, average
        g, psi = average.chunk(2, -1)
        return g, psi

    def _average(self, new: Tensor) -> Tensor:
        take = self.layer.average_backward
        if new.dim() == 1:
            return take(new, self.enough, self.update)
        each = (None,) * new.shape[0] if self.enough is None else self.enough
        rows = zip(new, each, strict=True)
        return torch.stack([take(row, enough, self.update) for row, enough in rows])


def slide(window: Tensor, new: Tensor, finite: Tensor, update: bool) -> Tensor:
    """A window with its oldest step replaced by ``new``; it changes where ``finite`` says so.

    Args:
        window: ``(steps, ...)``, the newest last.
        new: The newest step.
        finite: Where it may be remembered.
        update: Whether the window may change.

    Returns:
        The window that holds ``new`` everywhere.
    """
    moved = torch.cat([window[1:], new.unsqueeze(0)])
    if update:
        window.copy_(torch.where(finite, moved, window))
    return moved


def slide_mean(window: Tensor, count: Tensor, new: Tensor, finite: Tensor, update: bool) -> Tensor:
    """Average of a window that begins empty.

    Args:
        window: ``(steps, ...)``, zero where no step has been.
        count: Steps that it has had, a number on its device.
        new: The newest step.
        finite: Where it may be remembered.
        update: Whether the window may change.
    """
    moved = slide(window, new, finite, update)
    return moved.sum(0).div_((count + 1).clamp_(max=window.shape[0]))


def all_finite(new: Tensor, columns: int) -> Tensor:
    """Where each of several rows that lie side by side is finite, ``columns`` wide each."""
    finite = is_finite(new.abs()).view(-1, columns)
    return finite.all(0).repeat(finite.shape[0])
