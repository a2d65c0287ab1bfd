"""Weight decay of scales and shifts: the norms for which it has an effect, and optimizer groups.

The next norm undoes a decay of gamma and beta, because it normalizes its input at any scale. Decay
has an effect only if a path leads from the norm to the output without crossing another norm
(four-things, section 3.3).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from anybatch.conversion.module_swap import unwrapped
from anybatch.conversion.norm_paths import Paths, find_paths, scales
from anybatch.core.arguments import check_between, check_from, check_module
from anybatch.core.notices import NoEffectWarning
from anybatch.core.text_tables import text_table

_SHOWN = 4  # operations of a path, and norms met, that a table names


@dataclass(frozen=True)
class DecayRow:
    """The decision whether weight decay of one norm's scale and shift has an effect.

    Args:
        name: its path in the network (the first, where it has several).
        kind: its class.
        decision: "decay" or "keep".
        reason: the path to the output, or what undoes the decay.

    Example:
        >>> DecayRow("1", "BatchNorm2d", "keep", "undone by 4").decision
        'keep'
    """

    name: str
    kind: str
    decision: Literal["decay", "keep"]
    reason: str


@dataclass(frozen=True)
class DecayPlan:
    """The decisions of `param_groups` with ``norm_decay="auto"``, one row per norm with a scale.

    Args:
        rows: one `DecayRow` per norm, in the order of the network.

    Example:
        >>> DecayPlan(()).to_dict()
        {'rows': []}
    """

    rows: tuple[DecayRow, ...]

    @property
    def decayed(self) -> list[str]:
        """Names of the norms whose scale and shift are decayed."""
        return [row.name for row in self.rows if row.decision == "decay"]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists and dictionaries, ready for json.

        Returns:
            A dictionary of the rows.
        """
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        head = ("norm", "kind", "decision", "why")
        cells = [(r.name or "(the model)", r.kind, r.decision, r.reason) for r in self.rows]
        return f"{text_table(head, cells)}\n{len(self.decayed)} of {len(self.rows)} norms decayed."


def decay_plan(model: nn.Module, example_inputs: Any = None) -> DecayPlan:
    """Find the norms whose scale and shift weight decay can act on.

    Weight decay of a norm's scale and shift regularizes the network only if a path leads from the
    norm to the output that passes no other norm: the next norm undoes a change of scale. In a plain
    chain that is the last norm alone, in an Inception those of the last block, in a residual
    network those that end a block after which no shortcut holds a norm.

    Args:
        model: the network; it is left as it was.
        example_inputs: what its forward takes (a tensor, a tuple of positional or a mapping of
            keyword arguments), for networks that cannot be traced symbolically.

    Returns:
        The `DecayPlan`; print it for a table.

    Raises:
        ValueError: the network does not trace and there are no example inputs, or its forward fails
            on them.
        TypeError: `model` is no module.

    Source: four-things, section 3.3.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(),
        ...                       nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> print(decay_plan(model))
        norm  kind         decision  why
        ----  -----------  --------  -------------------------------------
        1     BatchNorm1d  keep      undone: every path meets 4
        4     BatchNorm1d  decay     reaches the output past no norm, by 5
        1 of 2 norms decayed.
    """
    check_module("model", model)
    inner, prefix = unwrapped(model)
    found = find_paths(inner, example_inputs)
    if found is None:
        raise ValueError(
            f"example_inputs={example_inputs!r}: {type(inner).__name__} cannot be traced "
            "symbolically; give what its forward takes, or norm_decay=True or False"
        )
    rows = [
        _row(prefix + name, module, found[name])
        for name, module in inner.named_modules()
        if scales(module)
    ]
    return DecayPlan(tuple(rows))


def _row(name: str, module: nn.Module, paths: Paths) -> DecayRow:
    kind = type(module).__name__
    if not paths.called:
        return DecayRow(name, kind, "keep", "not called")
    if paths.open is not None:
        way = f", by {_some(paths.open, ' > ')}" if paths.open else ""
        return DecayRow(name, kind, "decay", f"reaches the output past no norm{way}")
    if not paths.met:
        return DecayRow(name, kind, "keep", "leads nowhere: the output does not depend on it")
    return DecayRow(name, kind, "keep", f"undone: every path meets {_some(paths.met, ' or ')}")


