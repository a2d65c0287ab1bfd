"""Processes killed at random moments: a run that goes on gives the numbers of a whole one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anybatch.registry import METHODS
from anybatch.tools.run import Run
from anybatch.tools.training import train
from papers.studies.faults import REMEMBERING
from reliability.course import Course, kill_and_compare

KILLS = "kills"  # a property of tests, which the summary adds up
CODE = """
import json, sys, torch
from pathlib import Path
from anybatch.tools.run import Run
from anybatch.tools.training import train
torch.set_num_threads(1)
print("ready", flush=True)
run = Run.from_dict(json.loads(sys.argv[1]))
train(run, Path(sys.argv[2]), lambda *_: print("epoch", flush=True), keep_weights=True)
"""


def start(run: Run, folder: Path) -> subprocess.Popen:
    arguments = [json.dumps(run.as_dict()), str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], stdout=subprocess.PIPE, text=True
    )


def kill_and_go_on(run: Run, folder: Path, kills: int, seed: int) -> int:
    """Kill a run again and again at random moments; how many struck before its end."""
    chance, struck = random.Random(seed), 0
    for _ in range(kills):
        process = start(run, folder)
        assert process.stdout is not None
        for _ in range(chance.randint(1, 3)):
            process.stdout.readline()
        time.sleep(chance.random() * 0.1)
        struck += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    process = start(run, folder)
    assert process.communicate(timeout=300)[0].startswith("ready")
    assert process.returncode == 0
    return struck


def result(run: Run, folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    path = folder / "runs" / f"{run.key}.json"
    epochs = [{**row, "seconds": 0} for row in json.loads(path.read_text())["epochs"]]
    return epochs, torch.load(path.with_suffix(".pt"), weights_only=True)["model"]


def check(run: Run, folder: Path, kills: int, seed: int) -> int:
    """Kills that struck, all survived."""
    torch.set_num_threads(1)
    train(run, folder / "whole", keep_weights=True)
    struck = kill_and_go_on(run, folder / "killed", kills, seed)
    assert struck > 0
    (epochs, state), (other_epochs, other_state) = (
        result(run, folder / name) for name in ("whole", "killed")
    )
    assert epochs == other_epochs
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name
    names = {path.name for path in (folder / "killed" / "runs").iterdir()}
    assert names == {f"{run.key}.json", f"{run.key}.pt"}
    return struck


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["mbn", "mabn"])
def test_a_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, method: str, record_property: Callable[[str, object], None]
) -> None:
    run = Run(method=method, epochs=5, train_size=200)
    record_property(KILLS, check(run, tmp_path, kills=2, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 4, "batch_size": 8},
        {"norm_batch_size": 2, "batch_size": 16},
        {"precision": "bfloat16"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("method", [*REMEMBERING, "bgn"])
def test_every_method_goes_on_bit_for_bit(
    tmp_path: Path,
    method: str,
    options: dict,
    seed: int,
    record_property: Callable[[str, object], None],
) -> None:
    if "accumulate" in options and method in ("l1", "range"):
        pytest.skip("their spreads do not pool: accumulate refuses them")
    run = Run(method=method, epochs=5, train_size=200, **options)
    record_property(KILLS, check(run, tmp_path, kills=4, seed=seed))


# --- a loop of one's own -----------------------------------------------------------------

KINDS: dict[str, dict] = {
    "plain": {},
    "accumulate": {"accumulate": 4},
    "norm_batch_size": {"norm_batch_size": 2},
    "bfloat16": {"precision": "bfloat16"},
    "float16 with a scaler": {"precision": "float16"},
    "accumulate, float16 with a scaler": {"accumulate": 2, "precision": "float16"},
    "two processes": {"ranks": 2},
    "two processes, accumulate": {"ranks": 2, "accumulate": 4},
    "two processes, norm_batch_size": {"ranks": 2, "norm_batch_size": 2},
    "two processes, float16 with a scaler": {"ranks": 2, "precision": "float16"},
}


@pytest.mark.exhaustive
@pytest.mark.dist
@pytest.mark.parametrize("kind", ["accumulate, float16 with a scaler", "two processes, accumulate"])
@pytest.mark.parametrize("method", ["mabn", "fs+vdn"])
def test_a_killed_training_goes_on_bit_for_bit(
    tmp_path: Path, method: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    struck = kill_and_compare(Course(method, **KINDS[kind]), tmp_path, kills=3, seed=0)
    assert struck > 0
    record_property(KILLS, struck)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_killed_training_goes_on_bit_for_bit(
    tmp_path: Path, method: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    course = Course(method, **KINDS[kind])
    if course.is_refused():
        pytest.skip("anybatch refuses this combination")
    struck = 0
    for seed in range(3):
        struck += kill_and_compare(course, tmp_path / str(seed), kills=4, seed=seed)
    assert struck > 0
    record_property(KILLS, struck)


WORKERS = """
import os, sys, time
from pathlib import Path
from anybatch.tools.processes import in_processes

class Job:
    key = "one"

def work(job, folder, tell):
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(100)

if __name__ == "__main__":
    in_processes([Job()], Path(sys.argv[1]), 1, lambda *_: None, work)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(WORKERS)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "start.py"), str(tmp_path)])
    end = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    worker = int((tmp_path / "pid").read_text())
    assert is_running(worker)
    parent.kill()
    parent.wait()
    while is_running(worker):
        assert time.monotonic() < end
        time.sleep(0.1)
