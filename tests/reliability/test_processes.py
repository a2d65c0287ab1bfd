"""Faults in a group of processes: an error in bounded time that names the layer, never a hang."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import anybatch
from processes import spawn

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]
LIMIT = 60.0  # seconds that an error may take to come, with a timeout of 5
SILENT = r"BatchNorm2d\(8\): a process of its group did not answer"


def network(method: str = "sync", **options: object) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    return anybatch.convert(plain, method, **options)


def train(model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(2, 3, 6, 6)).sum().backward()


def _silent(rank: int, where: str) -> None:
    model = network()
    train(model, 2)
    if rank == 1:
        if where == "backward":
            model(torch.randn(2, 3, 6, 6))
        if where == "late":
            time.sleep(15)
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=SILENT):
        train(model, 1)
    assert time.monotonic() - start < LIMIT
    os._exit(0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("where", ["forward", "backward", "late"])
def test_a_process_that_dies_or_is_late(where: str) -> None:
    spawn(_silent, where, timeout=5)


def _disagree(rank: int, case: str) -> None:
    models = {
        "method": [network(), network("mabn", process_group="world")],
        "options": [network("fs", process_group="world", ratio=r, seed=0) for r in (0.25, 0.5)],
    }
    model = models[case][rank]
    with pytest.raises(ValueError, match="the processes disagree on a layer; here it is"):
        train(model, 1)
    dist.barrier()  # both are in step after it
    assert all(int(b) == 0 for n, b in model.named_buffers() if n.endswith("tracked"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["method", "options"])
def test_processes_that_disagree_are_told(case: str) -> None:
    spawn(_disagree, case, timeout=20)


def _fewer_layers(rank: int) -> None:
    """One process synchronizes a layer that the other does not."""
    model = network()
    if rank == 1:
        model[3].process_group = None
    train(model, 5)


@pytest.mark.exhaustive
def test_a_process_with_fewer_layers() -> None:
    """Collectives that do not belong together fail at once; gloo may abort its process by that."""
    start = time.monotonic()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        spawn(_fewer_layers, timeout=5)
    assert time.monotonic() - start < LIMIT


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
import anybatch

folder = Path(sys.argv[1])
torch.set_num_threads(1)
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
# The launcher's own store may still hold the addresses of the attempt before, to gloo's harm.
store = f"file://{folder.resolve()}/store{attempt}"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
model = anybatch.convert(model, "mabn", window=3, warmup_steps=2, process_group="world")
optimizer = torch.optim.SGD(model.parameters(), 0.05)
saved, first = folder / f"{rank}.pt", 0
if saved.exists():
    state = torch.load(saved, weights_only=True)
    first = state["step"]
    model.load_state_dict(state["model"])
for step in range(first, 10):
    if step == 6 and rank == 1 and attempt == 0 and len(sys.argv) > 2:
        os._exit(1)
    generator = torch.Generator().manual_seed(10 * step + rank)
    loss = model(torch.randn(3, 4, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    optimizer.step()
    torch.save({"step": step + 1, "model": model.state_dict()}, f"{saved}.new")
    os.replace(f"{saved}.new", saved)
    dist.barrier()
dist.barrier()
os._exit(0)
"""


@pytest.mark.exhaustive
def test_an_elastic_launch_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """A process is killed in a step; all are started again, and end where no fault leads."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ends = []
    for name, dies in (("whole", []), ("restarted", ["dies"])):
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--max-restarts", "1", str(script), str(folder), *dies]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        ends.append([torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)])
    for one, other in zip(*ends, strict=True):
        assert one["step"] == other["step"] == 10
        for key, value in one["model"].items():
            assert torch.equal(value, other["model"][key]), key