def _some(names: Iterable[str], between: str) -> str:
    names = [name or "(the model)" for name in names]
    if len(names) > _SHOWN:
        names = [*names[: _SHOWN - 1], f"... ({len(names) - _SHOWN} more)", names[-1]]
    return between.join(names)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    norm_decay: float | bool | Literal["auto"] = "auto",
    gamma_target: float = 0.0,
    *,
    bias_decay: float | bool = True,
    example_inputs: Any = None,
) -> list[dict[str, Any]]:
    """Make groups for a torch optimizer, with weight decay of scales and shifts where it acts.

    Every parameter is in exactly one group, also if modules share it or if it is frozen: optimizers
    skip frozen parameters, and they may be thawed later. A parameter that a norm shares counts as
    the norm's; one that several norms share is decayed if one of them would be. The groups are
    named ("weights", "biases", "norms", "gammas", "without decay"); empty ones are left out.

    Args:
        model: the network, plain or in DistributedDataParallel.
        weight_decay: of everything that is not said otherwise, from 0 on.
        norm_decay: of scales (gamma) and shifts (beta) of all norms: "auto" (default) is
            `weight_decay` where `decay_plan` finds that it does something, else 0; True is
            `weight_decay` and False 0 for all of them; a number is that much for all of them.
        gamma_target: what scales are decayed towards, 0.0 (default) or up to 1.0. An optimizer
            decays towards 0 only: for another target the group "gammas" has weight decay 0, and
            `GammaDecay` must be given the optimizer.
        bias_decay: of all other parameters named "bias", as `norm_decay` but for "auto" (default
            True: as weights).
        example_inputs: what the network takes, for "auto" and networks that cannot be traced
            symbolically.

    Returns:
        A list of groups, each a dictionary of "params", "weight_decay" and "name".

    Raises:
        ValueError: an argument out of range, a parameter without a shape, or a network whose paths
            cannot be found.
        TypeError: an argument of another type.

    Source: four-things, section 3.3; there, the target made no difference.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(),
        ...                       nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> groups = param_groups(model, 5e-4)
        >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
        [('weights', 6, 0.0005), ('norms', 2, 0.0005), ('without decay', 2, 0.0)]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    check_module("model", model)
    check_from("weight_decay", weight_decay, 0)
    check_between("gamma_target", gamma_target, 0.0, 1.0)
    biases = _amount("bias_decay", bias_decay, weight_decay)
    amounts = _norm_amounts(model, weight_decay, norm_decay, example_inputs)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    norms = _norm_parameters(model, amounts)
    for name, parameter in model.named_parameters():  # each once
        if is_lazy(parameter):
            raise ValueError(
                f"model: the shape of {name!r} is not known yet; run one batch through it before"
            )
        if id(parameter) in norms:
            amount, is_scale = norms[id(parameter)]
            kind = "gammas" if is_scale and gamma_target else "norms"
        else:
            is_bias = name.rpartition(".")[2] == "bias"
            amount = biases if is_bias else float(weight_decay)
            kind = "biases" if is_bias and amount != weight_decay else "weights"
        kind = kind if amount else "without decay"
        group: dict[str, Any] = {"params": [], "weight_decay": amount, "name": kind}
        if kind == "gammas":  # for `GammaDecay`: optimizers alone leave it undecayed
            own = {"gamma_decay": amount, "gamma_target": float(gamma_target)}
            group |= {"weight_decay": 0.0, **own}
        groups.setdefault((kind, amount), group)["params"].append(parameter)
    if gamma_target and not any(kind == "gammas" for kind, _ in groups):
        warnings.warn(
            f"gamma_target={gamma_target}: no scale of a norm has a weight decay, so none is drawn "
            "there; give norm_decay and weight_decay above 0",
            NoEffectWarning,
            stacklevel=2,
        )
    order = ["weights", "biases", "norms", "gammas", "without decay"]
    return sorted(groups.values(), key=lambda group: order.index(group["name"]))


def _norm_amounts(
    model: nn.Module,
    weight_decay: float,
    norm_decay: float | bool | Literal["auto"],
    example_inputs: Any,
) -> dict[nn.Module, float]:
    """The decay of each norm that has a scale."""
    norms = {name: module for name, module in model.named_modules() if scales(module)}
    if norm_decay == "auto":
        decayed = set(decay_plan(model, example_inputs).decayed)
        return {m: float(weight_decay) if name in decayed else 0.0 for name, m in norms.items()}
    if isinstance(norm_decay, str):
        raise ValueError(f"norm_decay={norm_decay!r}: give 'auto', True, False or a number")
    amount = _amount("norm_decay", norm_decay, weight_decay)
    return dict.fromkeys(norms.values(), amount)


def _norm_parameters(
    model: nn.Module, amounts: Mapping[nn.Module, float]
) -> dict[int, tuple[float, bool]]:
    """By identity: the decay of each parameter of norms, and whether it is a scale."""
    found: dict[int, tuple[float, bool]] = {}
    for module, amount in amounts.items():
        for name, parameter in _own_parameters(module):
            known, scale = found.get(id(parameter), (0.0, True))
            found[id(parameter)] = (max(known, amount), scale and name.startswith("weight"))
    return found


def _own_parameters(norm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A norm's parameters, and those that a parametrization computes its weight or bias from."""
    yield from norm.named_parameters(recurse=False)
    if parametrize.is_parametrized(norm):
        yield from norm.parametrizations.named_parameters()  # type: ignore[union-attr]


def _amount(name: str, value: float | bool, weight_decay: float) -> float:
    if isinstance(value, bool):
        return float(weight_decay) if value else 0.0
    check_from(name, value, 0)
    return float(value)
