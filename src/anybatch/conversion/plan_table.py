"""The result of `plan`: the decision for each norm, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from anybatch.core.text_tables import text_table


@dataclass(frozen=True)
class PlanRow:
    """The decision for one norm.

    Args:
        name: its path in the network (the first, where it has several).
        kind: its class.
        feeder: what feeds it: the path of a convolution or linear layer, or why there is none.
        decision: "convert", "keep" or "refuse".
        becomes: the class it becomes; its own where it is kept.
        reason: why, and what that means for the output.
        centralizes: the path of the layer whose weights are centralized for it, or None.
        also: its other paths.
        binds: the path of the layer that it is bound to, or None.
        fuses: what it does in its own pass, "relu" or "add and relu", or None.

    Example:
        >>> PlanRow("1", "BatchNorm2d", "0", "keep", "BatchNorm2d", "left out by where").decision
        'keep'
    """

    name: str
    kind: str
    feeder: str
    decision: Literal["convert", "keep", "refuse"]
    becomes: str
    reason: str
    centralizes: str | None = None
    also: tuple[str, ...] = ()
    binds: str | None = None
    fuses: str | None = None


@dataclass(frozen=True)
class Plan:
    """The decisions of `convert`, one row per norm.

    Args:
        method: the method asked for, or the mapping of name patterns to methods.
        rows: one `PlanRow` per norm, in the order of the network.
        notes: what holds for the network as a whole.

    Example:
        >>> Plan("bn", (), ("nothing here",)).to_dict()
        {'method': 'bn', 'rows': [], 'notes': ['nothing here']}
    """

    method: str | dict[str, str]
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()

    def having(self, decision: Literal["convert", "keep", "refuse"]) -> list[PlanRow]:
        """The rows with one decision.

        Args:
            decision: "convert", "keep" or "refuse".

        Returns:
            Those rows, in the order of the network.

        Example:
            >>> from torch import nn
            >>> import anybatch
            >>> made = anybatch.plan(nn.Sequential(nn.BatchNorm1d(3)), "bn")
            >>> made.having("convert")[0].name
            '0'
        """
        return [row for row in self.rows if row.decision == decision]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists and dictionaries, ready for json.

        Returns:
            A dictionary of method, rows and notes.

        Example:
            >>> from torch import nn
            >>> import anybatch
            >>> made = anybatch.plan(nn.Sequential(nn.BatchNorm1d(3)), "bn")
            >>> made.to_dict()["rows"][0]["becomes"]
            'BatchNorm1d'
        """
        rows = [{**asdict(row), "also": list(row.also)} for row in self.rows]
        return {"method": self.method, "rows": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("norm", "kind", "fed by", "decision", "becomes", "why")
        return "\n".join([text_table(head, map(_cells, self.rows)), *self.notes])


def _cells(row: PlanRow) -> tuple[str, ...]:
    name = ", ".join([row.name or "(the model)", *row.also])
    return (name, row.kind, row.feeder, row.decision, row.becomes, row.reason)
