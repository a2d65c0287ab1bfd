"""Kernels that serve only where they agree with torch's operators, tried before their first batch.

The outcome is remembered in this process, and an agreement also on disk, by device, driver,
versions and sources. Kernels that disagree or fail are named in one warning, and torch's operators
serve in their place.
"""

import contextlib
import hashlib
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch.backends.protocol import Backend, KernelFailure, Kernels, NormCall
from anybatch.core.files import write_json
from anybatch.core.kernel_trial import first_line, try_kernels, twin_of

LENGTHS = tuple(3 << i for i in range(2, 24))  # positions of an example of a trial

_Key = tuple[str, torch.device, str]
_faults: dict[_Key, str | None] = {}  # None: they agree


def fault_of(backend: Backend, call: NormCall, x: Tensor, layer: Any) -> str | None:
    """Give the reason why kernels must not serve a batch; try them if this device has not yet.

    Args:
        backend: The backend.
        call: How the layer would go through the batch.
        x: The batch.
        layer: The layer.
    """
    kernels = None if _is_tried(layer) else backend.kernels(call, x)
    if kernels is None:
        return None
    key = backend.name, x.device, kernels.name
    if key not in _faults:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "its kernels were not tried yet: run a batch before a CUDA graph is captured"
        known = _file_of(kernels)
        if known is not None and known.is_file():
            _faults[key] = None
        else:
            _try(backend, call, x, layer, key, known)
    return _faults[key]


def refuse(backend: Backend, call: NormCall, x: Tensor, layer: Any, failure: KernelFailure) -> None:
    """Let torch's operators serve from now on what kernels have failed at.

    Raises:
        KernelFailure: If they are being tried.
    """
    kernels = None if _is_tried(layer) else backend.kernels(call, x)
    if kernels is None:
        raise failure
    layer.forget_plans()
    _refuse((backend.name, x.device, kernels.name), str(failure))


def forget() -> None:
    """Forget what this process knows of all kernels."""
    _faults.clear()


def _is_tried(layer: Any) -> bool:
    return "asked" in vars(layer)


def _try(
    backend: Backend, call: NormCall, x: Tensor, layer: Any, key: _Key, known: Path | None
) -> None:
    shape, last = _small(backend, call, x, key[2]), not x.is_contiguous()
    try:
        errors, fault = try_kernels(partial(twin_of, layer), backend, shape, x, last)
    except Exception as error:  # such as no memory left, or a layer that cannot be copied
        fault = f"they could not be tried, {type(error).__name__}: {first_line(error)}"
    if fault is not None:
        _refuse(key, fault)
        return
    _faults[key] = None
    if known is not None:
        _keep(known, {"kernels": key[2], "shape": shape, "errors": errors})


def _refuse(key: _Key, fault: str) -> None:
    backend, device, kernels = key
    if _faults.get(key) is not None:
        return
    _faults[key] = f"its kernels failed beside torch's operators on {device} ({fault})"
    warnings.warn(
        f"{backend}: on {device} the kernels of {kernels} do not give what torch's operators give "
        f"({fault}); torch's operators serve in their place. `anybatch check` tries all kernels "
        "and writes a report",
        RuntimeWarning,
        stacklevel=2,
    )


def _small(backend: Backend, call: NormCall, x: Tensor, kernels: str) -> tuple[int, ...]:
    """The shape of the smallest batch of as many examples that the same kernels serve."""
    channels_last = not x.is_contiguous()
    for length in LENGTHS:
        if length >= x.shape[2:].numel():
            break
        shape = (*x.shape[:2], *(1,) * (x.dim() - 3), length)
        like = x.new_empty(shape)
        if channels_last:
            like = x.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        found = backend.kernels(call, like)
        if found is not None and found.name == kernels:
            return shape
    return tuple(x.shape)


def _file_of(kernels: Kernels) -> Path | None:
    """The file that says that kernels agree on a device; None where nothing is kept."""
    if kernels.identity is None:
        return None
    digest = hashlib.sha256(repr(kernels).encode()).hexdigest()[:24]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anybatch" / "kernels" / f"{digest}.json"


def _keep(path: Path, content: dict[str, Any]) -> None:
    """Write a file; where that fails, the kernels are tried again in the next process."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
