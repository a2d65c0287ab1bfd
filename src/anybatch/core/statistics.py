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
    shares = [part.batch_weight for part in parts]
    batch_weight = shares[0]
    if any(isinstance(one, Tensor) or one != batch_weight for one in shares):
        batch_weight = torch.cat(_columns(parts))
    use, flags = None, [(part.var, part.use_batch_stats) for part in parts]
    if any(flag is not None for _, flag in flags):
        use = torch.cat([_column(var, 1.0 if one is None else one).bool() for var, one in flags])
    counts = None
    if parts[0].counts is not None:
        counts = torch.cat([_column(p.var, 1.0 if p.counts is None else p.counts) for p in parts])
    return Statistics(mean, var, r, d, center, batch_weight, use, counts)


def _blank(part: Statistics, name: str) -> Tensor:
    """The value that an absent entry stands for."""
    if name == "center":
        assert part.mean is not None
        return part.mean
    return torch.ones_like(part.var) if name == "r" else torch.zeros_like(part.var)


def _columns(parts: list[Statistics]) -> list[Tensor]:
    """Shares as columns ``(G, 1)``, or as tables ``(G, K)`` where one has a share a channel."""
    wide = any(
        isinstance(p.batch_weight, Tensor) and p.batch_weight.shape[-1:] == p.var.shape[-1:]
        for p in parts
    )
    if not wide:
        return [_column(part.var, part.batch_weight) for part in parts]
    tables = [part.var.view(-1, part.var.shape[-1]) for part in parts]
    pairs = zip(tables, parts, strict=True)
    return [torch.ones_like(table) * part.batch_weight for table, part in pairs]


def _column(table: Tensor, value: float | Tensor) -> Tensor:
    """A number as a column ``(G, 1)`` for a row or a table."""
    return table.new_ones(1 if table.dim() == 1 else table.shape[0], 1) * value
