"""Every test starts from the same random numbers, on one thread; kills are counted."""

import gc
import os
from typing import Any

import pytest
import torch

import compiled_loops
import selection

# What processes of a training import first: it computes as it is imported.
collect_ignore = ["reliability/warm.py"]

if not torch.cuda.is_available():
    # GPU kernels are tested in Triton's interpreter; Triton asks once, when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Else the compiler starts a process a core, each of which imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quick_types(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fast tests the loops serve float32 alone: to compile them takes minutes a type."""
    if request.node.get_closest_marker("exhaustive") is None:
        monkeypatch.setattr("anybatch.backends.numba.backend.TYPES", (torch.float32,))
        monkeypatch.setattr("anybatch.backends.numba.backend.LOW", ())


@pytest.fixture(autouse=True)
def _empty_compiler(request: pytest.FixtureRequest) -> None:
    """A compiler counts how often it compiles a function anew: each test from the start."""
    if "compile" in request.node.name:
        torch._dynamo.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a test's cases outside the fast set, and those whose pairs of values others have."""
    groups: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, group in groups.items():
        if group[0].get_closest_marker("every_case") is not None:
            continue
        cases = [{k: selection.key(v) for k, v in i.callspec.params.items()} for i in group]
        pairs = group[0].get_closest_marker("pairs")
        fast = selection.chosen(cases, test, pairs.args if pairs else ())
        few = group[0].get_closest_marker("few")
        if few is not None:
            fast = selection.some(fast, few.args[0], test)
        paired = selection.pairwise(cases, fast, test)
        if group[0].get_closest_marker("families") is not None:
            paired &= {*fast, *selection.of_families(cases, test)}
        for number, item in enumerate(group):
            if number not in fast:
                item.add_marker(pytest.mark.exhaustive)
            if number not in paired:
                item.add_marker(pytest.mark.combination)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile before the tests, each type in one worker alone; what is there is no garbage."""
    gc.collect()
    gc.freeze()  # or each measurement of memory, which collects, looks at all modules and tests
    compiled_loops.share_compilation(len(session.items))


def pytest_unconfigure() -> None:
    """Let the end of the process find all that it has to take down."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many trainings were killed, and how many of those went on to the same numbers."""
    tests = [r for r in terminalreporter.stats.get("passed", []) if r.when == "call"]
    kills = sum(value for r in tests for name, value in r.user_properties if name == "kills")
    if kills:
        failed = sum("killed" in r.nodeid for r in terminalreporter.stats.get("failed", []))
        terminalreporter.write_line(
            f"{kills} kills survived to the bit; {failed} trainings did not end in the same numbers"
        )
