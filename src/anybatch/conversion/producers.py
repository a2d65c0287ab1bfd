"""Which convolution or linear layer feeds each norm, and who else uses what it puts out.

Three ways, the first that works: a symbolic trace of the whole network; one recorded forward on
`example_inputs`; a symbolic trace of each part that can be traced on its own.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter as Argument
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from anybatch.conversion.module_swap import paths
from anybatch.conversion.norm_types import OTHER_NORMS, is_batch_norm, is_norm

FEEDING = (_ConvNd, nn.Linear)

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
_LOOKS = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "get_device", "type"}


@dataclass(frozen=True)
class Feeder:
    """What feeds one norm.

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
        """Whether there is no feeder only because the model could not be traced."""
        return (self.reason or "").endswith(_UNTRACED)

    @property
    def sole(self) -> bool:
        """Whether there is a feeder and the norm alone uses its output."""
        return self.name is not None and self.other_consumers == 0

    def __str__(self) -> str:
        if self.name is None:
            return self.reason or "unknown"
        others = f" (+{self.other_consumers} more using it)" if self.other_consumers else ""
        return f"{self.name}{others}"


@dataclass
class _Source:
    """One tensor's origin: a feeder's call, or a sentence about what else made it."""

    text: str
    feeder: nn.Module | None = None
    version: int = 0
    consumers: int = 0


@dataclass
class _Observed:
    """What a trace or a forward showed.

    The sources each norm was called on, each feeder's calls, and the feeders whose parameters
    others use.
    """

    norm_calls: dict[nn.Module, list[_Source]] = field(default_factory=dict)
    feeder_calls: dict[nn.Module, list[_Source]] = field(default_factory=dict)
    borrowed: set[nn.Module] = field(default_factory=set)


def find_feeders(model: nn.Module, example_inputs: Any = None) -> dict[str, Feeder]:
    """Find, for each batch norm of a network, the layer that feeds it.

    A pair counts only if the norm and its feeder are each called once in a forward. The model is
    left as it was: modes, buffers, attributes and the random state are restored.

    Args:
        model: the network.
        example_inputs: what its forward takes, as a tensor, a tuple of positional or a mapping of
            keyword arguments; used where the network cannot be traced symbolically.

    Returns:
        The first path of each batch norm -> its `Feeder`.

    Raises:
        ValueError: the model's forward fails on `example_inputs`.

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
    observed = _trace(model, names)
    lazy = any(is_lazy(p) for p in model.parameters())  # a forward would make them real
    if observed is None and example_inputs is not None and not lazy:
        observed = _record(model, names, example_inputs)
    if observed is not None:
        return {names[norm]: _resolve(norm, observed, names) for norm in norms}
    found = {norm: Feeder(None, _UNTRACED) for norm in norms}
    _trace_parts(model, "", places, found)
    return {names[norm]: found[norm] for norm in norms}


def _resolve(norm: nn.Module, observed: _Observed, names: Mapping[nn.Module, str]) -> Feeder:
    """Judge one norm from all that was observed of it."""
    calls = observed.norm_calls.get(norm, [])
    if not calls:
        return Feeder(None, "not called")
    if len(calls) > 1:
        return Feeder(None, f"called {_times(len(calls))}")
    source = calls[0]
    if source.feeder is None:
        return Feeder(None, source.text)
    if source.feeder in observed.borrowed:
        return Feeder(None, f"the weight of its feeder {names[source.feeder]!r} is used elsewhere")
    times = len(observed.feeder_calls[source.feeder])
    if times > 1:
        return Feeder(None, f"its feeder {names[source.feeder]!r} is called {_times(times)}")
    may_feed = _norms_not_reached(source.feeder, observed, names)
    return Feeder(names[source.feeder], None, source.consumers - 1, may_feed)


def _norms_not_reached(
    feeder: nn.Module, observed: _Observed, names: Mapping[nn.Module, str]
) -> tuple[str, ...]:
    """Norms that were not called, and that a feeder could feed on a path that was not taken.

    Such a norm has the feeder's number of channels, and no layer with that number is closer to it
    in the tree of modules than the feeder is.
    """
    channels = _outputs_of(feeder)
    found = []
    for norm, name in names.items():
        if norm in observed.norm_calls or not is_batch_norm(norm):
            continue
        if getattr(norm, "num_features", None) != channels:
            continue
        inside = name
        while inside:
            inside = inside.rpartition(".")[0]
            near = f"{inside}." if inside else ""
            alike = [
                module
                for module, place in names.items()
                if isinstance(module, FEEDING)
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


# Symbolic traces


class NormTracer(fx.Tracer):
    """Traces down to norms, convolutions and linear layers, and runs nobody's hooks."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*FEEDING, *OTHER_NORMS)) or is_norm(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _trace(model: nn.Module, names: Mapping[nn.Module, str]) -> _Observed | None:
    """Trace a network symbolically; None where that fails."""
    graph = trace_graph(model)
    return None if graph is None else _read(graph, dict(model.named_modules()), names)


