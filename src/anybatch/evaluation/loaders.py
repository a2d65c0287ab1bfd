"""Batches from any loader, and a network that is the same afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.conversion.feeders import restored, tensors_in
from anybatch.layers.base import NormLayer

Forward = Callable[[nn.Module, Any], Any]
OnProgress = Callable[[int, int | None], None]


def recut(loader: Iterable[Any], size: int | None) -> Iterator[Any]:
    """Batches of another size from a loader's; a last one that is not whole is left out.

    Args:
        loader: gives batches: tensors, or nests of tuples, lists and mappings of tensors whose
            first dimension counts examples.
        size: examples in a batch; None for the batches as they come.

    Yields:
        Batches of the same structure.

    Example:
        >>> [len(batch) for batch in recut([torch.zeros(3), torch.zeros(4)], 2)]
        [2, 2, 2]
    """
    if size is None:
        yield from loader
        return
    waiting: list[Any] = []
    have = 0
    for batch in loader:
        waiting.append(batch)
        have += examples_in(batch)
        while have >= size:
            whole = _join(waiting)
            yield _part(whole, 0, size)
            have -= size
            waiting = [_part(whole, size, size + have)] if have else []


def examples_in(batch: Any) -> int:
    """How many examples a batch holds.

    Raises:
        ValueError: it holds no tensor.

    Example:
        >>> examples_in((torch.zeros(5, 2), torch.zeros(5)))
        5
    """
    first = next(iter(tensors_in(batch)), None)
    if first is None or first.dim() == 0:
        raise ValueError(f"loader: a batch of type {type(batch).__name__} holds no tensor")
    return len(first)


def _join(batches: list[Any]) -> Any:
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {key: _join([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        return _like(first, [_join(list(parts)) for parts in zip(*batches, strict=True)])
    return first


def _part(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: _part(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return _like(batch, [_part(value, start, stop) for value in batch])
    return batch


def to_device(batch: Any, device: torch.device | None) -> Any:
    """A batch with all its tensors on a device; None leaves them."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return _like(batch, [to_device(value, device) for value in batch])
    return batch


def _like(given: Any, parts: list[Any]) -> Any:
    if hasattr(given, "_fields"):
        return type(given)(*parts)
    return tuple(parts) if isinstance(given, tuple) else parts


def call(model: nn.Module, batch: Any) -> Any:
    """Run a network on a batch: the first of a tuple or list, a mapping by its names.

    Args:
        model: the network.
        batch: a tensor, ``(inputs, targets, ...)``, or a mapping of keyword arguments.

    Returns:
        What the network returns.

    Raises:
        ValueError: the batch is something else.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    given = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(given, Tensor):
        raise ValueError(
            f"loader: a batch of type {type(batch).__name__} is no tensor, no mapping and does "
            "not begin with a tensor; give forward=, which takes the model and a batch"
        )
    return model(given)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """After it the network is as before: attributes, modes, hooks, buffers, memory, gradients.

    Random numbers of torch, Python and NumPy go on as if nothing had been drawn.

    Args:
        model: the network.
    """
    memory = [
        (tensor, tensor.clone())
        for module in model.modules()
        if isinstance(module, NormLayer)
        for tensor in module.memory.values()
    ]
    gradients = [
        (p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with restored(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, before in memory:
                tensor.copy_(before)
            for parameter, gradient, value in gradients:
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
        random.setstate(drawn[0])
        if numpy is not None:
            numpy.random.set_state(drawn[1])
