"""Tensor subclasses: compute on the plain tensors, return what the subclass makes of the result."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import handle_torch_function, has_torch_function

from anybatch.backends.layout import PLAIN_TYPES


def as_plain(x: Tensor) -> Tensor:
    """View a tensor without its subclass, connected in autograd.

    A subclass that implements the operators itself (``__torch_dispatch__``, as ``DTensor`` does)
    has no plain memory and is returned as it is.
    """
    if type(x) in PLAIN_TYPES or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def is_overridden(*tensors: Tensor | None) -> bool:
    """True if a subclass among the tensors overrides torch's functions."""
    given = [t for t in tensors if isinstance(t, Tensor)]
    if torch.compiler.is_compiling():
        disabled = torch._C._disabled_torch_function_impl
        return any(
            type(t) not in PLAIN_TYPES and type(t).__torch_function__ is not disabled for t in given
        )
    return has_torch_function(given)


@_disable_dynamo  # which follows subclasses through few of the operators here
def on_plain(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Call a function on plain tensors, and let their subclass convert the result.

    ``__torch_function__`` of a subclass is called with `batch_norm` below, as torch's layers call
    it with ``torch.nn.functional.batch_norm``: it decides on type and metadata of the result.
    Under ``torch.compile`` the call is a graph break.

    Example:
        >>> on_plain(torch.neg, torch.ones(1))
        tensor([-1.])
    """
    given = [t for t in tensors if isinstance(t, Tensor)]
    if not has_torch_function(given):
        return function(*tensors)
    y: Tensor = handle_torch_function(batch_norm, given, *tensors, function=function)
    return y


def batch_norm(*tensors: Tensor | None, function: Callable[..., Tensor]) -> Tensor:
    """The function whose results a subclass converts."""
    return function(*(as_plain(t) if isinstance(t, Tensor) else t for t in tensors))


def is_distributed(x: Any) -> bool:
    """True if a tensor is a ``DTensor`` of ``torch.distributed``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def on_local(module: nn.Module, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Call a function on the replicated local tensors behind a ``DTensor`` and a module's state.

    Torch's batch norm replicates its input too: statistics are those of the whole batch.

    Args:
        module: The module whose parameters and buffers the function reads and writes.
        function: Gives a tensor.
        *tensors: Its arguments; the first is a ``DTensor``.

    Returns:
        The result, replicated on the mesh of the first argument.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensors[0].device_mesh  # type: ignore[union-attr]
    everywhere = [Replicate()] * mesh.ndim

    def local(t: Any) -> Any:
        return t.redistribute(placements=everywhere).to_local() if is_distributed(t) else t

    with _replaced_state(module, local):
        y = function(*map(local, tensors))
    return DTensor.from_local(y, mesh, everywhere, run_check=False)


@contextmanager
def _replaced_state(module: nn.Module, replace: Callable[[Any], Any]) -> Iterator[None]:
    kept = module._parameters, module._buffers
    module.__dict__["_parameters"] = {name: replace(t) for name, t in kept[0].items()}
    module.__dict__["_buffers"] = {name: replace(t) for name, t in kept[1].items()}
    try:
        yield
    finally:
        module.__dict__["_parameters"], module.__dict__["_buffers"] = kept
