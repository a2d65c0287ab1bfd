"""From which norms a path leads to the output that passes no other norm.

Two ways, as in `feeders`: a symbolic trace of the whole network, else one recorded forward on
`example_inputs`. In both, what reaches a tensor is carried along from operation to operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from anybatch.conversion.norm_types import is_norm, norm_kind
from anybatch.conversion.producers import (
    FEEDING,
    NormTracer,
    observe,
    only_looks,
    tensors_in,
    trace_graph,
)
from anybatch.core.norm_layer import NormLayer

# A norm that reaches a tensor -> the operations between the two.
_Reach = dict[nn.Module, tuple[str, ...]]

_FUNCTIONS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"}
_OPERATORS = {
    "cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm", "native_group_norm",
    "native_layer_norm", "_batch_norm_with_update", "_native_batch_norm_legit",
    "_batch_norm_no_update", "_fused_rms_norm",
}  # fmt: skip
_VIEWS = {
    "chunk", "flatten", "getitem", "narrow", "permute", "reshape", "select", "split", "squeeze",
    "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


@dataclass
class Paths:
    """What a trace or a forward showed of one norm.

    Args:
        open: the operations on the shortest path found to the output that passes no other norm;
            None if there is none.
        met: the norms that paths from it meet first.
        called: whether it was called at all.

    Example:
        >>> find_paths(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))["0"]
        Paths(open=('1',), met=[], called=True)
    """

    open: tuple[str, ...] | None = None
    met: list[str] = field(default_factory=list)
    called: bool = False


def scales(module: nn.Module) -> bool:
    """Whether a module is a norm that learns a scale: torch's, ours, or one that looks like it.

    Example:
        >>> scales(nn.LayerNorm(4)), scales(nn.LayerNorm(4, elementwise_affine=False))
        (True, False)
    """
    if is_norm(module) and isinstance(getattr(module, "weight", None), Tensor):
        return True
    return _looks_like_norm(module)


def find_paths(model: nn.Module, example_inputs: Any = None) -> dict[str, Paths] | None:
    """Find, for each norm of a network, whether a path to the output passes no other norm.

    The model is left as it was.

    Args:
        model: the network.
        example_inputs: what its forward takes, as a tensor, a tuple of positional or a mapping of
            keyword arguments; used where the network cannot be traced symbolically.

    Returns:
        The first path of each norm -> its `Paths`; None where the network does not trace and there
        are no example inputs.

    Raises:
        ValueError: the model's forward fails on `example_inputs`.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> found = find_paths(model)
        >>> found["0"].open, found["0"].met
        (None, ['2'])
        >>> found["2"].open
        ('3',)
    """
    names = {module: name for name, module in model.named_modules()}
    norms = {module: name for module, name in names.items() if _is_any_norm(module)}
    if model in norms:
        return {"": Paths((), called=True)}
    graph = trace_graph(model, _Tracer())
    if graph is not None:
        return _read(graph, names, norms)
    if example_inputs is None or any(is_lazy(p) for p in model.parameters()):
        return None
    return _record(model, names, norms, example_inputs)


def _is_any_norm(module: nn.Module) -> bool:
    return is_norm(module) or _looks_like_norm(module)


def _looks_like_norm(module: nn.Module) -> bool:
    """A norm of someone's own: named so, without parts, with one scale a channel."""
    weight = module._parameters.get("weight")
    if weight is None or "norm" not in type(module).__name__.lower() or is_norm(module):
        return False
    return (is_lazy(weight) or weight.dim() == 1) and not any(module.children())


def _undoes(module: nn.Module) -> bool:
    """Whether a norm's output forgets the scale of its input: constants do not make it so."""
    kind = norm_kind(module)
    if kind is not None and kind.family == "frozen":
        return False
    if isinstance(module, NormLayer) and module.frozen:
        return False
    return not isinstance(module, nn.LocalResponseNorm)


class _Carried:
    """What reaches the tensors of one forward."""

    def __init__(self, norms: Mapping[nn.Module, str]) -> None:
        self.norms = norms
        self.found = {module: Paths() for module in norms}

    def through(self, reach: _Reach, module: nn.Module) -> _Reach:
        """What reaches the output of a norm."""
        self.found[module].called = True
        own: _Reach = {module: ()}
        if not _undoes(module):
            return _step(reach, self.norms[module]) | own
        self.meet(reach, self.norms[module])
        return own

    def meet(self, reach: _Reach, name: str) -> None:
        for module in reach:
            met = self.found[module].met
            if name not in met:
                met.append(name)

    def leave(self, reach: _Reach) -> None:
        """Note what reaches an output of the network."""
        for module, path in reach.items():
            known = self.found[module].open
            if known is None or len(path) < len(known):
                self.found[module].open = path

    def by_name(self) -> dict[str, Paths]:
        return {name: self.found[module] for module, name in self.norms.items()}


