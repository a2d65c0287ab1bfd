"""The backend of Triton's kernels on a GPU."""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anybatch.backends import choice
from anybatch.backends.layout import PLAIN_TYPES, dense, is_channels_last
from anybatch.backends.native_memory import check_device_memory
from anybatch.backends.protocol import KernelFailure, Kernels, NormCall, Rows, Statistics
from anybatch.backends.tracing import is_traced

WIDEST = 256  # channels in a group of channels, at most
DEVICES = ("cuda",)  # the tests' interpreter is on a CPU
TYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


class TritonBackend:
    """Triton's kernels."""

    name = "triton"
    takes_relu: frozenset[str] = frozenset()
    takes_scopes: frozenset[str] = frozenset()

    def supports(self, call: NormCall, x: Tensor, rows: Rows) -> str | None:
        return memory_obstacle(x, rows) or spec_obstacle(call, x)

    def memory_obstacle(self, x: Tensor, rows: Rows) -> str | None:
        return memory_obstacle(x, rows)

    def kernels(self, call: NormCall, x: Tensor) -> Kernels | None:
        from anybatch.backends.triton.identity import kernels_of

        return kernels_of(_placed(call, x), x)

    def prepare(self, call: NormCall, x: Tensor) -> NormCall:
        return _placed(call, x)._replace(work=_Work(kernels_on(x.device)))

    def forward(
        self,
        call: NormCall,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        state: tuple[Any, ...],
        relu: bool,
    ) -> tuple[Tensor, tuple[Tensor | None, ...], Any]:
        tensors = (*state, *call.spec.tensors())
        check_device_memory(x.device, weight, bias, *tensors)
        y, applied = call.work.run("forward", tensors, x, weight, bias, state, call)
        return y, (), (applied, state[2])

    def backward(
        self,
        call: NormCall,
        context: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        dy, x = dense(dy, call.last, x.dtype), dense(x, call.last)
        state = (*context, call, needs[0])
        dx, (db, dw) = call.work.run("backward", call.spec.tensors(), dy, x, weight, *state)
        dx_or_none = dx if needs[0] else None
        return dx_or_none, dw if needs[1] else None, db if needs[2] else None, None

    def statistics(self, call: NormCall, context: Any, like: Tensor) -> list[Statistics]:
        applied = context[0]
        return [call.spec.statistics(applied if applied.shape[1] > 1 else applied[:, 0])]


class _Work:
    """The launcher of a plan's kernels, and whether they have run before."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.block_counters: dict[torch.device, Tensor] = {}  # copies of a layer share a plan
        self.ran: set[tuple[str, torch.device]] = set()

    def run(self, name: str, state: tuple[Tensor, ...], *args: Any) -> Any:
        """Launch; what fails the first time leaves state as it was.

        Raises:
            KernelFailure: If the kernels cannot be compiled or launched.
        """
        device, launch = args[0].device, getattr(self.kernels, name)
        if (name, device) in self.ran:
            return launch(*args, self.block_counters[device])
        self.block_counters[device] = args[0].new_zeros((), dtype=torch.int64)
        before = [tensor.clone() for tensor in state]
        try:
            found = launch(*args, self.block_counters[device])
        except Exception as error:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise KernelFailure(f"{name}: {type(error).__name__}: {error}") from error
        self.ran.add((name, device))
        return found


def _placed(call: NormCall, x: Tensor) -> NormCall:
    """The call for batches that lie in memory like this one."""
    return call._replace(last=x.shape[2:].numel() == 1 or not x.is_contiguous())


def memory_obstacle(x: Tensor, rows: Rows) -> str | None:
    """Why a batch and the rows of its layer are not memory that kernels of a GPU can take."""
    device = x.device
    if device.type not in DEVICES:
        return f"an input on {device.type}, not a CUDA device"
    if choice.selected == "never":
        return "use_fused('never')"
    if is_traced():
        return "a compiler, tracer or transform has to see torch's operators"
    if type(x) is not Tensor:
        return f"an input of class {type(x).__name__}, not torch.Tensor"
    dtype = TYPES.get(x.dtype)
    if dtype is None:
        return f"an input of {x.dtype}"
    for row in rows:
        if row is None:
            return "no weight and bias, or no running statistics"
        if type(row) not in PLAIN_TYPES:
            return f"weight, bias or running statistics of class {type(row).__name__}"
        if row.dtype != dtype or row.device != device or not row.is_contiguous():
            return f"weight, bias or running statistics are not contiguous {dtype} on {device}"
    if x.is_neg() or not (x.is_contiguous() or is_channels_last(x)):
        return "an input with gaps in memory"
    return device_obstacle(device)


def spec_obstacle(call: NormCall, x: Tensor) -> str | None:
    """Why the kernels do not take a method, whatever the batch."""
    if call.spec.family != "rule":
        return f"the kernels take rules, not a method of the family {call.spec.family!r}"
    if x.shape[1] > call.num_statistics * WIDEST:
        return f"groups of more than {WIDEST} channels"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why there are no kernels for a device."""
    if device.type == "cuda" and not _is_able(device):
        return "a GPU older than Ampere, or AMD's"
    return None if _kernels() is not None else "triton is not installed"


def kernels_on(device: torch.device) -> ModuleType | None:
    """The module that launches kernels, where a device is one of theirs."""
    if device.type not in DEVICES or device_obstacle(device) is not None:
        return None
    return _kernels()


@lru_cache(maxsize=64)
def _is_able(device: torch.device) -> bool:
    """Whether a device is one that the kernels were written for: Ampere and later."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from anybatch.backends.triton import steps
    except ImportError:
        return None
    return steps
