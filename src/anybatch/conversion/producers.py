"""The convolution or linear layer that feeds each norm, and the other users of its output.

Read off graphs of the whole network, in evaluation and in training, or, where there are none, off
graphs of the parts of it that can be traced on their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from anybatch.conversion.graph_trace import (
    FEEDING_LAYERS,
    graphs_of,
    is_query,
    name_of,
    trace_graphs,
)
from anybatch.conversion.module_swap import paths
from anybatch.conversion.norm_types import channels_of, is_batch_norm, is_norm

_ACTIVATIONS = {
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "leakyrelu",
    "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "swish",
    "tanh", "threshold", "clamp", "clamp_min",
}  # fmt: skip
_WORDS = {
    "add": "an addition", "iadd": "an addition", "radd": "an addition",
    "sub": "a subtraction", "mul": "a multiplication", "imul": "a multiplication",
    "cat": "a concatenation", "concat": "a concatenation", "getitem": "a part of something",
}  # fmt: skip
_UNTRACED = "model does not trace; pass example_inputs"
_NOT_CALLED = "not called"


@dataclass(frozen=True)
class Feeder:
    """The layer that feeds one norm, or the reason why there is none.

    Args:
        name: the path of the convolution or linear layer whose output is the norm's input; None
            if there is none, or it cannot be told.
        reason: why there is none; None if there is one.
        other_consumers: how many others use the feeder's output besides the norm.
        may_feed: norms that were not called and that the feeder could feed, on a path that the
            trace or the forward did not take.

    Example:
        >>> Feeder("conv1").sole
        True
        >>> Feeder(None, "fed by an addition").sole
        False
    """

    name: str | None
    reason: str | None = None
    other_consumers: int = 0
    may_feed: tuple[str, ...] = field(default=(), repr=False)

    @property
    def untraced(self) -> bool:
        """True if there is no feeder only because the model could not be traced."""
        return (self.reason or "").endswith(_UNTRACED)

    @property
    def sole(self) -> bool:
        """True if there is a feeder and the norm alone uses its output."""
        return self.name is not None and self.other_consumers == 0

    def __str__(self) -> str:
        if self.name is None:
            return self.reason or "unknown"
        others = f" (+{self.other_consumers} more using it)" if self.other_consumers else ""
        return f"{self.name}{others}"


@dataclass
class _Source:
    """The origin of a value: the call of a feeding layer, or a description of what else made it."""

    text: str
    feeder: nn.Module | None = None
    consumers: int = 0


@dataclass
class _Calls:
    """The calls of norms and feeding layers in a graph.

    Args:
        norms: The sources that each norm was called on.
        feeders: The calls of each feeding layer.
        borrowed: The feeding layers whose parameters are used outside them.
    """

    norms: dict[nn.Module, list[_Source]] = field(default_factory=dict)
    feeders: dict[nn.Module, list[_Source]] = field(default_factory=dict)
    borrowed: set[nn.Module] = field(default_factory=set)


def find_feeders(model: nn.Module, example_inputs: Any = None) -> dict[str, Feeder]:
    """Find, for each batch norm of a network, the layer that feeds it.

    A pair counts only if the norm and its feeder are each called once in a forward. The model is
    left as it was: modes, buffers, attributes and the random state are restored.

    `example_inputs`, as `observe` takes them, are for networks that cannot be traced symbolically.

    Returns:
        The first path of each batch norm -> its `Feeder`.

    Raises:
        ValueError: If the model's forward fails on `example_inputs`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        ...                       nn.BatchNorm2d(4))
        >>> find_feeders(model)["1"]
        Feeder(name='0', reason=None, other_consumers=0)
        >>> find_feeders(model)["3"].reason
        'pre-activation: fed by relu'
    """
    places = paths(model)
    names = {module: found[0] for module, found in places.items()}
    norms = [module for module in names if is_batch_norm(module)]
    if model in norms:
        return {"": Feeder(None, "the model is this norm alone")}
    if not norms:
        return {}
    graphs = graphs_of(model, example_inputs, _is_traced_leaf, _is_leaf)
    if graphs:
        found = _resolve_all(norms, graphs, dict(model.named_modules()), names)
    else:
        found = {norm: Feeder(None, _UNTRACED) for norm in norms}
        _trace_parts(model, "", places, found)
    return {names[norm]: found[norm] for norm in norms}


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, FEEDING_LAYERS) or is_norm(module)


def _is_traced_leaf(module: nn.Module) -> bool | None:
    return _is_leaf(module) or None


def _resolve_all(
    norms: Iterable[nn.Module],
    graphs: Iterable[fx.Graph],
    modules: Mapping[str, nn.Module],
    names: Mapping[nn.Module, str],
) -> dict[nn.Module, Feeder]:
    """Find the feeder of each norm from all graphs of its network."""
    found = {norm: Feeder(None, _NOT_CALLED) for norm in norms}
    modes = [_read(graph, modules, names) for graph in graphs]
    for calls in modes:
        for norm, known in found.items():
            found[norm] = _in_both(known, _resolve(norm, calls, names))
    for norm, one in found.items():  # a mode in which something else uses the feeder's output
        others = [calls.feeders for calls in modes if norm not in calls.norms]
        if any(names[feeder] == one.name for feeders in others for feeder in feeders):
            found[norm] = replace(one, other_consumers=one.other_consumers + 1)
    reached = {names[norm] for calls in modes for norm in calls.norms}
    return {
        norm: replace(
            one, may_feed=tuple(dict.fromkeys(n for n in one.may_feed if n not in reached))
        )
        for norm, one in found.items()
    }


def _in_both(one: Feeder, other: Feeder) -> Feeder:
    """The feeder of a norm, from what two graphs of its network say; one may not call it."""
    if one.reason == _NOT_CALLED or other.reason == _NOT_CALLED:
        return other if one.reason == _NOT_CALLED else one
    if one.name is None or other.name is None:
        return other if one.name is not None else one
    if one.name != other.name:
        return Feeder(None, f"fed by {one.name!r} in evaluation, by {other.name!r} in training")
    more = max(one.other_consumers, other.other_consumers)
    return replace(one, other_consumers=more, may_feed=(*one.may_feed, *other.may_feed))


def _resolve(norm: nn.Module, calls: _Calls, names: Mapping[nn.Module, str]) -> Feeder:
    """Find one norm's feeder, or the reason why there is none."""
    sources = calls.norms.get(norm, [])
    if not sources:
        return Feeder(None, _NOT_CALLED)
    if len(sources) > 1:
        return Feeder(None, f"called {_times(len(sources))}")
    source = sources[0]
    if source.feeder is None:
        return Feeder(None, source.text)
    if source.feeder in calls.borrowed:
        return Feeder(None, f"the weight of its feeder {names[source.feeder]!r} is used elsewhere")
    times = len(calls.feeders[source.feeder])
    if times > 1:
        return Feeder(None, f"its feeder {names[source.feeder]!r} is called {_times(times)}")
    may_feed = _norms_not_reached(source.feeder, calls, names)
    return Feeder(names[source.feeder], None, source.consumers - 1, may_feed)


