"""The graph of a network's forward: from a symbolic trace, or recorded on example inputs.

Both give a `torch.fx.Graph` that analyses read the same way. Modules that a predicate names are
leaves, nodes ``call_module``; everything else is operations. A recorded graph cannot be run: its
nodes hold only the tensors that they take, and three notes in ``meta``:

- ``text``: what to say about the origin of a value that no operation made;
- ``aliases``: the nodes whose memory the output shares, as that of a view or of an operation in
  place;
- ``version``: how often the output had been written when it was made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from inspect import Parameter as Argument
from inspect import signature
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from anybatch.conversion.norm_types import is_batch_norm
from anybatch.conversion.observe import observe, restored, seed, tensors_in

FEEDING_LAYERS = (_ConvNd, nn.Linear)

_QUERIES = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "get_device", "type"}
_QUERIED = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"}

_UNKNOWN = "fed by the input or a view"

IsLeaf = Callable[[nn.Module], bool]


class GraphTracer(fx.Tracer):
    """A symbolic tracer that runs no hooks and stops at given modules.

    Args:
        is_leaf: Whether a module is a leaf; None leaves that to torch, which stops at the modules
            of ``torch.nn`` except containers.
    """

    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[nn.Module], bool | None]) -> None:
        super().__init__()
        self.is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        decided = self.is_leaf(m)
        return super().is_leaf_module(m, module_qualified_name) if decided is None else decided

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def graphs_of(
    model: nn.Module,
    example_inputs: Any,
    is_traced_leaf: Callable[[nn.Module], bool | None],
    is_recorded_leaf: IsLeaf,
) -> list[fx.Graph]:
    """The graphs of a network: traced, or else one recorded on example inputs; [] for neither."""
    graphs = trace_graphs(model, is_traced_leaf)
    if not graphs and (graph := record_graph(model, example_inputs, is_recorded_leaf)) is not None:
        graphs.append(graph)
    return graphs


def trace_graphs(model: nn.Module, is_leaf: Callable[[nn.Module], bool | None]) -> list[fx.Graph]:
    """Trace a network symbolically in evaluation and in training mode, and leave it as it was.

    Training may run parts of its own, such as auxiliary heads, and may leave parts out at random.
    `is_leaf` is as in `GraphTracer`. A mode in which tracing fails has no graph.

    Example:
        >>> graphs = trace_graphs(nn.Sequential(nn.Linear(2, 2)), lambda module: None)
        >>> [[node.name for node in graph.nodes] for graph in graphs]
        [['input_1', '_0', 'output'], ['input_1', '_0', 'output']]
    """
    if "forward" in model.__dict__:  # fx would trace the class's forward, not this one
        return []
    traced = (_trace(model, is_leaf, training) for training in (False, True))
    return [graph for graph in traced if graph is not None]


def _trace(
    model: nn.Module, is_leaf: Callable[[nn.Module], bool | None], training: bool
) -> fx.Graph | None:
    defaults = {
        name: argument.default
        for name, argument in signature(model.forward).parameters.items()
        if argument.default is not Argument.empty
    }
    with restored(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed(0)  # so that what is left out at random is the same in every process
        for module in model.modules():
            module.training = training
        try:
            return GraphTracer(is_leaf).trace(model, defaults or None)
        except Exception:  # any forward may be run on proxies here, and fail in any way
            return None


def record_graph(model: nn.Module, example_inputs: Any, is_leaf: IsLeaf) -> fx.Graph | None:
    """Record one forward in evaluation mode without gradients, and leave the network as it was.

    `example_inputs` are as `observe` takes them, or None for no recording.

    Returns:
        The graph; None without example inputs, and for a network with lazy parameters, which a
        forward would initialize.

    Raises:
        ValueError: If the model's forward fails on `example_inputs`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> graph = record_graph(model, torch.zeros(1, 2), lambda m: isinstance(m, nn.Linear))
        >>> [node.op for node in graph.nodes]
        ['placeholder', 'call_module', 'call_function', 'output']
    """
    if example_inputs is None or any(is_lazy(p) for p in model.parameters()):
        return None
    recorder = _Recorder({module: name for name, module in model.named_modules()})
    handles: list[Any] = []
    for module in recorder.names:
        if is_leaf(module):
            handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder:
            recorder.end(observe(model, example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return recorder.graph


class _Recorder(TorchDispatchMode):
    """Writes down a forward as a graph."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.graph = fx.Graph()
        self.nodes: Any = WeakTensorKeyDictionary()
        self.unknown = self.graph.placeholder("input")
        self.unknown.meta["text"] = _UNKNOWN
        self.parameters = {
            id(parameter): f"{name}.{own}" if name else own
            for module, name in names.items()
            if isinstance(module, FEEDING_LAYERS)
            for own, parameter in module.named_parameters(recurse=False)
        }
        self.running: list[fx.Node | None] = []  # leaves that are running: what they do is theirs

    def node(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor."""
        if id(tensor) in self.parameters:
            return self.graph.create_node("get_attr", self.parameters[id(tensor)])
        known: fx.Node | None = self.nodes.get(tensor, None)
        base = None if tensor._base is None else self.nodes.get(tensor._base, None)
        if base is not None and base is not known:  # torch makes a view after it is dispatched
            if known is None:
                known = self.nodes[tensor] = self.graph.call_function(_view)
                known.meta["text"] = _UNKNOWN
            known.meta.setdefault("aliases", (base,))
        return self.unknown if known is None else known

    def arguments(self, value: Any) -> tuple[fx.Node, ...]:
        """The nodes of the tensors in a value."""
        return tuple(map(self.node, tensors_in(value)))

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        node = None
        if not self.running or is_batch_norm(module):
            given = self.arguments((args, kwargs))
            if is_batch_norm(module) and given:
                given = (self.as_it_is(next(tensors_in((args, kwargs))), given[0]), *given[1:])
            node = self.graph.create_node("call_module", self.names[module], given)
        self.running.append(node)

    def as_it_is(self, tensor: Tensor, node: fx.Node) -> fx.Node:
        """A node for a leaf's output that was changed in place since, else the node itself."""
        if node.meta.get("version", tensor._version) == tensor._version:
            return node
        changed = self.graph.call_function(_changed_in_place, (node,))
        changed.meta.update(
            text=f"the output of {str(node.target)!r} is changed in place", aliases=(node,)
        )
        return changed

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        node = self.running.pop()
        if node is None:
            return
        for tensor in tensors_in(output):
            if isinstance(module, FEEDING_LAYERS):
                node.meta["version"] = tensor._version
            self.nodes[tensor] = node

    def end(self, output: Any) -> None:
        """Note what the network returns."""
        self.graph.output(self.arguments(output))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.running:
            return func(*args, **kwargs)
        node = self.graph.call_function(func.overloadpacket, self.arguments((args, kwargs)))
        if node.args and (func.is_view or name_of(node).endswith("_")):
            node.meta["aliases"] = node.args[:1]
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
            self.nodes[tensor] = node
        return output


def _changed_in_place(value: Any) -> Any:
    """The target of a node that stands for a leaf's output after a change in place."""
    return value


def _view() -> None:
    """The target of a node that stands for a view of another node's output."""


def name_of(node: fx.Node) -> str:
    """The name of what a node calls: a module's path, or an operation's name as in ``relu_``."""
    return getattr(node.target, "__name__", str(node.target))


def is_query(node: fx.Node) -> bool:
    """True if a node asks for a tensor's shape or type, not for its values."""
    if node.op == "call_method":
        return node.target in _QUERIES
    attribute = node.args[1] if len(node.args) > 1 else None
    return node.target is getattr and attribute in _QUERIED
