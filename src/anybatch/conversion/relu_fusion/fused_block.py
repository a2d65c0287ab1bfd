"""Blocks that run a rewritten forward, in which norms compute the ReLU that follows them.

A fused block is of a subclass of its class, made here; its parts, parameters and names are what
they were. In training it runs code that a trace of its own forward gave, and its own forward
wherever that code might not do the same: in evaluation, without gradients, under autocast,
compilers and tracers, on other arguments than tensors, once a part was exchanged or an attribute
set, and as long as anything listens to a part that the code passes over.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from anybatch import backends

_GLOBAL = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


@dataclass
class Fusion:
    """The code that a block runs in place of its forward.

    Args:
        source: a function ``forward`` of the block and its inputs.
        names: what the source refers to besides torch.
        inputs: how many tensors it takes.
        parts: modules whose parts the source relies on, each with these.
        passed: parts that listeners would see called, or called with other values: norms that do
            more, ReLUs that are not called, containers that are passed over.
        fused: what each norm does, by its name in the block.
    """

    source: str
    names: Mapping[str, Any]
    inputs: int
    parts: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]
    passed: tuple[nn.Module, ...]
    fused: Mapping[str, str]
    run: Any = field(default=None, repr=False)

    def holds(self) -> bool:
        """True if all parts are there, and nothing listens to those that are passed over."""
        for module, parts in self.parts:
            if module._modules != parts:
                return False
        for part in self.passed:
            known = part.__dict__
            if (
                known["_forward_hooks"]
                or known["_forward_pre_hooks"]
                or known["_backward_hooks"]
                or known["_backward_pre_hooks"]
                or "forward" in known
            ):
                return False
        return not any(_GLOBAL)

    def after(self, replacements: Mapping[nn.Module, nn.Module]) -> Fusion:
        """The same after parts were exchanged."""

        def of(part: Any) -> Any:
            return replacements.get(part, part)

        now = [(m, {name: of(part) for name, part in parts.items()}) for m, parts in self.parts]
        return replace(self, parts=tuple(now), passed=tuple(map(of, self.passed)))

    def __call__(self, block: nn.Module, *inputs: Tensor) -> Any:
        if self.run is None:
            self.run = _function(self.source, self.names)
        return self.run(block, *inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "run": None, "names": dict(self.names), "fused": dict(self.fused)}


def _function(source: str, names: Mapping[str, Any]) -> Any:
    scope = {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan")}
    scope.update(names)
    exec(compile(source, "<the fused forward of a block>", "exec"), scope)
    return scope["forward"]


class _Fused:
    """Base of the classes of fused blocks."""

    _plain: type[nn.Module]

    def __setattr__(self, name: str, value: Any) -> None:
        # What the forward decided on may have changed; parameters are read at each call.
        own = name in _OF_EVERY_MODULE or (name[:2] == "__" and name[-2:] == "__")
        if not own and not isinstance(value, Tensor):
            self.__dict__.pop("_fusion", None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop("_fusion", None)
        super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(max(protocol, 2))
        assert isinstance(made, tuple) and made[0] is copyreg.__newobj__  # type: ignore[attr-defined]
        return (_new, (self._plain, *made[1][1:]), *made[2:])


def _new(plain: type[nn.Module], *args: Any) -> nn.Module:
    """A fused block before its state: for copies and pickles."""
    made = fused_class(plain)
    block: nn.Module = made.__new__(made, *args)
    return block


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of the fused blocks of a class.

    Example:
        >>> fused_class(nn.Sequential).__name__
        'FusedSequential'
    """
    if plain in _classes:
        return _classes[plain]
    own = plain.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or kwargs or not _may_run(self, args):
            return own(self, *args, **kwargs)
        return self.__dict__["_fusion"](self, *args)

    held = {"forward": forward, "_plain": plain, "__module__": plain.__module__}
    made: type[nn.Module] = type(f"Fused{plain.__name__}", (_Fused, plain), held)
    return _classes.setdefault(plain, made)


def _may_run(block: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """True if a block's rewritten forward does what its own would."""
    fusion = block.__dict__.get("_fusion")
    return (
        fusion is not None
        and block.training
        and torch.is_grad_enabled()
        and len(inputs) == fusion.inputs
        and all(type(one) is Tensor for one in inputs)
        and not torch._C._is_any_autocast_enabled()
        and not backends.is_traced()
        and fusion.holds()
    )


def plain_class(block: nn.Module) -> type[nn.Module]:
    """The class of a block without its fusion.

    Example:
        >>> plain_class(nn.ReLU())
        <class 'torch.nn.modules.activation.ReLU'>
    """
    return type(block)._plain if isinstance(block, _Fused) else type(block)


def fuse_block(block: nn.Module, fusion: Fusion) -> None:
    """Let a block run a rewritten forward."""
    block.__class__ = fused_class(plain_class(block))
    block.__dict__["_fusion"] = fusion


def unfuse(model: nn.Module) -> list[tuple[nn.Module, Fusion]]:
    """Let all blocks of a network run their own forwards again.

    The result are the blocks that were fused, with what they ran.
    """
    found = list(fusions(model))
    for block in model.modules():
        if isinstance(block, _Fused):
            block.__dict__.pop("_fusion", None)
            block.__class__ = block._plain  # type: ignore[assignment]
    return found


def fusions(model: nn.Module) -> Iterator[tuple[nn.Module, Fusion]]:
    """The fused blocks of a network, with what they run.

    Example:
        >>> list(fusions(nn.Sequential(nn.ReLU())))
        []
    """
    for block in model.modules():
        fusion = block.__dict__.get("_fusion") if isinstance(block, _Fused) else None
        if fusion is not None:
            yield block, fusion


def add_relu(norm: nn.Module, x: Tensor, residual: Any, in_place: bool) -> Tensor:
    """relu(norm(x) + residual), by the norm itself where it adds what torch would.

    Example:
        >>> import anybatch
        >>> norm, x = anybatch.BatchNorm1d(2), torch.randn(4, 2)
        >>> torch.equal(add_relu(norm.eval(), x, x, False), torch.relu(norm(x) + x))
        True
    """
    alike = isinstance(residual, Tensor) and residual.dtype == x.dtype
    if alike and residual.shape == x.shape:
        added: Tensor = norm(x, residual=residual, activation="relu")
        return added
    y: Tensor = norm(x)
    if in_place:
        y += residual
        return y.relu_()
    added = y + residual
    return added.relu()
