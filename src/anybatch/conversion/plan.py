"""What `convert` would do, norm by norm, and why: as data and as a table."""

from __future__ import annotations

import copy
import difflib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from anybatch.backends.aten.patches import geometry_of
from anybatch.conversion.module_swap import paths
from anybatch.conversion.norm_types import (
    NormKind,
    has_plain_forward,
    is_batch_norm,
    norm_kind,
    wrapper_refusal,
)
from anybatch.conversion.norm_with_activation import ends_in_activation
from anybatch.conversion.producers import Feeder, find_feeders
from anybatch.conversion.relu_fusion.find import Found, find_fusions
from anybatch.conversion.relu_fusion.fused_block import Fusion
from anybatch.conversion.replacement import trial
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.weight_centralization import is_centralized, weight_centralization
from anybatch.registry import Method, fitting_groups, get_method

Where = str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class PlanRow:
    """What becomes of one norm.

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
    """The decisions of `convert`, one row a norm.

    Args:
        method: the method asked for, or the mapping of name patterns to methods.
        rows: one `PlanRow` a norm, in the order of the network.
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
            >>> plan(nn.Sequential(nn.BatchNorm1d(3)), "bn").having("convert")[0].name
            '0'
        """
        return [row for row in self.rows if row.decision == decision]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists and dictionaries, ready for json.

        Returns:
            A dictionary of method, rows and notes.

        Example:
            >>> plan(nn.Sequential(nn.BatchNorm1d(3)), "bn").to_dict()["rows"][0]["becomes"]
            'BatchNorm1d'
        """
        rows = [{**asdict(row), "also": list(row.also)} for row in self.rows]
        return {"method": self.method, "rows": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("norm", "kind", "fed by", "decision", "becomes", "why")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*table, *self.notes])


def _cells(row: PlanRow) -> tuple[str, ...]:
    name = ", ".join([row.name or "(the model)", *row.also])
    return (name, row.kind, row.feeder, row.decision, row.becomes, row.reason)


@dataclass(frozen=True)
class Decision:
    """A row together with what carries it out: the norm, the method, its options, the feeder.

    Args:
        row: what is shown of it.
        norm: the norm.
        method: the method it becomes, or None.
        options: of the method's layer.
        centralize: the layer whose weights are centralized for it, or None.
        bind: the layer that it is bound to, or None.
    """

    row: PlanRow
    norm: nn.Module
    method: Method | None = None
    options: Mapping[str, Any] | None = None
    centralize: nn.Module | None = None
    bind: nn.Module | None = None


def plan(
    model: nn.Module,
    method: str | Mapping[str, str],
    *,
    batch_size: int | None = None,
    example_inputs: Any = None,
    where: Where | None = None,
    centralize: bool | None = None,
    fuse: bool = False,
    **options: Any,
) -> Plan:
    """Say what `convert` with the same arguments would do, and do nothing.

    Args:
        model: the network.
        method: a method's short name, or a mapping of name patterns to short names, of which the
            first that matches a norm counts.
        batch_size: the examples in a training forward, for the methods that use it (default: they
            read it from the first batch).
        example_inputs: what the network takes (a tensor, a tuple of positional or a mapping of
            keyword arguments), for networks that cannot be traced symbolically.
        where: which norms: a name pattern such as `"encoder.*"` or a predicate `(name, module)`
            (default: all).
        centralize: whether to centralize the weights of the layers that feed the norms (default: of
            the convolutions in a fresh network, for "mabn").
        fuse: whether norms do the ReLU that follows them, or the addition and the ReLU (default
            False).
        **options: the method's own arguments, such as `window=32`.

    Returns:
        The `Plan`; print it for a table.

    Raises:
        ValueError: an unknown method, a wrapped or compiled model, a bad `batch_size`.
        TypeError: an option that the method does not have.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> print(plan(model, "mabn"))
        norm  kind         fed by  decision  becomes                   why
        ----  -----------  ------  --------  ------------------------  ---...
        1     BatchNorm2d  0       convert   MovingAverageBatchNorm2d  eval output unchanged; ...
        1 of 1 norms converted; the model is fresh (no batch seen); weights of 1 layers centralized.
    """
    made, _, _ = decide(
        model,
        method,
        batch_size=batch_size,
        example_inputs=example_inputs,
        where=where,
        centralize=centralize,
        fuse=fuse,
        **options,
    )
    return made