def trace_graph(model: nn.Module, tracer: fx.Tracer | None = None) -> fx.Graph | None:
    """Trace a network symbolically, and leave it as it was.

    Args:
        model: the network.
        tracer: what to trace with (default: one that stops at norms, convolutions and linear
            layers).

    Returns:
        The graph; None where tracing fails.

    Example:
        >>> [node.name for node in trace_graph(nn.Sequential(nn.Linear(2, 2))).nodes]
        ['input_1', '_0', 'output']
    """
    if "forward" in model.__dict__:  # fx would trace the class's forward, not this one
        return None
    defaults = {
        name: argument.default
        for name, argument in signature(model.forward).parameters.items()
        if argument.default is not Argument.empty
    }
    with restored(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return (tracer or NormTracer()).trace(model, defaults or None)
        except Exception:  # any forward may be run on proxies here, and fail in any way
            return None


def _read(
    graph: fx.Graph, modules: Mapping[str, nn.Module], names: Mapping[nn.Module, str]
) -> _Observed:
    """Read calls and sources off a traced graph."""
    observed = _Observed()
    sources: dict[fx.Node, _Source] = {}
    for node in graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        given = node.args[0] if node.args else node.kwargs.get("input")
        if node.op == "get_attr":
            owner = modules.get(str(node.target).rpartition(".")[0])
            observed.borrowed |= {owner} if isinstance(owner, FEEDING) else set()
        if isinstance(module, nn.Identity) and isinstance(given, fx.Node):
            sources[node] = sources[given]
            continue
        sources[node] = _source_of(node, module, names)
        if isinstance(module, FEEDING):
            sources[node].consumers = _count_users(node, modules)
            observed.feeder_calls.setdefault(module, []).append(sources[node])
        elif module is not None and is_batch_norm(module):
            fed = sources[given] if isinstance(given, fx.Node) else _Source("fed by a constant")
            observed.norm_calls.setdefault(module, []).append(fed)
    return observed


def _source_of(node: fx.Node, module: nn.Module | None, names: Mapping[nn.Module, str]) -> _Source:
    if isinstance(module, FEEDING):
        return _Source(f"fed by {names[module]}", module)
    if module is not None:
        return _Source(_fed_by_module(module, names[module]))
    if node.op == "placeholder":
        return _Source("fed by the input")
    if node.op == "get_attr":
        return _Source("fed by a parameter or buffer")
    return _Source(_fed_by(getattr(node.target, "__name__", str(node.target))))


def _count_users(node: fx.Node, modules: Mapping[str, nn.Module]) -> int:
    """Count who uses a node's value: looking at its shape is no use, nn.Identity passes it on."""
    count = 0
    for user in node.users:
        if user.op == "call_module" and isinstance(modules[user.target], nn.Identity):  # type: ignore[index]
            count += _count_users(user, modules)
        elif not only_looks(user):
            count += 1
    return count


def only_looks(node: fx.Node) -> bool:
    """Whether a node of a graph asks for a tensor's shape or type, not its values."""
    if node.op == "call_method":
        return node.target in _LOOKS
    attribute = node.args[1] if len(node.args) > 1 else None
    looked_at = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"}
    return node.target is getattr and attribute in looked_at


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
        observed = _trace(child, names)
        if observed is None:
            _trace_parts(child, part, places, found)
            continue
        inside = {module for module, where in places.items() if _all_under(where, part)}
        for norm in norms:
            found[norm] = _within(norm, _resolve(norm, observed, names), part, inside, names)


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


# A recorded forward


class _Recorder(TorchDispatchMode):
    """Follows tensors through one forward: who made each, who uses those that feeders made."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.owners = {
            id(p): m for m in names if isinstance(m, FEEDING) for p in m.parameters(recurse=False)
        }
        self.observed = _Observed()
        self.sources: Any = WeakTensorKeyDictionary()
        self.depth = 0  # inside a norm or feeder: what happens there is its own affair

    def source(self, tensor: Tensor) -> _Source:
        source = self.sources.get(tensor, None) or _Source("fed by the input or a view")
        if source.feeder is not None and source.version != tensor._version:
            return _Source(f"the output of {self.names[source.feeder]!r} is changed in place")
        return source

    def use(self, value: Any) -> None:
        """Count one use of each tensor a feeder made, however often it is named."""
        for tensor in set(tensors_in(value)):
            if (source := self.sources.get(tensor, None)) is not None:
                source.consumers += 1
            if (owner := self.owners.get(id(tensor))) is not None:
                self.observed.borrowed.add(owner)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.depth:
            self.use((args, kwargs))
        if is_batch_norm(module):
            given = next(iter(tensors_in((args, kwargs))), None)
            fed = _Source("fed by a constant") if given is None else self.source(given)
            self.observed.norm_calls.setdefault(module, []).append(fed)
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        source = _Source(_fed_by_module(module, self.names[module]))
        if isinstance(module, FEEDING):
            source.feeder = module
            self.observed.feeder_calls.setdefault(module, []).append(source)
        for tensor in tensors_in(output):
            source.version = tensor._version
            self.sources[tensor] = source

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        self.use((args, kwargs))
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
            self.sources[tensor] = _Source(_fed_by(func.overloadpacket.__name__))
        return output


def _record(model: nn.Module, names: Mapping[nn.Module, str], example_inputs: Any) -> _Observed:
    """Run one forward in eval mode without gradients, and watch it."""
    recorder = _Recorder(names)
    handles: list[Any] = []
    for module in names:
        if is_norm(module) or isinstance(module, FEEDING):
            handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder:
            recorder.use(observe(model, example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return recorder.observed


def observe(model: nn.Module, example_inputs: Any) -> Any:
    """Run a network on example inputs in eval mode, without gradients and without traces.

    Args:
        model: the network.
        example_inputs: one tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments.

    Returns:
        What the network returns.

    Raises:
        ValueError: the forward fails; the message holds its error.

    Example:
        >>> observe(nn.Linear(3, 2), {"input": torch.zeros(1, 3)}).shape
        torch.Size([1, 2])
    """
    named = isinstance(example_inputs, Mapping)
    kwargs = dict(example_inputs) if named else {}
    several = isinstance(example_inputs, (tuple, list))
    args = () if named else tuple(example_inputs) if several else (example_inputs,)
    try:
        with restored(model), _in_eval(model), torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"example_inputs: the model's forward failed on them with {type(error).__name__}: "
            f"{error}. Give a tensor, a tuple of positional arguments or a mapping of keyword "
            "arguments that the model takes."
        ) from error


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists, mappings and dataclasses, in order.

    Example:
        >>> len(list(tensors_in((torch.zeros(1), {"a": [torch.ones(2), 3]}))))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Within it every module is in eval mode; after it each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """After it the model's attributes, buffers' values and torch's random state are as before."""
    saved = [(module, _shallow(module)) for module in model.modules()]
    buffers = [
        (buffer, buffer.detach().clone())
        for buffer in model.buffers()
        if not (is_lazy(buffer) or buffer.is_meta)
    ]
    devices = {b.device for b in model.buffers()} | {p.device for p in model.parameters()}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            for module, attributes in saved:
                _put_back(module, attributes)
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _shallow(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute of a module, with a copy of the lists and dictionaries among them."""
    plain = (list, dict, OrderedDict, set)
    return {
        name: (value, value.copy() if type(value) in plain else None)
        for name, value in module.__dict__.items()
    }


def _put_back(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    module.__dict__.clear()
    for name, (value, copy) in attributes.items():
        module.__dict__[name] = value
        if copy is None:
            continue
        if isinstance(value, list):
            value[:] = copy
        else:
            value.clear()
            value.update(copy)
