"""The decision for each norm: what it becomes, and what happens to the layer that feeds it."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from anybatch.backends.aten.patches import geometry_of
from anybatch.conversion.frozen_norms import TORCH_NORMS, is_frozen_norm, thawed
from anybatch.conversion.method_options import is_already, kept_options, options_for
from anybatch.conversion.module_swap import owners_of
from anybatch.conversion.norm_types import NormKind, channels_of, has_plain_forward, is_batch_norm
from anybatch.conversion.norm_with_activation import ends_in_activation
from anybatch.conversion.plan_table import PlanRow
from anybatch.conversion.producers import Feeder
from anybatch.conversion.replacement import arguments, replacement, trial
from anybatch.core.module_state import has_initial_statistics
from anybatch.core.name_patterns import Where, matches
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.group_norm import fitting_groups
from anybatch.layers.norm_copies import NormCopies
from anybatch.layers.uncentered_norm_layer import UncenteredNormLayer
from anybatch.layers.weight_centralization import CENTRALIZED, is_centralized, weight_centralization
from anybatch.registry import FROZEN, Method


@dataclass(frozen=True)
class Decision:
    """The decision for one norm, with everything needed to carry it out.

    Args:
        row: The row of the plan's table.
        norm: The norm.
        method: The method it becomes; None where it stays as it is.
        options: Options of the method's layer.
        centralize: The layer whose weights are centralized for it, or None.
        follow: The layer whose weights its checkpoints tell of, or None.
        decentralize: The layer whose centred weights are written, as it leaves mabn, or None.
        bind: The layer that it is bound to, or None.
        uncentralized: Whether the weights before it were to be centralized and cannot be.
        untraced: Whether that is only because the model cannot be traced.
        unbound: Whether it stays as it is because it cannot be bound to the layer before it.
    """

    row: PlanRow
    norm: nn.Module
    method: Method | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    centralize: nn.Module | None = None
    follow: nn.Module | None = None
    decentralize: nn.Module | None = None
    bind: nn.Module | None = None
    uncentralized: bool = False
    untraced: bool = False
    unbound: bool = False


def is_fresh(model: nn.Module) -> bool:
    """True if the running statistics of a network's batch norms are still the initial ones.

    Returns:
        True if there are running statistics and all are initial: no batch counted, means 0,
        variances 1, or on the meta device. False if there are none.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> is_fresh(norm)
        True
        >>> _ = norm.running_mean.fill_(0.5); is_fresh(norm)
        False
    """
    norms = [module for module in model.modules() if is_batch_norm(module)]
    tracked = [n for n in norms if isinstance(n._buffers.get("running_var"), Tensor)]
    return bool(tracked) and all(has_initial_statistics(norm) for norm in tracked)


@dataclass
class NormDecider:
    """Decides about one norm after another.

    Args:
        places: Every module of the network with its paths.
        feeders: What feeds each norm, by the norm's first path.
        methods: Name pattern -> method.
        options: Options of the methods.
        batch_size: As in `convert`.
        where: As in `convert`.
        centralize: As in `convert`.
        fresh: Whether the network is untrained.
        copies: Of each norm that is to be made.
    """

    places: Mapping[nn.Module, tuple[str, ...]]
    feeders: Mapping[str, Feeder]
    methods: Mapping[str, Method]
    options: Mapping[str, Any]
    batch_size: int | None
    where: Where | None
    centralize: bool | None
    fresh: bool
    copies: int

    def __post_init__(self) -> None:
        self.by_name = {name: module for module, names in self.places.items() for name in names}
        self.owners = owners_of(self.places)
        self.checked: set[tuple[str, int]] = set()  # methods whose options were tried, with dims
        self.met: set[str] = set()  # patterns that chose a norm's method

    def decide(self, norm: nn.Module, kind: NormKind) -> Decision:
        """Decide what becomes of one norm.

        Raises:
            ValueError: An option has a value that the method refuses for any norm.
        """
        names = self.places[norm]
        pattern = next((one for one in self.methods if matches(one, names, norm)), None)
        if kind.family == "other":
            return self._keep(norm, "no batch norm")
        method = None
        if pattern is not None:
            self.met.add(pattern)
            method = self.methods[pattern]
        if not matches(self.where, names, norm):
            return self._keep(norm, "left out by where")
        if method is None:
            return self._keep(norm, "matches no pattern of method")
        if kind.refusal is not None:
            return self._refuse(norm, kind.refusal)
        if kind.family == "frozen":
            if method is FROZEN:
                return self._keep(norm, "already frozen")
            try:
                thawed(norm)
            except ValueError as error:
                return self._keep(norm, f"frozen, and stays so: {error}")
        options = options_for(method, self.options, self.batch_size)
        if self.copies > 1 and any(map(self._is_copy, names)):
            return self._keep(norm, "already one of several copies")
        if self.copies == 1 and is_already(norm, method, options):
            own = kept_options(norm, method, options)
            note = f"already {method.name}" + (f", keeps {own}" if own else "")
            if self.centralize:
                target, why = self._centralization(method, options, self.feeders[names[0]])
                if target is not None:
                    row = self._row(norm, "keep", type(norm).__name__, f"{note}; {why}", target)
                    module = self.by_name[target]
                    return Decision(row, norm, centralize=module, follow=module)
            return self._keep(norm, note)
        if not self.fresh:
            options = {**method.when_trained, **options}
        if "seed" in method.options and options.get("generator") is None:
            options["seed"] = layer_seed(self.options.get("seed") or 0, names[0])
        return self._convert(norm, kind.dims or 0, method, options)

    def _convert(
        self, norm: nn.Module, dims: int, method: Method, options: Mapping[str, Any]
    ) -> Decision:
        feeder = self.feeders[self.places[norm][0]]
        if method.name == "in" and isinstance(self._module(feeder), nn.Linear):
            erased = "after a linear layer instance norm has one value to normalize: output is 0"
            return self._refuse(norm, f"{erased}; use ln, or leave it out with where=")
        is_frozen = is_frozen_norm(norm)
        binds = method.binds and options.get("order", 1) != 0 and options.get("window") != 1
        if binds and (obstacle := _binding_obstacle(norm, feeder, self._module(feeder))):
            return replace(self._keep(norm, f"stays as it is: {obstacle}"), unbound=True)
        self._check_values(method, dims, options)
        try:
            rewrites = trial(norm, method, options)
        except ValueError as error:
            return self._refuse(norm, str(error))
        if rewrites and (shared := self._sharing(norm)):
            absorbs = f"{method.name} rewrites its scale and shift, which {shared} uses too"
            return self._refuse(norm, f"{absorbs}: give each its own, or leave it out with where=")
        target, why = self._centralization(method, options, feeder)
        written = self._decentralized(norm, method)
        uncentralized = target is None and why is not None and not why.endswith("already")
        notes = [
            _effect(method, norm) if target is None else f"eval output changes: {why}",
            "frozen until now: its scale and shift train from now on" if is_frozen else None,
            "keeps its activation" if ends_in_activation(norm) else None,
            self._opens(method, arguments(thawed(norm) if is_frozen else norm, method, options)),
            _cut_groups(norm, method, options),
            why if target is None else None,
            "centred weights written" if written is not None else None,
            f"bound to {feeder.name!r}" if binds else None,
            "train the network in a VirtualDataset" if method.wraps else None,
        ]
        reason = "; ".join(filter(None, notes))
        row = self._row(norm, "convert", method.layer(dims).__name__, reason, target)
        return Decision(
            replace(row, binds=feeder.name) if binds else row,
            norm,
            method,
            options,
            None if target is None else self.by_name[target],
            self._followed(feeder) if method.name == "mabn" else None,
            written,
            self._module(feeder) if binds else None,
            uncentralized,
            uncentralized and feeder.untraced and (self.fresh or self.centralize is True),
        )

    def _is_copy(self, name: str) -> bool:
        return isinstance(self.by_name[name.rpartition(".copies.")[0]], NormCopies)

    def _check_values(self, method: Method, dims: int, options: Mapping[str, Any]) -> None:
        """Refuse a value of an option once, and not again for each norm."""
        if (method.name, dims) not in self.checked:
            replacement(TORCH_NORMS[dims](4), method, options)
            self.checked.add((method.name, dims))

    def _opens(self, method: Method, options: Mapping[str, Any]) -> str | None:
        """A note on the options that were chosen because the network is trained, or batches cut."""

        def taken(chosen: Mapping[str, Any]) -> str:
            return ", ".join(f"{n}={v}" for n, v in chosen.items() if n not in self.options)

        cut = taken(method.of_cuts(options))
        trained = "" if self.fresh else taken(method.when_trained)
        notes = [f"{cut}, as norm_batch_size cuts a batch"] if cut else []
        notes += [f"{trained}, as the network is trained"] if trained else []
        return "; ".join(notes) or None

    def _centralization(
        self, method: Method, options: Mapping[str, Any], feeder: Feeder
    ) -> tuple[str | None, str | None]:
        """The path of the layer to centralize for a norm, or None, and a note for the plan."""
        wanted = method.name == "mabn" and not options.get("centered", False)
        if self.centralize is False or not (wanted or self.centralize):
            return None, None
        obstacle = self._obstacle(feeder)
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

    def _obstacle(self, feeder: Feeder) -> str | None:
        """The reason why the weights before a norm cannot be centralized, or None."""
        obstacle = _centralization_obstacle(feeder, self._module(feeder))
        if obstacle is None and (shared := self._sharing(self.by_name[str(feeder.name)], "weight")):
            return f"{feeder.name!r} shares its weight with {shared}"
        return obstacle

    def _followed(self, feeder: Feeder) -> nn.Module | None:
        """The layer whose weights are or might be centralized for a norm, or None."""
        return self._module(feeder) if self._obstacle(feeder) is None else None

    def _decentralized(self, norm: nn.Module, method: Method) -> nn.Module | None:
        """The layer before a norm that leaves mabn, whose centred weights are written, or None."""
        feeder = norm.feeder if isinstance(norm, UncenteredNormLayer) else None
        stays = method.name == "mabn" or self.centralize is True
        if feeder is None or stays or type(feeder) not in CENTRALIZED:
            return None
        return None if self._sharing(feeder, "weight") else feeder

    def _module(self, feeder: Feeder) -> nn.Module | None:
        return None if feeder.name is None else self.by_name[feeder.name]

    def _sharing(self, module: nn.Module, *names: str) -> str | None:
        """The name of another module that holds one of a module's Parameters, or of these."""
        for name in names or tuple(module._parameters):
            for owner in self.owners.get(id(module._parameters.get(name)), ()):
                if owner is not module:
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


