"""Borrowing a network: whatever is done to it inside the context is undone at its end."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from anybatch.conversion.surgery import HOOKS
from anybatch.layers.base import NormLayer

Undo = Callable[[], None]
_MODULE = frozenset(nn.Module().__dict__) | {"memory"}


@contextmanager
def borrowed(model: nn.Module, training: bool | None = None) -> Iterator[nn.Module]:
    """A context that leaves a network, and random numbers, as they were before it.

    Kept are each module's mode, hooks and buffers (values and identity), the norms'
    memory and settings, and the states of Python's, NumPy's and torch's random
    numbers. Whatever ends the context, all of it is put back. Parameters, which
    nothing here changes, are not kept.

    Args:
        model: The network.
        training: Mode inside the context (default None: each module as it is).

    Yields:
        The network inside a wrapper: see `bare`.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with borrowed(norm, training=True) as model:
        ...     _ = model(torch.randn(8, 2))
        >>> norm.num_batches_tracked.item()
        0
    """
    inner = bare(model)
    undo = [random_numbers(inner), *(_module(module) for module in model.modules())]
    try:
        if training is not None:
            inner.train(training)
        yield inner
    finally:
        for put_back in undo:
            put_back()


def bare(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DistributedDataParallel`` or ``DataParallel``.

    What is compiled does not see hooks that come later, and what is distributed
    would synchronize in forwards that need none.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> bare(nn.DataParallel(net)) is net
        True
    """
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, wrapped):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _module(module: nn.Module) -> Undo:
    training = module.training
    hooks = [(table, dict(table)) for table in _tables(module)]
    buffers = _kept(module._buffers)
    norm = isinstance(module, _NormBase)
    settings = {k: v for k, v in module.__dict__.items() if norm and k not in _MODULE}
    memory = _kept(module.memory) if isinstance(module, NormLayer) else {}

    def put_back() -> None:
        module.training = training
        for table, entries in hooks:
            table.clear()
            table.update(entries)
        if norm:
            for name in [k for k in module.__dict__ if k not in _MODULE and k not in settings]:
                del module.__dict__[name]
            module.__dict__.update(settings)
        _restore(module._buffers, buffers)
        if isinstance(module, NormLayer):
            _restore(module.memory, memory)

    return put_back


def _tables(module: nn.Module) -> Iterator[dict[Any, Any]]:
    for name in HOOKS:
        table = module.__dict__.get(name)
        if isinstance(table, dict):
            yield table


def _kept(tensors: Any) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Each tensor and a copy of its values."""
    return {k: (t, None if t is None else t.detach().clone()) for k, t in tensors.items()}


def _restore(tensors: Any, kept: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    for name in [name for name in tensors if name not in kept]:
        del tensors[name]
    with torch.no_grad():
        for name, (tensor, values) in kept.items():
            tensors[name] = tensor
            if tensor is not None and values is not None:
                tensor.copy_(values)


def random_numbers(model: nn.Module) -> Undo:
    """Note the states of all random numbers that a network's forward may draw.

    Args:
        model: Gives the devices.

    Returns:
        A function that puts them back, as often as it is called.

    Example:
        >>> rewind = random_numbers(nn.Linear(1, 1))
        >>> first = torch.rand(1); rewind()
        >>> torch.equal(first, torch.rand(1))
        True
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    arrays = None if numpy is None else numpy.get_state()
    tensors = (*model.parameters(), *model.buffers())
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}

    def put_back() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        for device, state in states.items():
            torch.cuda.set_rng_state(state, device)
        if numpy is not None:
            numpy.set_state(arrays)

    return put_back
