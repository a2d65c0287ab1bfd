"""The compiled loops, made once: each type by one worker, and then read from disk by all."""

import copy
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

import anybatch
from method_cases import NAMES, make, step

TYPES = (torch.float32, torch.float64)
MANY = 1000  # tests from which on it is worth while


def compile_loops(dtype: torch.dtype) -> None:
    """Run every method once in a type, so that its loops are on disk."""
    x = torch.randn(4, 6, 3, 3, dtype=dtype)
    for name in NAMES:
        layer = make(name).to(dtype)
        for form in (torch.contiguous_format, torch.channels_last):
            step(layer, x.to(memory_format=form))
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    for method in ("mabn", "cbn"):  # centred weights, gradients of statistics
        converted = anybatch.convert(copy.deepcopy(net), method)
        for _ in range(2):
            step(converted, x)


def share_compilation(tests: int) -> None:
    """Compile, of two types, the one that is this worker's, and wait for the other.

    Args:
        tests: How many the worker has collected.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if tests < MANY or not worker or find_spec("numba") is None:
        return
    number, run = int(worker.removeprefix("gw")), os.environ["PYTEST_XDIST_TESTRUNUID"]
    folder = Path(tempfile.gettempdir()) / f"anybatch-tests-{run}"
    folder.mkdir(exist_ok=True)
    order = TYPES if number % 2 == 0 else TYPES[::-1]
    for dtype in order:
        with FileLock(folder / f"{dtype}.lock"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile_loops(dtype)
