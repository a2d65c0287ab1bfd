"""A context that restores a network to the state it had before."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from anybatch.conversion.module_swap import unwrapped
from anybatch.conversion.observe import restored
from anybatch.core.norm_layer import NormLayer

Undo = Callable[[], None]


@contextmanager
def borrowed(model: nn.Module, training: bool | None = None) -> Iterator[nn.Module]:
    """A context that leaves a network, and random numbers, as they were before it.

    Kept are all modules' attributes, modes, hooks and buffers (values and identity),
    the norms' memory, the gradients of the parameters, and the states of Python's,
    NumPy's and torch's random numbers. Whatever ends the context, all of it is put
    back. The parameters' values, which nothing here changes, are not kept.

    Args:
        model: The network.
        training: Mode inside the context (default None: each module as it is).

    Yields:
        The network inside ``torch.compile``, ``DistributedDataParallel`` or
        ``DataParallel``: what is compiled does not see hooks that come later, and
        what is distributed would synchronize in forwards that need none.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with borrowed(norm, training=True) as model:
        ...     _ = model(torch.randn(8, 2))
        >>> norm.num_batches_tracked.item()
        0
    """
    inner, _ = unwrapped(model)
    if any(tensor.is_meta for tensor in (*inner.parameters(), *inner.buffers())):
        raise ValueError(
            "model: it has tensors on the meta device, which have no values; load it first"
        )
    memory = [
        (tensor, tensor.clone())
        for module in inner.modules()
        if isinstance(module, NormLayer)
        for tensor in (
            *module.method_state.values(),
            *(tensor for other in module.further_memories for _, tensor in other.moved()),
        )
    ]
    gradients = [
        (p, p.grad, None if p.grad is None else p.grad.clone()) for p in inner.parameters()
    ]
    put_back = random_numbers(inner)
    try:
        with restored(model):
            if training is not None:
                inner.train(training)
            yield inner
    finally:
        with torch.no_grad():
            for tensor, before in memory:
                tensor.copy_(before)
            for parameter, gradient, value in gradients:
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
        put_back()


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """A context that leaves all modules in training or evaluation mode as it found them."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def random_numbers(model: nn.Module) -> Undo:
    """Note the states of all random numbers that a network's forward may draw.

    The result is a function that puts them back, as often as it is called.

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
