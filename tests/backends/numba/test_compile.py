"""Compiled loops that are kept on disk compute what those that were just compiled do."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

MODULES = (
    "passes",
    "passes_relu",
    "passes_valid",
    "rules",
    "forward_loops",
    "backward_loops",
    "sampled",
    "sampled_passes",
    "spread",
    "spread_passes",
    "cross_iteration",
)
CODE = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from method_cases import NAMES, make
torch.set_num_threads(1)
for name in NAMES:
    for last in (False, True):
        torch.manual_seed(0)
        layer, digest = make(name, 16), hashlib.sha256()
        for shape in ((4, 16, 8, 8), (16, 16, 24, 24), (2, 16, 3, 3)):
            form = torch.channels_last if last else torch.contiguous_format
            x = torch.randn(shape).contiguous(memory_format=form).requires_grad_()
            y = layer(x)
            y.backward(torch.randn_like(y))
            tensors = y, x.grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()
            for tensor in tensors:
                digest.update(tensor.detach().contiguous().numpy().tobytes())
        print(name, last, digest.hexdigest())
"""


def test_what_is_kept_on_disk_calls_nothing_that_is() -> None:
    """A call from one to the other would depend on which process compiled it."""
    modules = [importlib.import_module(f"anybatch.backends.numba.{name}") for name in MODULES]
    compiled = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "py_func")
    }
    kept = {name for name, value in compiled.items() if not value.targetoptions.get("forceinline")}
    assert {"forward", "backward", "sampled_forward", "sampled_backward", "record"} <= kept
    for name, value in compiled.items():
        assert not kept & set(value.py_func.__code__.co_names), name


def test_what_is_kept_has_a_number_of_all_sources(tmp_path: Path) -> None:
    """Numba alone would go on with old loops after an upgrade that changed only what they call."""
    options = importlib.import_module("anybatch.backends.numba.compile")
    for module in ("forward_loops", "backward_loops", "sampled", "cross_iteration"):
        for value in vars(importlib.import_module(f"anybatch.backends.numba.{module}")).values():
            if hasattr(value, "py_func") and not value.targetoptions.get("forceinline"):
                assert options.SOURCES in value._cache._impl.filename_base
    (tmp_path / "a.py").write_text("from numba import njit\n1")
    (tmp_path / "b.py").write_text("from numba import njit\n2")
    first = options.fingerprint(tmp_path)
    assert options.fingerprint(tmp_path) == first
    (tmp_path / "b.py").write_text("from numba import njit\n3")
    assert options.fingerprint(tmp_path) != first


@pytest.mark.slow
def test_the_process_that_compiles_computes_what_later_ones_do(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(Path(__file__).parents[1])]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first.splitlines() == second.splitlines()