def decide(
    model: nn.Module,
    method: str | Mapping[str, str],
    *,
    batch_size: int | None,
    example_inputs: Any,
    where: Where | None,
    centralize: bool | None,
    fuse: bool,
    **options: Any,
) -> tuple[Plan, list[Decision], dict[nn.Module, Fusion]]:
    """Decide norm by norm; `plan` shows the first half of the answer, `convert` does the second.

    Args:
        model: the network.
        method: as in `plan`.
        batch_size: as in `plan`.
        example_inputs: as in `plan`.
        where: as in `plan`.
        centralize: as in `plan`.
        fuse: as in `plan`.
        **options: as in `plan`.

    Returns:
        The plan, the decision behind each of its rows, and the blocks to fuse.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: give a torch.nn.Module")
    if (refusal := wrapper_refusal(model)) is not None:
        raise ValueError(refusal)
    methods = _methods(method)
    _check_options(methods.values(), options, batch_size)
    places = paths(model)
    feeders = find_feeders(model, example_inputs)
    fresh = is_fresh(model)
    judge = _Judge(places, feeders, methods, options, batch_size, where, centralize, fresh)
    kinds = [(module, kind) for module in places if (kind := norm_kind(module)) is not None]
    decisions = [judge.decide(module, kind) for module, kind in kinds]
    found = Found()
    if fuse:
        found = find_fusions(model, [d.norm for d in decisions if _can_fuse(d)])
        decisions = [_with_fusion(decision, found) for decision in decisions]
    asked = method if isinstance(method, str) else dict(method)
    rows = tuple(decision.row for decision in decisions)
    return Plan(asked, rows, _notes(decisions, fresh)), decisions, found.blocks


def _can_fuse(decision: Decision) -> bool:
    """Whether a norm is, or becomes, a layer that can do more than normalize."""
    if decision.method is None:
        return isinstance(decision.norm, NormLayer) and decision.row.decision == "keep"
    return issubclass(decision.method.layer(2), NormLayer)


def _with_fusion(decision: Decision, found: Found) -> Decision:
    """A decision that says what its norm does in its own pass, and why it does not do more."""
    row = decision.row
    if _can_fuse(decision):
        fuses, reason = found.of(decision.norm)
    elif decision.method is not None:
        fuses, reason = None, f"not fused: {row.becomes} is torch's layer"
    else:
        return decision
    return replace(decision, row=replace(row, fuses=fuses, reason=f"{row.reason}; {reason}"))


def is_fresh(model: nn.Module) -> bool:
    """Whether a network's batch norms say that it was never trained.

    Args:
        model: the network.

    Returns:
        True if there are running statistics and all are as they start: no batch counted, means 0,
        variances 1. False where there are none to tell by.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> is_fresh(norm)
        True
        >>> _ = norm.running_mean.fill_(0.5); is_fresh(norm)
        False
    """
    norms = [module for module in model.modules() if is_batch_norm(module)]
    tracked = [n for n in norms if isinstance(n._buffers.get("running_var"), Tensor)]
    return bool(tracked) and all(_untouched(norm) for norm in tracked)


def _untouched(norm: nn.Module) -> bool:
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    count = norm._buffers.get("num_batches_tracked")
    if var is None or mean is None or var.is_meta or isinstance(mean, nn.UninitializedBuffer):
        return False
    counted = count is not None and bool(count > 0)
    return not counted and bool((mean == 0).all()) and bool((var == 1).all())


class _Judge:
    """Decides about one norm after another, with all that must be known in hand."""

    def __init__(
        self,
        places: Mapping[nn.Module, tuple[str, ...]],
        feeders: Mapping[str, Feeder],
        methods: Mapping[str, Method],
        options: Mapping[str, Any],
        batch_size: int | None,
        where: Where | None,
        centralize: bool | None,
        fresh: bool,
    ) -> None:
        self.places = places
        self.feeders = feeders
        self.methods = methods
        self.options = options
        self.batch_size = batch_size
        self.where = where
        self.centralize = centralize
        self.fresh = fresh
        self.by_name = {name: module for module, names in places.items() for name in names}
        self.owners = _owners(places)

    def decide(self, norm: nn.Module, kind: NormKind) -> Decision:
        """Decide what becomes of one norm."""
        names = self.places[norm]
        method = next((m for glob, m in self.methods.items() if _matches(glob, names, norm)), None)
        if kind.family == "frozen":
            return self._keep(norm, "frozen by design: its statistics are constants")
        if kind.family == "other":
            return self._keep(norm, "no batch norm")
        if self.where is not None and not _matches(self.where, names, norm):
            return self._keep(norm, "left out by where")
        if method is None:
            return self._keep(norm, "matches no pattern of method")
        if kind.refusal is not None:
            return self._refuse(norm, kind.refusal)
        options = _options_for(method, self.options, self.batch_size)
        if _is_already(norm, method, options):
            return self._keep(norm, f"already {method.name}")
        if "seed" in method.options and options.get("generator") is None:
            options["seed"] = layer_seed(self.options.get("seed") or 0, names[0])
        return self._convert(norm, kind, method, options)

    def _convert(
        self, norm: nn.Module, kind: NormKind, method: Method, options: Mapping[str, Any]
    ) -> Decision:
        feeder = self.feeders[self.places[norm][0]]
        if method.name == "in" and isinstance(self._module(feeder), nn.Linear):
            erased = "after a linear layer instance norm has one value to normalize: output is 0"
            return self._refuse(norm, f"{erased}; use ln, or leave it out with where=")
        binds = method.binds and options.get("order", 1) != 0 and options.get("window") != 1
        if binds and (obstacle := _binding_obstacle(norm, feeder, self._module(feeder))):
            return self._keep(norm, f"stays as it is: {obstacle}")
        try:
            rewrites = trial(norm, method, options)
        except ValueError as error:
            return self._refuse(norm, str(error))
        if rewrites and (shared := self._sharing(norm)):
            absorbs = f"{method.name} rewrites its scale and shift, which {shared} uses too"
            return self._refuse(norm, f"{absorbs}: give each its own, or leave it out with where=")
        target, why = self._centralization(method, options, feeder)
        bound = f"bound to {feeder.name!r}" if binds else None
        wrap = "train the network in a VirtualDataset" if method.wraps else None
        ends = "keeps its activation" if ends_in_activation(norm) else None
        reason = "; ".join(filter(None, [_effect(method), ends, why, bound, wrap]))
        row = self._row(norm, "convert", method.layer(kind.dims or 0).__name__, reason, target)
        module = None if target is None else self.by_name[target]
        if binds:
            row = replace(row, binds=feeder.name)
        return Decision(row, norm, method, options, module, self._module(feeder) if binds else None)

    def _centralization(
        self, method: Method, options: Mapping[str, Any], feeder: Feeder
    ) -> tuple[str | None, str | None]:
        """Which layer's weights to centralize for a norm, and what to say about it."""
        wanted = method.name == "mabn" and not options.get("centered", False)
        if self.centralize is False or not (wanted or self.centralize):
            return None, None
        obstacle = _centralization_obstacle(feeder, self._module(feeder))
        if obstacle is not None:
            return None, f"weights not centralized: {obstacle}"
        if is_centralized(self.by_name[str(feeder.name)]):
            return None, f"weights of {feeder.name!r} are centralized already"
        if self.centralize is None and not self.fresh:
            return None, "weights left alone: trained (centralize=True would change the output)"
        if self.centralize is None and isinstance(self._module(feeder), nn.Linear):
            # moving-average-bn, section 4.2, centralizes convolution kernels.
            return None, "weights left alone: a linear layer's are with centralize=True only"
        return feeder.name, f"weights of {feeder.name!r} centralized"

    def _module(self, feeder: Feeder) -> nn.Module | None:
        return None if feeder.name is None else self.by_name[feeder.name]

    def _sharing(self, norm: nn.Module) -> str | None:
        """The name of another module that holds one of a norm's Parameters."""
        for parameter in norm.parameters(recurse=False):
            for owner in self.owners[id(parameter)]:
                if owner is not norm:
                    return repr(self.places[owner][0])
        return None

    def _keep(self, norm: nn.Module, reason: str) -> Decision:
        return Decision(self._row(norm, "keep", type(norm).__name__, reason), norm)

    def _refuse(self, norm: nn.Module, reason: str) -> Decision:
        return Decision(self._row(norm, "refuse", type(norm).__name__, reason), norm)

    def _row(
        self,
        norm: nn.Module,
        decision: Literal["convert", "keep", "refuse"],
        becomes: str,
        reason: str,
        centralizes: str | None = None,
    ) -> PlanRow:
        name, *also = self.places[norm]
        feeder = str(self.feeders[name]) if name in self.feeders else ""
        kind = type(norm).__name__
        return PlanRow(name, kind, feeder, decision, becomes, reason, centralizes, tuple(also))