def _norms_not_reached(
    feeder: nn.Module, calls: _Calls, names: Mapping[nn.Module, str]
) -> tuple[str, ...]:
    """Norms that were not called, and that a feeder could feed on a path that was not taken.

    Such a norm has the feeder's number of channels, and no layer with that number is closer to it
    in the tree of modules than the feeder is.
    """
    channels = _outputs_of(feeder)
    found = []
    for norm, name in names.items():
        if norm in calls.norms or not is_batch_norm(norm):
            continue
        if channels_of(norm) != channels:
            continue
        inside = name
        while inside:
            inside = inside.rpartition(".")[0]
            near = f"{inside}." if inside else ""
            alike = [
                module
                for module, place in names.items()
                if isinstance(module, FEEDING_LAYERS)
                and place.startswith(near)
                and _outputs_of(module) == channels
            ]
            if alike:
                found += [name] if feeder in alike else []
                break
    return tuple(found)


def _outputs_of(feeder: nn.Module) -> Any:
    return getattr(feeder, "out_channels", None) or getattr(feeder, "out_features", None)


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


def _fed_by(operation: str) -> str:
    """Put an operation's name into a sentence: 'relu_' -> 'pre-activation: fed by relu'."""
    plain = operation.strip("_").lower()
    if plain in _ACTIVATIONS:
        return f"pre-activation: fed by {plain}"
    return f"fed by {_WORDS.get(plain, plain)}"


