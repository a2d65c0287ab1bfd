"""Memory of a call: what it keeps for a backward pass, and the most that it holds at a time."""

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def kept_bytes(call: Callable[[], Any], own: Iterable[Tensor] = ()) -> int:
    """Memory that a forward keeps for its backward.

    Each storage counts once, whole, however many tensors are views of it.

    `own` are tensors that do not count, parameters and state for example.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> kept_bytes(lambda: x.exp())  # exp keeps what it puts out
        4000
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes: dict[int, int] = {}
    alive = []  # or its address might be given to the next

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = call()
    del held
    return sum(sizes.values())


def peak_bytes(call: Callable[[], Any], device: str | torch.device = "cpu") -> int | None:
    """The most memory that a call holds at a time, beyond what there was before.

    Args:
        call: What to watch.
        device: Where it works. On a CUDA device the allocator is asked; on a CPU torch's profiler
            lists what was taken and given back.

    Returns:
        Bytes that torch's allocator gave; None where nothing can be asked.

    Example:
        >>> peak_bytes(lambda: torch.empty(1000) + torch.empty(1000))
        12000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        return _host_peak(call)
    return None


def tensors_of(module: torch.nn.Module) -> tuple[Tensor, ...]:
    """Parameters and buffers of a network, and what its layers remember."""
    remembered = (getattr(m, "method_state", None) for m in module.modules())
    more = (t for found in remembered if isinstance(found, dict) for t in found.values())
    return (*module.parameters(), *module.buffers(), *filter(torch.is_tensor, more))


def _host_peak(call: Callable[[], Any]) -> int | None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of its start and its end
    activity = torch.profiler.ProfilerActivity.CPU
    gc.collect()  # what others left behind is given back before, and not meanwhile
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        call()
    results = getattr(profile.profiler, "kineto_results", None)
    if results is None:
        return None
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