def _centralization_obstacle(feeder: Feeder, module: nn.Module | None) -> str | None:
    """Why a norm's feeder cannot have its weights centralized, or None."""
    if module is None:
        return feeder.reason
    if feeder.other_consumers:
        return f"the output of {feeder.name!r} is used elsewhere too"
    if is_centralized(module):
        return None
    if not has_plain_forward(module):
        return f"{feeder.name!r} computes its weight or output in its own way"
    try:
        weight_centralization(copy.copy(module))  # switches the class of the copy alone
    except TypeError:
        return f"{feeder.name!r} is of a class of its own, {type(module).__name__}"
    except ValueError as error:
        return str(error)
    return None


def _binding_obstacle(norm: nn.Module, feeder: Feeder, module: nn.Module | None) -> str | None:
    """Why a norm cannot follow the weights of what feeds it, or None."""
    if module is None:
        return feeder.reason
    if not is_centralized(module) and not has_plain_forward(module, any_weight=True):
        return f"{feeder.name!r} computes its weight or output in its own way"
    if geometry_of(module).outputs != getattr(norm, "num_features", None):
        return f"the channels of {feeder.name!r} are not those that it normalizes"
    return None


def _owners(places: Iterable[nn.Module]) -> dict[int, list[nn.Module]]:
    """Who holds each Parameter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in places:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _methods(method: str | Mapping[str, str]) -> dict[str, Method]:
    """Name patterns -> rows of the method table."""
    if isinstance(method, str):
        return {"*": get_method(method)}
    if not isinstance(method, Mapping) or not method:
        raise TypeError(
            f"method={method!r}: give a short name such as 'mabn', or a mapping of name patterns "
            "to short names"
        )
    return {glob: get_method(name) for glob, name in method.items()}


def _check_options(
    methods: Iterable[Method], options: Mapping[str, Any], batch_size: int | None
) -> None:
    """Refuse options that no method has, and a batch size that is none."""
    methods = list(methods)
    if batch_size is not None and (
        isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    ):
        raise ValueError(f"batch_size={batch_size!r}: give a whole number from 1")
    known = set().union(*(_takes(method) for method in methods))
    for name in options:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        titles = ", ".join(sorted({method.name for method in methods}))
        raise TypeError(
            f"{name}={options[name]!r}: {titles} has no such option{hint} "
            f"It takes {', '.join(sorted(known))}."
        )


def _takes(method: Method) -> set[str]:
    """The options a method takes: its own, and momentum where it keeps running statistics."""
    return set(method.options) | ({"momentum"} if issubclass(method.layer(2), NormLayer) else set())


def _options_for(
    method: Method, options: Mapping[str, Any], batch_size: int | None
) -> dict[str, Any]:
    """Those of the options that a method takes, over those suggested; and the batch size."""
    chosen = dict(method.suggested)
    chosen |= {name: value for name, value in options.items() if name in _takes(method)}
    if batch_size is not None and "batch_size" in method.options:
        chosen.setdefault("batch_size", batch_size)
    return chosen


def _is_already(norm: nn.Module, method: Method, options: Mapping[str, Any]) -> bool:
    """Whether a norm is a layer of the method, with the options that were asked for."""
    if not isinstance(norm, NormLayer) or type(norm) is not method.layer(norm.dims):
        return False
    wanted = {**options, **method.fixed}
    if "seed" in method.options and options.get("seed") is not None:
        return False  # a base for the seeds of all layers: they are drawn again
    if "num_groups" in wanted:
        wanted["num_groups"] = fitting_groups(norm.num_features, wanted["num_groups"])
    return all(getattr(norm, name, value) == value for name, value in wanted.items())


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer: another for each, the same in every run and on every rank.

    Args:
        seed: of the network.
        name: the layer's path in it.

    Returns:
        A whole number.

    Example:
        >>> layer_seed(0, "norm1") == layer_seed(0, "norm2")
        False
    """
    return random.Random(f"{seed}/{name}").getrandbits(31)


def _matches(where: Where, names: Iterable[str], module: nn.Module) -> bool:
    if isinstance(where, str):
        return any(fnmatchcase(name, where) for name in names)
    return any(where(name, module) for name in names)


def _effect(method: Method) -> str:
    if method.exact_eval:
        return "eval output unchanged"
    if issubclass(method.layer(2), NormLayer):
        return "eval output changes: train on"
    return "eval output changes, running statistics are dropped: train on"


def _notes(decisions: Iterable[Decision], fresh: bool) -> tuple[str, ...]:
    decisions = list(decisions)
    converted = sum(decision.method is not None for decision in decisions)
    centralized = sum(decision.centralize is not None for decision in decisions)
    state = "fresh (no batch seen)" if fresh else "trained, as far as its statistics tell"
    fused = sum(decision.row.fuses is not None for decision in decisions)
    return (
        f"{converted} of {len(decisions)} norms converted; the model is {state}; "
        f"weights of {centralized} layers centralized"
        + (f"; {fused} norms do the ReLU that follows them." if fused else "."),
    )
