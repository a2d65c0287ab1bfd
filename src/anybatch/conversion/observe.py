"""Running a network's forward without leaving a trace in the network."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def observe(model: nn.Module, example_inputs: Any) -> Any:
    """Run a network on example inputs in evaluation mode, without gradients, and restore it.

    The inputs are one tensor, a tuple or list of positional arguments, or a mapping of keyword
    arguments.

    Raises:
        ValueError: If the forward fails; the message holds its error.

    Example:
        >>> observe(nn.Linear(3, 2), {"input": torch.zeros(1, 3)}).shape
        torch.Size([1, 2])
    """
    named = isinstance(example_inputs, Mapping)
    kwargs = dict(example_inputs) if named else {}
    several = isinstance(example_inputs, (tuple, list))
    args = () if named else tuple(example_inputs) if several else (example_inputs,)
    try:
        with restored(model), torch.no_grad():
            for module in model.modules():
                module.training = False
            return model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"example_inputs: the model's forward failed on them with {type(error).__name__}: "
            f"{error}. Give a tensor, a tuple of positional arguments or a mapping of keyword "
            "arguments that the model takes."
        ) from error


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested tuples, lists, mappings and dataclasses, in order.

    Example:
        >>> len(list(tensors_in((torch.zeros(1), {"a": [torch.ones(2), 3]}))))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


def seed(number: int) -> None:
    """Start the random numbers of torch on the CPU, of Python and of NumPy anew."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number % 2**32)  # larger ones are refused


@contextmanager
def random_states_restored(devices: Sequence[torch.device] | None = None) -> Iterator[None]:
    """A context that restores the random states of torch, Python and NumPy."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numbers)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """A context that restores the model's attributes, its buffers and the random states.

    Lists, dictionaries and sets among the attributes are restored as deep as they are nested.
    """
    saved = [(module, _attributes(module)) for module in model.modules()]
    buffers = [
        (buffer, buffer.detach().clone())
        for buffer in model.buffers()
        if not (is_lazy(buffer) or buffer.is_meta)
    ]
    devices = {b.device for b in model.buffers()} | {p.device for p in model.parameters()}
    cuda = [device for device in devices if device.type == "cuda"]
    with random_states_restored(cuda):
        try:
            yield
        finally:
            for module, attributes in saved:
                _restore(module, attributes)
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def undone_on_failure(model: nn.Module, written: Iterable[nn.Module]) -> Iterator[None]:
    """A context that makes a model what it was, to the last bit, if anything inside fails.

    Args:
        model: The model, whose modules may be swapped and change their classes and attributes.
        written: Its modules whose tensors may be written in place.
    """
    modules = [(module, type(module), _attributes(module)) for module in model.modules()]
    parameters = [(p, p.data) for p in model.parameters() if not is_lazy(p)]
    values = [
        (tensor, tensor.detach().clone(), tensor.requires_grad)
        for module in written
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes in modules:
            module.__class__ = cls
            _restore(module, attributes)
        for parameter, data in parameters:
            parameter.data = data
        with torch.no_grad():
            for tensor, value, requires_grad in values:
                tensor.copy_(value).requires_grad_(requires_grad)
        raise


_Contents = list[tuple[Any, Any]]  # a container that can change, and a copy of what it holds
_CONTAINERS = (list, dict, OrderedDict, set)


def _attributes(module: nn.Module) -> tuple[dict[str, Any], _Contents]:
    """The attributes of a module, and the contents of the containers among and in them."""
    contents: _Contents = []
    waiting, seen = list(module.__dict__.values()), set[int]()
    while waiting:
        value = waiting.pop()
        inside = type(value) in _CONTAINERS
        if not (inside or type(value) is tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        waiting += value.values() if isinstance(value, dict) else value
        if inside:
            contents.append((value, value.copy()))
    return dict(module.__dict__), contents


def _restore(module: nn.Module, attributes: tuple[dict[str, Any], _Contents]) -> None:
    own, contents = attributes
    module.__dict__.clear()
    module.__dict__.update(own)
    for value, content in contents:
        if isinstance(value, list):
            value[:] = content
        else:
            value.clear()
            value.update(content)