def _merge(reaches: Iterable[_Reach]) -> _Reach:
    """All that reaches any of several tensors, each by its shortest path."""
    merged: _Reach = {}
    for reach in reaches:
        for module, path in reach.items():
            if module not in merged or len(path) < len(merged[module]):
                merged[module] = path
    return merged


def _step(reach: _Reach, operation: str) -> _Reach:
    return {module: (*path, operation) for module, path in reach.items()}


# A symbolic trace


class _Tracer(NormTracer):
    """Goes into torch's own modules, too, where norms are inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_any_norm(m):
            return True
        if any(_is_any_norm(part) for part in m.modules()):
            return False
        return super().is_leaf_module(m, module_qualified_name)


def _read(
    graph: fx.Graph, names: Mapping[nn.Module, str], norms: Mapping[nn.Module, str]
) -> dict[str, Paths]:
    """Carry along a traced graph, whose nodes stand in the order of execution."""
    modules = {name: module for module, name in names.items()}
    carried, reaches = _Carried(norms), dict[fx.Node, _Reach]()
    for node in graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        reach = {} if only_looks(node) else _merge(reaches[n] for n in node.all_input_nodes)
        name = getattr(node.target, "__name__", str(node.target)).strip("_")
        if node.op == "output":
            carried.leave(reach)
        elif module is not None and module in norms:
            reach = carried.through(reach, module)
        elif node.op == "call_function" and name in _FUNCTIONS:
            carried.meet(reach, f"{name}()")
            reach = {}
        elif not isinstance(module, nn.Identity):
            reach = _step(reach, name)
        reaches[node] = reach
        for written in _written(node):
            reaches[written] = _merge([reaches[written], reach])
    return carried.by_name()


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What a node changes: the first argument of ``x.relu_()``, and what that is a view of."""
    name = getattr(node.target, "__name__", str(node.target))
    changed = node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    while changed and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
        changed = getattr(node.target, "__name__", str(node.target)) in _VIEWS


# A recorded forward


class _Recorder(TorchDispatchMode):
    """Carries along one forward; a tensor and its views are one."""

    def __init__(self, names: Mapping[nn.Module, str], norms: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.carried = _Carried(norms)
        self.reaches: Any = WeakTensorKeyDictionary()
        self.inside: list[_Reach] = []  # what reached the module that is running

    def reach(self, value: Any) -> _Reach:
        return _merge(self.reaches.get(_whole(t), {}) for t in tensors_in(value))

    def mark(self, value: Any, reach: _Reach) -> None:
        for tensor in tensors_in(value):
            whole = _whole(tensor)
            self.reaches[whole] = _merge([self.reaches.get(whole, {}), reach])

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside.append(self.reach((args, kwargs)))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        reach = self.inside.pop()
        if self.inside:
            return
        if module in self.carried.norms:
            self.mark(output, self.carried.through(reach, module))
        else:
            self.mark(output, _step(reach, self.names[module]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.inside:
            return output
        reach, name = self.reach((args, kwargs)), func.overloadpacket.__name__
        if name in _OPERATORS:
            self.carried.meet(reach, f"{name}()")
        elif reach:
            self.mark(output, _step(reach, name.strip("_")))
        return output


def _whole(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _record(
    model: nn.Module,
    names: Mapping[nn.Module, str],
    norms: Mapping[nn.Module, str],
    example_inputs: Any,
) -> dict[str, Paths]:
    """Run one forward in eval mode without gradients, and carry along it."""
    recorder = _Recorder(names, norms)
    handles: list[Any] = []
    for module in _outermost(model, norms):
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder:
            recorder.carried.leave(recorder.reach(observe(model, example_inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return recorder.carried.by_name()


def _outermost(model: nn.Module, norms: Mapping[nn.Module, str]) -> Iterator[nn.Module]:
    for module in model.modules():
        if module in norms or isinstance(module, FEEDING):
            yield module
