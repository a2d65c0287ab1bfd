"""The line that `convert` logs."""

from __future__ import annotations

from collections import Counter

from anybatch.conversion.plan import Decisions
from anybatch.core.arguments import counted

_REASONS = 3  # for which norms stay as they are, that the line names


def summary(decisions: Decisions) -> str:
    """Describe a conversion in one line that a reader can act on."""
    rows = decisions.rows
    done = Counter(row.method for row in rows if row.method is not None)
    all_norms = counted(len(rows), "norm")
    names = ", ".join(f"{number} to {method.name}" for method, number in done.items()) or "none"
    state = "fresh" if decisions.fresh else "trained"
    parts = [f"of {all_norms} in a {state} network converted {names}"]
    kept = Counter(row.row.reason for row in rows if row.row.decision == "keep")
    parts += [f"{number} kept: {why}" for why, number in kept.most_common(_REASONS)]
    if len(kept) > _REASONS:
        parts.append(f"{sum(kept.values())} kept in all")
    if centralized := sum(row.centralize is not None for row in rows):
        parts.append(f"weights of {counted(centralized, 'layer')} centralized")
    if uncentralized := sum(row.uncentralized for row in rows):
        parts.append(f"weights before {counted(uncentralized, 'norm')} not centralized")
    if cut := sum("num_groups=" in row.row.reason for row in rows if row.method is not None):
        parts.append(f"num_groups reduced to fit the channels of {counted(cut, 'norm')}")
    if fused := sum(row.row.fuses is not None for row in rows):
        parts.append(f"ReLUs fused into {counted(fused, 'norm')}")
    for method in done:
        if not decisions.fresh and method.when_trained:
            chosen = ", ".join(f"{name}={value}" for name, value in method.when_trained.items())
            if any(chosen in row.row.reason for row in rows):
                parts.append(f"{method.name} starts with {chosen}, as the network is trained")
        if not method.exact_eval:
            parts.append("the output in evaluation mode changes: train on")
        if method.scheduled:
            parts.append("step an anybatch.NormScheduler once an epoch")
        if method.wraps:
            parts.append("train the network in an anybatch.VirtualDataset")
    parts += [note.rstrip(".") for note in decisions.plan.notes[1:]]
    return f"convert: {'; '.join(dict.fromkeys(parts))}. anybatch.plan lists every norm."