def _fed_by_module(module: nn.Module, name: str) -> str:
    if is_norm(module):
        return f"fed by the norm {name!r}"
    kind = type(module).__name__
    if kind.lower() in _ACTIVATIONS:
        return f"pre-activation: fed by {kind.lower()}"
    return f"fed by {kind} {name!r}"


def _read(
    graph: fx.Graph, modules: Mapping[str, nn.Module], names: Mapping[nn.Module, str]
) -> _Calls:
    """Read calls and sources off a graph."""
    calls = _Calls()
    sources: dict[fx.Node, _Source] = {}
    for node in graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        given = node.args[0] if node.args else node.kwargs.get("input")
        if node.op == "get_attr":
            owner = modules.get(str(node.target).rpartition(".")[0])
            calls.borrowed |= {owner} if isinstance(owner, FEEDING_LAYERS) else set()
        if isinstance(module, nn.Identity) and isinstance(given, fx.Node):
            sources[node] = sources[given]
            continue
        sources[node] = _source_of(node, module, names)
        if isinstance(module, FEEDING_LAYERS):
            sources[node].consumers = _count_users(node, modules)
            calls.feeders.setdefault(module, []).append(sources[node])
        elif module is not None and is_batch_norm(module):
            fed = sources[given] if isinstance(given, fx.Node) else _Source("fed by a constant")
            calls.norms.setdefault(module, []).append(fed)
    return calls


def _source_of(node: fx.Node, module: nn.Module | None, names: Mapping[nn.Module, str]) -> _Source:
    if (text := node.meta.get("text")) is not None:
        return _Source(text)
    if isinstance(module, FEEDING_LAYERS):
        return _Source(f"fed by {names[module]}", module)
    if module is not None:
        return _Source(_fed_by_module(module, names[module]))
    if node.op == "placeholder":
        return _Source("fed by the input")
    if node.op == "get_attr":
        return _Source("fed by a parameter or buffer")
    return _Source(_fed_by(name_of(node)))


def _count_users(node: fx.Node, modules: Mapping[str, nn.Module]) -> int:
    """Count the users of a node's value; nn.Identity passes it on, and a query of shape is none."""
    count = 0
    for user in node.users:
        if user.op == "call_module" and isinstance(modules[user.target], nn.Identity):  # type: ignore[index]
            count += _count_users(user, modules)
        elif not is_query(user):
            count += 1
    return count


def _trace_parts(
    module: nn.Module,
    prefix: str,
    places: Mapping[nn.Module, tuple[str, ...]],
    found: dict[nn.Module, Feeder],
) -> None:
    """Trace the children of a module that does not trace, each on its own."""
    names = {module: where[0] for module, where in places.items()}
    for child_name, child in module.named_children():
        norms = [norm for norm in child.modules() if norm in found]
        if not norms or child in found:
            continue
        part = f"{prefix}{child_name}."
        graphs = trace_graphs(child, _is_traced_leaf)
        if not graphs:
            _trace_parts(child, part, places, found)
            continue
        fed = _resolve_all(norms, graphs, dict(child.named_modules()), names)
        inside = {module for module, where in places.items() if _all_under(where, part)}
        for norm in norms:
            found[norm] = _within(norm, fed[norm], part, inside, names)


def _all_under(where: tuple[str, ...], part: str) -> bool:
    return all(place.startswith(part) for place in where)


def _within(
    norm: nn.Module,
    feeder: Feeder,
    part: str,
    inside: set[nn.Module],
    names: Mapping[nn.Module, str],
) -> Feeder:
    """Judge what was seen in a part of a network whose whole does not trace."""
    whole = f"and the {_UNTRACED}"
    if feeder.reason == "fed by the input":
        return Feeder(None, f"fed from outside {part[:-1]!r}, {whole}")
    pair = {norm} | {module for module, name in names.items() if name == feeder.name}
    if not pair <= inside:
        return Feeder(None, f"used outside {part[:-1]!r} too, {whole}")
    return feeder
