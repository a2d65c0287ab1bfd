"""Rewriting the graph of a block so that its norms compute what follows them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from anybatch.conversion.graph_trace import FEEDING_LAYERS, is_query, name_of
from anybatch.conversion.module_swap import has_hooks
from anybatch.conversion.norm_types import has_plain_forward
from anybatch.conversion.relu_fusion.block_trace import Unsound
from anybatch.conversion.relu_fusion.fused_block import add_relu
from anybatch.layers.weight_centralization import is_centralized

RELU, ADD_RELU = "relu", "add and relu"
LAST_IN_BLOCK = "its output is the block's"
_RELUS: set[Any] = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
_ADDS: set[Any] = {operator.add, torch.add, "add", operator.iadd, "add_"}
_ADDS_IN_PLACE: set[Any] = {operator.iadd, "add_"}


class GraphWriter:
    """Rewrites a graph so that norms compute what follows them."""

    def __init__(
        self, graph: fx.Graph, modules: Mapping[str, nn.Module], wanted: set[nn.Module]
    ) -> None:
        self.graph, self.modules, self.wanted = graph, modules, wanted
        self.fused: dict[str, str] = {}
        self.passed: list[nn.Module] = []
        self.stay: list[tuple[nn.Module, str]] = []

    def rewrite(self) -> None:
        """Rewrite the graph, from its end: of two norms that are added the later one adds."""
        for node in reversed(list(self.graph.nodes)):
            norm = self.module(node)
            if norm is None or norm not in self.wanted:
                continue
            try:
                what = self.fuse(node, norm)
            except Unsound as reason:
                self.stay.append((norm, str(reason)))
            else:
                self.fused[str(node.target)] = what
                self.passed.append(norm)
        self.graph.lint()

    def module(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self.modules[str(node.target)] if called else None

    def fuse(self, node: fx.Node, norm: nn.Module) -> str:
        """Fuse one call of a norm with what follows it."""
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            raise Unsound("it is called with more than its input")
        if has_hooks(norm):
            raise Unsound("hooks on it would see other values")
        chain, add = [node], None
        over: list[nn.Module] = []
        while True:
            last = chain[-1]
            user = self.only_user(last)
            module = self.module(user)
            if (
                module is not None
                and type(module) is nn.Identity
                and user.args == (last,)
                and not user.kwargs
            ):
                over.append(module)
            elif self.is_relu(user, last):
                chain.append(user)
                over += [] if module is None else [module]
                break
            elif add is None and (found := self.residual(user, last)) is not None:
                add = (user, *found)
            elif user.target is add_relu:
                raise Unsound("another norm adds its output")
            else:
                raise Unsound(f"{self.named(user)} follows it")
            chain.append(user)
        for part in over:
            if has_hooks(part) or "forward" in part.__dict__:
                raise Unsound("hooks on what follows it would not be called")
        if add is None:
            node.kwargs = {"activation": "relu"}
            chain[-1].replace_all_uses_with(node)
        else:
            self.check_between(node, norm, chain, add[0])
            self.put_addition(node, chain[-1], *add)
        for done in reversed(chain[1:] if add is None else chain):
            self.graph.erase_node(done)
        self.passed += over
        return RELU if add is None else ADD_RELU

    def only_user(self, node: fx.Node) -> fx.Node:
        users = list(node.users)
        if not users or users[0].op == "output":
            raise Unsound(LAST_IN_BLOCK)
        if len(users) > 1:
            raise Unsound("its output is used more than once")
        return users[0]

    def is_relu(self, node: fx.Node, given: fx.Node) -> bool:
        """True if a node is the ReLU of one value, and that alone."""
        if node.args != (given,):
            return False
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU and not node.kwargs
        return node.target in _RELUS and set(node.kwargs) <= {"inplace"}

    def residual(self, node: fx.Node, given: fx.Node) -> tuple[fx.Node, bool] | None:
        """The node that is added to a value, and whether the addition is in place."""
        if node.op == "call_module" or node.target not in _ADDS or node.kwargs:
            return None
        others = [arg for arg in node.args if arg is not given]
        if len(node.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        in_place = node.target in _ADDS_IN_PLACE
        if in_place and node.args[0] is not given:
            raise Unsound("its output is added to a tensor in place")
        return others[0], in_place

    def check_between(
        self, node: fx.Node, norm: nn.Module, chain: list[fx.Node], add: fx.Node
    ) -> None:
        """Refuse to move a norm behind what might change its input, or be changed by it."""
        between, here = [], node.next
        while here is not add:
            if here not in chain and here.op != "get_attr" and not is_query(here):
                between.append(here)
            here = here.next
        if not between:
            return
        given = node.args[0]
        assert isinstance(given, fx.Node)
        feeder = self.module(given)
        plain = isinstance(feeder, FEEDING_LAYERS) and (
            is_centralized(feeder) or has_plain_forward(feeder, any_weight=True)
        )
        if not plain or list(given.users) != [node]:
            raise Unsound("what it normalizes could change before the addition")
        for other in between:
            module = self.module(other)
            if module is not None and {norm, feeder} & set(module.modules()):
                raise Unsound("it is called again before the addition")

    def put_addition(
        self, node: fx.Node, relu: fx.Node, add: fx.Node, residual: fx.Node, in_place: bool
    ) -> None:
        """Put the call of a norm that adds in the place of an addition."""
        with self.graph.inserting_before(add):
            norm = self.graph.get_attr(str(node.target))
            made = self.graph.call_function(add_relu, (norm, node.args[0], residual, in_place))
        relu.replace_all_uses_with(made)

    def named(self, node: fx.Node) -> str:
        """The name of what a node calls, for a message."""
        module = self.module(node)
        if module is not None:
            return f"{type(module).__name__} {str(node.target)!r}"
        return f"{name_of(node).strip('_')}()"