def _effect(method: Method, norm: nn.Module) -> str:
    """The effect of a conversion on the output in evaluation mode."""
    if norm._buffers.get("running_var") is None and method.class_name != "BatchNorm":
        return "eval output changes: train on"  # whose statistics of a batch are the method's
    if method.exact_eval:
        return "eval output unchanged"
    if issubclass(method.layer(2), NormLayer):
        return "eval output changes: train on"
    return "eval output changes, running statistics are dropped: train on"


def _cut_groups(norm: nn.Module, method: Method, options: Mapping[str, Any]) -> str | None:
    """A note on channel groups that are fewer than were asked for."""
    asked = options.get("num_groups")
    if asked is None or "num_groups" not in method.options:
        return None
    fitting = fitting_groups(channels_of(norm), asked)
    return None if fitting == asked else f"num_groups={fitting} in place of {asked}"


def _centralization_obstacle(feeder: Feeder, module: nn.Module | None) -> str | None:
    """The reason why a norm's feeder cannot have its weights centralized, or None."""
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
    """The reason why a norm cannot follow the weights of what feeds it, or None."""
    if module is None:
        return feeder.reason
    if not is_centralized(module) and not has_plain_forward(module, any_weight=True):
        return f"{feeder.name!r} computes its weight or output in its own way"
    if isinstance(module._parameters.get("weight"), nn.UninitializedParameter):
        return f"{feeder.name!r} does not know its number of inputs yet: run one batch first"
    if geometry_of(module).outputs != channels_of(norm):
        return f"the channels of {feeder.name!r} are not those that it normalizes"
    return None


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer: different for each layer, the same in every run and on every rank.

    Example:
        >>> layer_seed(0, "norm1") == layer_seed(0, "norm2")
        False
    """
    return random.Random(f"{seed}/{name}").getrandbits(31)
