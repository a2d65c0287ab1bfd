"""Which norms are followed by a ReLU, or by an addition and a ReLU, that they can do themselves.

Each block, a module whose own forward calls norms, is traced alone, with its parts as leaves (but
containers that end in a norm, whose output is the norm's). A trace stands for the forward only
where it cannot have missed anything: one in which the forward asks what a value is or holds, draws
random numbers, sets attributes or enters a mode is no trace, and the block stays as it is.
"""

from __future__ import annotations

import dis
import inspect
import operator
import pickle
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from anybatch.conversion.module_swap import has_hooks
from anybatch.conversion.norm_types import has_plain_forward, is_norm
from anybatch.conversion.producers import FEEDING, only_looks, restored
from anybatch.conversion.relu_fusion.fused_block import Fusion, add_relu, fused_class, plain_class
from anybatch.layers.weight_centralization import is_centralized

RELU, ADD_RELU = "relu", "add and relu"
_RELUS: set[Any] = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
_ADDS: set[Any] = {operator.add, torch.add, "add", operator.iadd, "add_"}
_ADDS_IN_PLACE: set[Any] = {operator.iadd, "add_"}
_IN_PLACE = (
    "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior",
    "ixor", "ilshift", "irshift",
)  # fmt: skip
_LEAVES = "its output is the block's"
_OF_FX = {"torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}


class _Unsound(Exception):
    """A forward does what a trace of it does not show."""


@dataclass
class Found:
    """What was found out about the fusion of a network's norms.

    Args:
        blocks: the blocks to fuse, with what they are to run.
        fused: what each norm does, once for each of its calls that is fused.
        obstacles: why calls of a norm are not fused.
    """

    blocks: dict[nn.Module, Fusion] = field(default_factory=dict)
    fused: dict[nn.Module, list[str]] = field(default_factory=dict)
    obstacles: dict[nn.Module, list[str]] = field(default_factory=dict)

    def of(self, norm: nn.Module) -> tuple[str | None, str]:
        """What a norm does, or None; and a sentence about it."""
        done = list(dict.fromkeys(self.fused.get(norm, [])))
        if done:
            return " / ".join(done), f"fused with {' / '.join(done)}"
        reasons = list(dict.fromkeys(self.obstacles.get(norm, [])))
        if len(reasons) > 1:  # a chain that ends in it is called by a block that says more
            reasons = [reason for reason in reasons if reason != _LEAVES]
        return None, f"not fused: {'; '.join(reasons) or 'no block that calls it was found'}"


def find_fusions(model: nn.Module, norms: Iterable[nn.Module]) -> Found:
    """Find what norms can do in their own pass; the model is left as it was.

    Args:
        model: the network.
        norms: those that are layers of anybatch, or will be.

    Returns:
        The blocks to fuse, and what there is to say of each norm.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> find_fusions(model, [model[1]]).of(model[1])
        ('relu', 'fused with relu')
    """
    wanted, found = set(norms), Found()
    names = {module: name for name, module in model.named_modules()}
    for block in list(names):
        reached = [part for module in _callers(block) for part in module._modules.values()]
        called = [part for part in reached if part in wanted]
        if not called or is_norm(block) or _is_list(block):
            continue
        try:
            fusion, stay = _fusion_of(block, wanted)
        except _Unsound as error:
            where = names[block] or type(block).__name__
            for norm in called:
                found.obstacles.setdefault(norm, []).append(f"the forward of {where!r} {error}")
            continue
        for norm, reason in stay:
            found.obstacles.setdefault(norm, []).append(reason)
        if fusion is not None:
            found.blocks[block] = fusion
            for name, what in fusion.fused.items():
                found.fused.setdefault(block.get_submodule(name), []).append(what)
    return found


def _callers(block: nn.Module) -> Iterator[nn.Module]:
    """A block and what it passes over: the modules whose parts its forward calls."""
    yield block
    for part in block._modules.values():
        if part is not None and (_is_passed_over(part) or _is_list(part)):
            yield from _callers(part)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _is_passed_over(module: nn.Module) -> bool:
    """Whether a part is a chain that ends in a norm, and nothing but a chain."""
    cls = plain_class(module)
    chain = issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward
    if not chain or not module._modules or "forward" in module.__dict__ or has_hooks(module):
        return False
    last = next(reversed(module._modules.values()))
    return last is not None and (is_norm(last) or _is_passed_over(last))


def _fusion_of(
    block: nn.Module, wanted: set[nn.Module]
) -> tuple[Fusion | None, list[tuple[nn.Module, str]]]:
    """What a block is to run, or None; and why norms that it calls stay as they are."""
    _check_class(block)
    graph, inputs = _trace(block)
    writer = _Writer(graph, dict(block.named_modules(remove_duplicate=False)), wanted)
    writer.rewrite()
    if not writer.fused:
        return None, writer.stay
    source, names = _code(graph)
    callers = list(_callers(block))
    parts = tuple((module, dict(module._modules)) for module in callers)
    over = [module for module in callers[1:] if not _is_list(module)]
    passed = tuple(dict.fromkeys([*writer.passed, *over]))
    return Fusion(source, names, inputs, parts, passed, writer.fused), writer.stay


def _check_class(block: nn.Module) -> None:
    """Refuse blocks that could not be what they are with another forward."""
    cls = plain_class(block)
    if isinstance(block, (fx.GraphModule, torch.jit.ScriptModule)):
        raise _Unsound("is a graph already")
    if parametrize.is_parametrized(block):
        raise _Unsound("has parametrized weights")
    if "forward" in block.__dict__ or not inspect.isfunction(inspect.unwrap(cls.forward)):
        raise _Unsound("is none of its class")
    copies = ("__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__")
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in copies):
        raise _Unsound("belongs to a class that makes its copies in its own way")
    code = inspect.unwrap(cls.forward).__code__
    asked = {"type", "id", "locals", "globals", "vars"}
    loads = [i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_GLOBAL")]
    if asked & set(loads):
        raise _Unsound(f"calls {sorted(asked & set(loads))[0]}()")
    before = block.__class__
    try:
        block.__class__ = fused_class(cls)
    except TypeError:
        raise _Unsound("belongs to a class that cannot be derived from") from None
    finally:
        block.__class__ = before


# --- the trace ------------------------------------------------------------------


class _Value(fx.Proxy):
    """A value of a traced forward, which says nothing that a trace would take for granted."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no {name}")
        return super().__getattr__(name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # ``isinstance`` asks here. Inputs are tensors: other calls run the block's own forward.
        code = sys._getframe(1)
        of_torch = str(code.f_globals.get("__name__", "")).split(".")[0] == "torch"
        if of_torch and code.f_code.co_name != "is_tensor":
            return type(self)
        if self.node.op == "placeholder":
            return Tensor
        raise _Unsound("asks of what type a value is")


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _IN_PLACE:  # fx takes ``a += b`` for ``a = a + b``
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Traces one block: its parts are leaves."""

    def __init__(self, inputs: list[str]) -> None:
        super().__init__()
        self.inputs, self.modes = inputs, _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _is_passed_over(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if _is_passed_over(m):
            forward = plain_class(m).forward.__get__(m)  # no hooks, and not its fused one
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        made = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]
        return root_fn, [self.root, *made]

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        if _modes() != self.modes:
            raise _Unsound("computes in a mode of its own")
        return super().create_proxy(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
            return a.node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


def _modes() -> tuple[Any, ...]:
    """What decides, beside its arguments, on what an operation does."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        None if hooks is None else hooks(True),
    )


def _trace(block: nn.Module) -> tuple[fx.Graph, int]:
    """The graph of a block's forward in training, and how many tensors it takes."""
    own = plain_class(block).forward
    parameters = list(inspect.signature(own).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    inputs = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise _Unsound("takes arguments by name only")
    drawn, cls = random.getstate(), block.__class__
    with restored(block), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        block.__class__ = plain_class(block)
        block.__dict__["training"] = True
        before, generator = _states(block), torch.get_rng_state()
        try:
            graph = _Tracer(inputs).trace(block)
        except _Unsound:
            raise
        except Exception as error:  # any forward may be run on proxies here, and fail in any way
            what = str(error).split("\n")[0][:80] or type(error).__name__
            raise _Unsound(f"does not trace ({what})") from None
        finally:
            block.__class__, drew = cls, random.getstate() != drawn
            random.setstate(drawn)
        if drew or not torch.equal(generator, torch.get_rng_state()):
            raise _Unsound("draws random numbers")
        if _states(block) != before:
            raise _Unsound("changes attributes")
    for node in graph.nodes:
        node.type = None  # annotations name what the code would have to import
    return graph, len(inputs)


def _states(block: nn.Module) -> list[dict[str, Any]]:
    """What the attributes of all parts are, and what the containers among them hold."""
    return [
        {name: (id(value), _held(value)) for name, value in module.__dict__.items()}
        for module in block.modules()
    ]


def _held(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(key, id(item)) for key, item in value.items()]
    return [id(item) for item in value] if isinstance(value, (list, set)) else None


# --- the rewritten graph --------------------------------------------------------


class _Writer:
    """Lets norms of a graph do what follows them."""

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
            except _Unsound as reason:
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
            raise _Unsound("it is called with more than its input")
        if has_hooks(norm):
            raise _Unsound("hooks on it would see other values")
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
                raise _Unsound("another norm adds its output")
            else:
                raise _Unsound(f"{self.named(user)} follows it")
            chain.append(user)
        for part in over:
            if has_hooks(part) or "forward" in part.__dict__:
                raise _Unsound("hooks on what follows it would not be called")
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
            raise _Unsound(_LEAVES)
        if len(users) > 1:
            raise _Unsound("its output is used more than once")
        return users[0]

    def is_relu(self, node: fx.Node, given: fx.Node) -> bool:
        """Whether a node is the ReLU of one value, and that alone."""
        if node.args != (given,):
            return False
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU and not node.kwargs
        return node.target in _RELUS and set(node.kwargs) <= {"inplace"}

    def residual(self, node: fx.Node, given: fx.Node) -> tuple[fx.Node, bool] | None:
        """What a node adds to a value, and whether it writes it over."""
        if node.op == "call_module" or node.target not in _ADDS or node.kwargs:
            return None
        others = [arg for arg in node.args if arg is not given]
        if len(node.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        in_place = node.target in _ADDS_IN_PLACE
        if in_place and node.args[0] is not given:
            raise _Unsound("its output is added to a tensor in place")
        return others[0], in_place

    def check_between(
        self, node: fx.Node, norm: nn.Module, chain: list[fx.Node], add: fx.Node
    ) -> None:
        """Refuse to move a norm behind what might change its input, or be changed by it."""
        between, here = [], node.next
        while here is not add:
            if here not in chain and here.op != "get_attr" and not only_looks(here):
                between.append(here)
            here = here.next
        if not between:
            return
        given = node.args[0]
        assert isinstance(given, fx.Node)
        feeder = self.module(given)
        plain = isinstance(feeder, FEEDING) and (
            is_centralized(feeder) or has_plain_forward(feeder, any_weight=True)
        )
        if not plain or list(given.users) != [node]:
            raise _Unsound("what it normalizes could change before the addition")
        for other in between:
            module = self.module(other)
            if module is not None and {norm, feeder} & set(module.modules()):
                raise _Unsound("it is called again before the addition")

    def put_addition(
        self, node: fx.Node, relu: fx.Node, add: fx.Node, residual: fx.Node, in_place: bool
    ) -> None:
        """Put the call of a norm that adds in the place of an addition."""
        with self.graph.inserting_before(add):
            norm = self.graph.get_attr(str(node.target))
            made = self.graph.call_function(add_relu, (norm, node.args[0], residual, in_place))
        relu.replace_all_uses_with(made)

    def named(self, node: fx.Node) -> str:
        """What a node is called."""
        module = self.module(node)
        if module is not None:
            return f"{type(module).__name__} {str(node.target)!r}"
        name = getattr(node.target, "__name__", str(node.target)).strip("_")
        return f"{name}()"


def _code(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """The source of a graph, and what it refers to."""
    made = graph.python_code("self")
    names = {
        name: value
        for name, value in made.globals.items()
        if name not in _OF_FX and re.search(rf"\b{name}\b", made.src)
    }
    if any(isinstance(value, ModuleType) for value in names.values()):
        raise _Unsound("refers to modules that copies could not find")
    if any(re.search(rf"\b{name}\b", made.src) for name in ("fx_pytree", "pytree")):
        raise _Unsound("takes or gives nests that copies could not make")
    try:
        pickle.dumps(names)
    except Exception:  # what it refers to may refuse in any way
        raise _Unsound("refers to functions that copies could not find") from None
    return made.src, names
