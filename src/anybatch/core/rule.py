"""Methods: the state that one declares, and the rules that choose its statistics.

A rule takes its arguments by name. One source runs here, on rows of torch's operators, and in the
compiled kernels (`anybatch.backends.rule`). Its arguments may be

- ``mean`` and ``var`` of the batch, the variance biased (without a mean, the second moment);
- ``running_mean`` and ``running_var``;
- state that the layer declares: by its name a `Number`, or of a `Counter` the number of this step,
  from 1 on; as ``old_name`` a `Row` or an `Average`, before this step; of a `Window` its average
  with this step, ``name_mean`` or ``name_var``, and ``name_full``, whether the oldest is there;
- any number that is an attribute of the layer, such as ``eps``.

A rule of the backward pass takes ``psi``, the mean of ``g * z`` over the batch, and state whose
names begin with ``backward_``, and gives the average to use in its place; ``update_weight`` is the
weight of the newest batch in exponential averages.
"""

from typing import Any

import torch
from torch import Tensor

from anybatch.backends import is_finite, scalar
from anybatch.backends.protocol import Statistics
from anybatch.backends.rule import Rule, chosen, clamp, lerp, maximum, minimum, rule, sqrt, where
from anybatch.core.backward_statistics import all_finite, slide
from anybatch.core.method import (
    Average,
    Counter,
    Method,
    Number,
    Row,
    Side,
    State,
    Stateful,
    Window,
    method_of,
    spec_of,
)

__all__ = [
    "Average",
    "Counter",
    "Method",
    "Number",
    "Row",
    "Rule",
    "State",
    "Window",
    "chosen",
    "clamp",
    "lerp",
    "maximum",
    "method_of",
    "minimum",
    "rule",
    "run_average",
    "run_rule",
    "spec_of",
    "sqrt",
    "where",
]


def _read(
    layer: Stateful, side: Side, new: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Any], list[tuple[str, Tensor, Tensor]]]:
    """Values that a rule may ask for; and windows a step on, with where that may be kept."""
    method_state, values, pushed = layer.method_state, dict(new), []
    for name, _ in side.counters:
        values[name] = method_state[name].to(dtype) + 1
    for name in side.numbers:
        values[name] = (
            method_state[name]
            if method_state[name].dtype == dtype
            else method_state[name].to(dtype)
        )
    for name, _ in side.rows:
        row = method_state[name]
        values[f"old_{name}"] = row if row.dtype == dtype else row.to(dtype)
    for name, window in side.windows:
        parts = [new[component] for component in window.of]
        step = parts[0] if len(parts) == 1 else torch.cat(parts)
        finite = all_finite(step, layer.num_features)
        moved = slide(method_state[name], step, finite, False)
        steps = values[side.counters[0][0]].clamp(max=moved.shape[0])
        pieces = moved.sum(0).div_(steps).chunk(len(parts))
        for component, piece in zip(window.of, pieces, strict=True):
            values[f"{name}_{component}"] = piece
        # The oldest place is empty where a step was not finite: no average yet.
        values[f"{name}_full"] = moved[0, -layer.num_features :] != 0
        pushed.append((name, moved, finite))
    values["eps"] = scalar(layer.eps)
    for name in side.options:
        values[name] = getattr(layer, name)
    return values, pushed


def _run(side: Side, values: dict[str, Any], dtype: torch.dtype) -> Any:
    return side.bound[dtype == torch.float64](*[values[name] for name in side.names])


def run_rule(
    layer: Stateful, method: Method, mean: Tensor | None, var: Tensor, update: bool
) -> Statistics:
    """Choose statistics by a rule on torch's operators, and move the method's own state.

    Args:
        layer: The layer.
        method: Its method.
        mean: Mean of the batch; None in the uncentered form.
        var: Its biased variance, or second moment.
        update: Whether state may change.
    """
    side, method_state, dtype = method.forward, layer.method_state, var.dtype
    read = {"running_mean", "running_var"}
    if method.state.running != "applied":
        read &= set(side.names)
    removed = any(getattr(layer, name) is None for name in read)
    if not side.bound or removed:  # running statistics may be taken away, to use the batch's
        return Statistics(mean, var)
    values, pushed = _read(layer, side, {"mean": mean, "var": var}, dtype)
    for name in ("running_mean", "running_var"):
        if name in side.names:
            row = getattr(layer, name)
            values[name] = row if row.dtype == dtype else row.to(dtype)
    found = _run(side, values, dtype)
    applied_mean, applied_var = found.mean, found.var
    if update:
        if applied_mean is not mean:
            applied_mean = _apart(applied_mean, side, values)
        applied_var = _apart(applied_var, side, values)
        values["applied_mean"], values["applied_var"] = applied_mean, applied_var
        complete: Any = True
        for name, kept in side.rows:
            (of,), old = kept.of, values[f"old_{name}"]
            finite = is_finite(var if of in ("mean", "var") else applied_var)
            new = values[of]
            if isinstance(kept, Average):
                first = values[side.counters[0][0]] == 1
                new = torch.where(first, new, torch.lerp(old, new, getattr(layer, kept.weight)))
            method_state[name].copy_(torch.where(finite, new, old))
            complete = finite if complete is True else complete & finite
        for name, moved, finite in pushed:
            method_state[name].copy_(torch.where(finite, moved, method_state[name]))
        for name, counter in side.counters:
            method_state[name].add_(complete.all() if counter.complete and side.rows else 1)
    center, batch_weight = (None, 1.0) if found.batch_weight is None else (mean, found.batch_weight)
    return Statistics(
        applied_mean, applied_var, found.r, found.d, center, batch_weight, found.use_batch_stats
    )


def _apart(row: Tensor, side: Side, values: dict[str, Any]) -> Tensor:
    """A row that a rule gave, apart from state that moves before it is used."""
    kept = ("running_mean", "running_var", *(f"old_{name}" for name, _ in side.rows))
    return row.clone() if any(row is values.get(name) for name in kept) else row


def run_average(
    layer: Stateful, method: Method, new: Tensor, update_weight: float | Tensor, update: bool
) -> Tensor:
    """The average that stands for the backward statistics of a step; it takes them in.

    Args:
        layer: The layer.
        method: Its method.
        new: ``mean(g * z)``, or ``mean(g)`` and it side by side.
        update_weight: Weight of the newest step in exponential averages.
        update: Whether state may change.
    """
    side, method_state = method.backward, layer.method_state
    values, pushed = _read(layer, side, {"psi": new}, new.dtype)
    values["update_weight"] = update_weight
    average: Tensor = _run(side, values, new.dtype)
    if update:
        finite = all_finite(new, layer.num_features)
        for name, _ in side.rows:
            method_state[name].copy_(torch.where(finite, average, values[f"old_{name}"]))
        for name, moved, _ in pushed:
            method_state[name].copy_(torch.where(finite, moved, method_state[name]))
        for name, _ in side.counters:
            method_state[name].add_(1)
    return average
