"""The compiled loops, made once: half of them by each worker, and read from disk by all."""

import copy
import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

import anybatch
from method_cases import NAMES, SAMPLED, UNPOOLED, make, step

MANY = 1000  # tests from which on it is worth while
# Two parts of the loops, which share little.
OTHERS = [*SAMPLED, *UNPOOLED]
PARTS = {"rules": [name for name in NAMES if name not in OTHERS], "others": OTHERS}


def compile_loops(names: Sequence[str]) -> None:
    """Run methods once, so that their loops of float32 are on disk."""
    x = torch.randn(4, 6, 3, 3)
    for name in names:
        layer = make(name)
        for form in (torch.contiguous_format, torch.channels_last):
            step(layer, x.to(memory_format=form))
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    for method in {"mabn", "cbn"}.intersection(names):  # centred weights, gradients of statistics
        converted = anybatch.convert(copy.deepcopy(net), method)
        for _ in range(2):
            step(converted, x)


def share_compilation(tests: int) -> None:
    """Compile, of two parts of the loops, the one that is this worker's, and wait for the other.

    Args:
        tests: How many the worker has collected.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if tests < MANY or not worker or find_spec("numba") is None:
        return
    number, run = int(worker.removeprefix("gw")), os.environ["PYTEST_XDIST_TESTRUNUID"]
    folder = Path(tempfile.gettempdir()) / f"anybatch-tests-{run}"
    folder.mkdir(exist_ok=True)
    for part in sorted(PARTS, reverse=number % 2 == 0):
        with FileLock(folder / f"{part}.lock"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile_loops(PARTS[part])
