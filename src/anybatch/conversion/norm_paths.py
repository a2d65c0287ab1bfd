"""Finding the norms with a path to the output that crosses no other norm.

The norms that reach a tensor are passed along the network's graph, from operation to operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from anybatch.conversion.graph_trace import FEEDING_LAYERS, graphs_of, is_query, name_of
from anybatch.conversion.norm_types import is_norm, norm_kind
from anybatch.core.norm_layer import NormLayer

# The name of a norm that reaches a tensor -> the operations between the two.
_Reach = dict[str, tuple[str, ...]]

_NORM_OPERATIONS = {
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm",
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
    """The paths from one norm.

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
    """True if a module is a norm that learns a scale: torch's, ours, or one that looks like it.

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

    `example_inputs`, as `observe` takes them, are for networks that cannot be traced symbolically.

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
    modules = dict(model.named_modules())
    found = {name: Paths() for name, module in modules.items() if _is_any_norm(module)}
    if "" in found:
        return {"": Paths((), called=True)}
    graphs = graphs_of(model, example_inputs, _is_traced_leaf, _is_leaf)
    for graph in graphs:
        _read(graph, modules, found)
    return found if graphs else None


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, FEEDING_LAYERS) or _is_any_norm(module)


def _is_traced_leaf(module: nn.Module) -> bool | None:
    """Norms and feeding layers; torch's own modules are none where norms are inside."""
    if _is_any_norm(module):
        return True
    if any(_is_any_norm(part) for part in module.modules()):
        return False
    return isinstance(module, FEEDING_LAYERS) or None


def _is_any_norm(module: nn.Module) -> bool:
    return is_norm(module) or _looks_like_norm(module)


def _looks_like_norm(module: nn.Module) -> bool:
    """A norm of someone's own: named so, without parts, with one scale per channel."""
    weight = module._parameters.get("weight")
    if weight is None or "norm" not in type(module).__name__.lower() or is_norm(module):
        return False
    return (is_lazy(weight) or weight.dim() == 1) and not any(module.children())


def _undoes(module: nn.Module) -> bool:
    """True if a norm's output forgets the scale of its input: constants do not make it so."""
    kind = norm_kind(module)
    if kind is not None and kind.family == "frozen":
        return False
    if isinstance(module, NormLayer) and module.frozen:
        return False
    return not isinstance(module, nn.LocalResponseNorm)


def _merge(reaches: Iterable[_Reach]) -> _Reach:
    """All that reaches any of several tensors, each by its shortest path."""
    merged: _Reach = {}
    for reach in reaches:
        for norm, path in reach.items():
            if norm not in merged or len(path) < len(merged[norm]):
                merged[norm] = path
    return merged


def _step(reach: _Reach, operation: str) -> _Reach:
    return {norm: (*path, operation) for norm, path in reach.items()}


def _read(graph: fx.Graph, modules: Mapping[str, nn.Module], found: dict[str, Paths]) -> None:
    """Carry the norms along a graph, whose nodes stand in the order of execution."""
    reaches = dict[fx.Node, _Reach]()
    for node in graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        reach = {} if is_query(node) else _merge(reaches[n] for n in node.all_input_nodes)
        name = name_of(node)
        if node.op == "output":
            for norm, path in reach.items():
                known = found[norm].open
                if known is None or len(path) < len(known):
                    found[norm].open = path
        elif module is not None and name in found:
            found[name].called = True
            if _undoes(module):
                _meet(reach, name, found)
                reach = {}
            reach = _step(reach, name) | {name: ()}
        elif node.op == "call_function" and name in _NORM_OPERATIONS:
            _meet(reach, f"{name}()", found)
            reach = {}
        elif not isinstance(module, nn.Identity):
            reach = _step(reach, name if module is not None else name.strip("_"))
        aliases = [reaches[alias] for alias in node.meta.get("aliases", ())]
        reaches[node] = _merge([reach, *aliases])
        for written in _written(node):
            reaches[written] = _merge([reaches[written], reach])


def _meet(reach: _Reach, name: str, found: Mapping[str, Paths]) -> None:
    for norm in reach:
        if name not in found[norm].met:
            found[norm].met.append(name)


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that a node changes in place: its first argument, and what that is a view of."""
    name = name_of(node)
    changed = node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    while changed and (node := _looked_at(node)) is not None:  # type: ignore[assignment]
        yield node
        changed = name_of(node) in _VIEWS or "aliases" in node.meta


def _looked_at(node: fx.Node) -> fx.Node | None:
    """The node whose memory an operation in place, or a view, looks into."""
    found = node.args[0] if node.args else next(iter(node.meta.get("aliases", ())), None)
    return found if isinstance(found, fx.Node) else None
