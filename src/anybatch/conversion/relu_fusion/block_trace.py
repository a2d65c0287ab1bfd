"""The trace of one block's forward, or the reason why a trace would not stand for it.

A block's parts are leaves, except containers that end in a norm, whose output is the norm's. A
trace stands for the forward only if it cannot have missed anything: a forward that asks what a
value is or holds, draws random numbers, sets attributes or enters a mode is refused.
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
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from anybatch.conversion.graph_trace import GraphTracer
from anybatch.conversion.module_swap import has_hooks
from anybatch.conversion.norm_types import is_norm
from anybatch.conversion.observe import restored
from anybatch.conversion.relu_fusion.fused_block import fused_class, plain_class

_IN_PLACE = (
    "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior",
    "ixor", "ilshift", "irshift",
)  # fmt: skip
_OF_FX = {"torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}


class Unsound(Exception):
    """A forward does something that a trace of it does not show."""


def is_list(module: nn.Module) -> bool:
    """True if a module only holds others, and its parent calls these."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def is_passed_over(module: nn.Module) -> bool:
    """True if a part is a chain that ends in a norm, and nothing but a chain."""
    cls = plain_class(module)
    chain = issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward
    if not chain or not module._modules or "forward" in module.__dict__ or has_hooks(module):
        return False
    last = next(reversed(module._modules.values()))
    return last is not None and (is_norm(last) or is_passed_over(last))


def check_class(block: nn.Module) -> None:
    """Refuse blocks that could not be what they are with another forward."""
    cls = plain_class(block)
    if isinstance(block, (fx.GraphModule, torch.jit.ScriptModule)):
        raise Unsound("is a graph already")
    if parametrize.is_parametrized(block):
        raise Unsound("has parametrized weights")
    if "forward" in block.__dict__ or not inspect.isfunction(inspect.unwrap(cls.forward)):
        raise Unsound("is none of its class")
    copies = ("__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__")
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in copies):
        raise Unsound("belongs to a class that makes its copies in its own way")
    code = inspect.unwrap(cls.forward).__code__
    asked = {"type", "id", "locals", "globals", "vars"}
    loads = [i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_GLOBAL")]
    if asked & set(loads):
        raise Unsound(f"calls {sorted(asked & set(loads))[0]}()")
    before = block.__class__
    try:
        block.__class__ = fused_class(cls)
    except TypeError:
        raise Unsound("belongs to a class that cannot be derived from") from None
    finally:
        block.__class__ = before


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
        raise Unsound("asks of what type a value is")


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _IN_PLACE:  # fx takes ``a += b`` for ``a = a + b``
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _BlockTracer(GraphTracer):
    """Traces one block: its parts are leaves."""

    def __init__(self, inputs: list[str]) -> None:
        super().__init__(lambda module: not is_passed_over(module))
        self.inputs, self.modes = inputs, _modes()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not is_passed_over(m):
            return fx.Tracer.call_module(self, m, forward, args, kwargs)
        plain = plain_class(m).forward.__get__(m)  # without hooks, and not the fused one
        return fx.Tracer.call_module(self, m, plain, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        made = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]
        return root_fn, [self.root, *made]

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        if _modes() != self.modes:
            raise Unsound("computes in a mode of its own")
        return super().create_proxy(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
            return a.node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


def _modes() -> tuple[Any, ...]:
    """The modes that change what an operation computes from its arguments."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        None if hooks is None else hooks(True),
    )


def trace_block(block: nn.Module) -> tuple[fx.Graph, int]:
    """The graph of a block's forward in training, and how many tensors it takes."""
    own = plain_class(block).forward
    parameters = list(inspect.signature(own).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    inputs = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise Unsound("takes arguments by name only")
    drawn, cls = random.getstate(), block.__class__
    with restored(block), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        block.__class__ = plain_class(block)
        block.__dict__["training"] = True
        before, generator = _states(block), torch.get_rng_state()
        try:
            graph = _BlockTracer(inputs).trace(block)
        except Unsound:
            raise
        except Exception as error:  # any forward may be run on proxies here, and fail in any way
            what = str(error).split("\n")[0][:80] or type(error).__name__
            raise Unsound(f"does not trace ({what})") from None
        finally:
            block.__class__, drew = cls, random.getstate() != drawn
            random.setstate(drawn)
        if drew or not torch.equal(generator, torch.get_rng_state()):
            raise Unsound("draws random numbers")
        if _states(block) != before:
            raise Unsound("changes attributes")
    for node in graph.nodes:
        node.type = None  # annotations name what the code would have to import
    return graph, len(inputs)


def _states(block: nn.Module) -> list[dict[str, Any]]:
    """The attributes of all parts, by identity, with the contents of containers."""
    return [
        {name: (id(value), _held(value)) for name, value in module.__dict__.items()}
        for module in block.modules()
    ]


def _held(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(key, id(item)) for key, item in value.items()]
    return [id(item) for item in value] if isinstance(value, (list, set)) else None


def code_of(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """The source of a graph, and what it refers to."""
    made = graph.python_code("self")
    names = {
        name: value
        for name, value in made.globals.items()
        if name not in _OF_FX and re.search(rf"\b{name}\b", made.src)
    }
    if any(isinstance(value, ModuleType) for value in names.values()):
        raise Unsound("refers to modules that copies could not find")
    if any(re.search(rf"\b{name}\b", made.src) for name in ("fx_pytree", "pytree")):
        raise Unsound("takes or gives nests that copies could not make")
    try:
        pickle.dumps(names)
    except Exception:  # what it refers to may refuse in any way
        raise Unsound("refers to functions that copies could not find") from None
    return made.src, names
