"""Triton's interpreter: the GPU kernels run on a CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

if not torch.cuda.is_available():
    # Triton asks once, when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = "anybatch.backends.triton.backend.DEVICES"
TRIALS = "anybatch.core.dispatch.fault_of"  # which `tests/core/test_kernel_guard.py` tests


def _index(tensor: Any) -> int:
    return int(tensor.handle.data.item())


@contextmanager
def cpu_batches_take_gpu_kernels() -> Iterator[None]:
    """Batches on a CPU take the GPU kernels; numpy's numbers of one element may count."""
    import pytest
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any = None) -> None:
        patch_tensor(*((tensor,) if scope is None else (tensor, scope)))
        if scope is None:
            tensor.__index__ = _index
        else:
            scope.set_attr(tensor, "__index__", _index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        patch.setattr(DEVICES, ("cpu",))
        patch.setattr(TRIALS, lambda *_: None)
        yield
