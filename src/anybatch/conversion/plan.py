"""The plan of a conversion: what `convert` would do with each norm, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from anybatch.conversion.decisions import Decision, NormDecider, is_fresh
from anybatch.conversion.method_options import check_arguments, methods_by_pattern
from anybatch.conversion.module_swap import paths
from anybatch.conversion.norm_copies import check_copies
from anybatch.conversion.norm_types import check_bare, norm_kind
from anybatch.conversion.plan_table import Plan
from anybatch.conversion.producers import find_feeders
from anybatch.conversion.relu_fusion.find import Found, find_fusions
from anybatch.conversion.relu_fusion.fused_block import Fusion
from anybatch.core.arguments import counted
from anybatch.core.name_patterns import Where
from anybatch.core.norm_layer import NormLayer
from anybatch.registry import Method


def plan(
    model: nn.Module,
    method: str | Mapping[str, str],
    *,
    batch_size: int | None = None,
    example_inputs: Any = None,
    where: Where | None = None,
    centralize: bool | None = None,
    fuse: bool = False,
    copies: int = 1,
    share_affine: bool = True,
    **options: Any,
) -> Plan:
    """Report what `convert` with the same arguments would do, and change nothing.

    Args:
        model: The network.
        method: A method's short name, or a mapping of name patterns to short names; the first
            pattern that matches a norm decides.
        batch_size: Examples in a training forward, for the methods that use it (default None: they
            read it from the first batch).
        example_inputs: What the network takes (a tensor, a tuple of positional or a mapping of
            keyword arguments), for networks that cannot be traced symbolically.
        where: Which norms: a name pattern such as ``"encoder.*"`` or a predicate ``(name, module)``
            (default None: all).
        centralize: Whether to centralize the weights of the layers that feed the norms (default
            None: of the convolutions in a fresh network, for "mabn").
        fuse: Whether norms compute the ReLU that follows them, or the addition and the ReLU
            (default False).
        copies: How many sets of statistics each norm gets (default 1).
        share_affine: Whether they share scale and shift (default True).
        **options: The method's own arguments, such as ``window=32``.

    Returns:
        The `Plan`; print it for a table.

    Raises:
        ValueError: For an unknown method, a wrapped or compiled model, or a value that the method
            refuses.
        TypeError: For an option that the method does not have.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> print(plan(model, "mabn"))
        norm  kind         fed by  decision  becomes                   why
        ----  -----------  ------  --------  ------------------------  ---...
        1     BatchNorm2d  0       convert   MovingAverageBatchNorm2d  eval output changes: ...
        1 of 1 norm converted; the model is fresh (no batch seen); weights of 1 layer centralized.
    """
    return decide(
        model,
        method,
        batch_size=batch_size,
        example_inputs=example_inputs,
        where=where,
        centralize=centralize,
        fuse=fuse,
        copies=copies,
        share_affine=share_affine,
        **options,
    ).plan


@dataclass(frozen=True)
class Decisions:
    """All that `convert` has decided before it changes anything.

    Args:
        plan: The decisions as `plan` shows them.
        rows: The decision for each norm, in the order of the network.
        blocks: The blocks to fuse.
        methods: Name pattern -> method.
        fresh: Whether the network is untrained.
        unused: Name patterns that choose no norm's method.
    """

    plan: Plan
    rows: tuple[Decision, ...]
    blocks: Mapping[nn.Module, Fusion]
    methods: Mapping[str, Method]
    fresh: bool
    unused: tuple[str, ...]


def decide(
    model: nn.Module,
    method: str | Mapping[str, str],
    *,
    batch_size: int | None = None,
    example_inputs: Any = None,
    where: Where | None = None,
    centralize: bool | None = None,
    fuse: bool = False,
    copies: int = 1,
    share_affine: bool = True,
    **options: Any,
) -> Decisions:
    """Decide norm by norm: `plan` shows the result and `convert` carries it out."""
    check_bare(model)
    methods = methods_by_pattern(method)
    check_arguments(methods, options, batch_size)
    check_copies(copies, methods.values())
    places = paths(model)
    feeders = find_feeders(model, example_inputs)
    fresh = is_fresh(model)
    decider = NormDecider(
        places, feeders, methods, options, batch_size, where, centralize, fresh, copies
    )
    kinds = [(module, kind) for module in places if (kind := norm_kind(module)) is not None]
    rows = [decider.decide(module, kind) for module, kind in kinds]
    found = Found()
    if fuse:
        found = find_fusions(model, [row.norm for row in rows if _can_fuse(row)])
        rows = [_with_fusion(row, found) for row in rows]
    names = {pattern: one.name for pattern, one in methods.items()}
    asked = dict(names) if isinstance(method, Mapping) else names["*"]
    notes = _notes(rows, fresh, methods.values(), batch_size)
    if copies > 1:
        affine = "one scale and shift" if share_affine else "a scale and shift of its own each"
        notes += (f"Converted norms get {copies} sets of statistics, with {affine}.",)
    made = Plan(asked, tuple(row.row for row in rows), notes)
    unused = tuple(pattern for pattern in methods if pattern not in {*decider.met, "*"})
    return Decisions(made, tuple(rows), found.blocks, methods, fresh, unused)


def _can_fuse(decision: Decision) -> bool:
    """True if a norm is, or becomes, a layer that can do more than normalize."""
    if decision.method is None:
        return isinstance(decision.norm, NormLayer) and decision.row.decision == "keep"
    return issubclass(decision.method.layer(2), NormLayer)


def _with_fusion(decision: Decision, found: Found) -> Decision:
    """Add to a decision what the norm computes in its own pass, and why not more."""
    row = decision.row
    if _can_fuse(decision):
        fuses, reason = found.of(decision.norm)
    elif decision.method is not None:
        fuses, reason = None, f"not fused: {row.becomes} only normalizes"
    else:
        return decision
    return replace(decision, row=replace(row, fuses=fuses, reason=f"{row.reason}; {reason}"))


def _notes(
    decisions: list[Decision], fresh: bool, methods: Any, batch_size: int | None
) -> tuple[str, ...]:
    converted = sum(decision.method is not None for decision in decisions)
    centralized = sum(decision.centralize is not None for decision in decisions)
    state = "fresh (no batch seen)" if fresh else "trained, as far as its statistics tell"
    fused = sum(decision.row.fuses is not None for decision in decisions)
    whole = (
        f"{converted} of {counted(len(decisions), 'norm')} converted; the model is {state}; "
        f"weights of {counted(centralized, 'layer')} centralized"
        + (f"; ReLUs fused into {counted(fused, 'norm')}." if fused else ".")
    )
    ignoring = [m.name for m in methods if batch_size is not None and not m.uses_batch_size]
    unused = (f"batch_size={batch_size} is not used by {', '.join(dict.fromkeys(ignoring))}.",)
    return (whole, *(unused if ignoring else ()))
