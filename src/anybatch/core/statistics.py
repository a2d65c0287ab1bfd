"""Joining the statistics of successive groups of examples."""

import torch
from torch import Tensor

from anybatch.backends.protocol import Statistics


def stack(parts: list[Statistics]) -> Statistics:
    """Statistics of successive groups as one table."""
    columns: list[Tensor | None] = []
    for name in ("mean", "var", "r", "d", "center"):
        rows = [getattr(part, name) for part in parts]
        if any(row is not None for row in rows):
            filled = [
                _blank(p, name) if row is None else row for p, row in zip(parts, rows, strict=True)
            ]
            columns.append(torch.cat([row.view(-1, row.shape[-1]) for row in filled]))
        else:
            columns.append(None)
    mean, var, r, d, center = columns
    assert var is not None
    shares = [part.share for part in parts]
    share = shares[0]
    if any(isinstance(one, Tensor) or one != share for one in shares):
        share = torch.cat(_columns(parts))
    own = None
    if any(part.own is not None for part in parts):
        own = torch.cat([_column(p.var, 1.0 if p.own is None else p.own).bool() for p in parts])
    counts = None
    if parts[0].counts is not None:
        counts = torch.cat([_column(p.var, 1.0 if p.counts is None else p.counts) for p in parts])
    return Statistics(mean, var, r, d, center, share, own, counts)


def _blank(part: Statistics, name: str) -> Tensor:
    """The value that an absent entry stands for."""
    if name == "center":
        assert part.mean is not None
        return part.mean
    return torch.ones_like(part.var) if name == "r" else torch.zeros_like(part.var)


def _columns(parts: list[Statistics]) -> list[Tensor]:
    """Shares as columns ``(G, 1)``, or as tables ``(G, K)`` where one has a share a channel."""
    wide = any(
        isinstance(p.share, Tensor) and p.share.shape[-1:] == p.var.shape[-1:] for p in parts
    )
    if not wide:
        return [_column(part.var, part.share) for part in parts]
    tables = [part.var.view(-1, part.var.shape[-1]) for part in parts]
    pairs = zip(tables, parts, strict=True)
    return [torch.ones_like(table) * part.share for table, part in pairs]


def _column(table: Tensor, value: float | Tensor) -> Tensor:
    """A number as a column ``(G, 1)`` for a row or a table."""
    return table.new_ones(1 if table.dim() == 1 else table.shape[0], 1) * value
