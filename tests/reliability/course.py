"""A training that saves itself as it goes, in processes that may be killed at any moment.

Everything in it has a memory: weights, momenta, layers, three schedules, a gradient scaler, two
generators of random numbers, gradients of half a step. What is resumed is built from another seed
than what was killed, so that all of it has to come from the checkpoint.
"""

import multiprocessing as mp
import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.core.files import write_whole

# Short memories, so that a few steps cross every boundary; the rest is read from the first batch.
OPTIONS: dict[str, dict[str, Any]] = {
    "mabn": {"window": 3, "warmup_steps": 3, "renorm_warmup_steps": 5, "centralize": True},
    "brn": {"warmup_steps": 3},
    "ghost": {"ghost_size": 2},
    "bgn": {"num_groups": 4},
    **{name: {"ratio": 1 / 2} for name in ("ns", "bs", "fs", "points", "fs+vdn", "bs+vdn")},
}
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH, EPOCH = 4, 3  # examples in a forward, optimizer steps in an epoch


@dataclass(frozen=True)
class Course:
    """A training.

    Attributes:
        method: Short name.
        precision: "float32", or what autocast takes; float16 with a gradient scaler.
        accumulate: Forwards in an optimizer step.
        norm_batch_size: Examples that share statistics.
        ranks: Processes, in DistributedDataParallel if there is more than one.
        steps: Optimizer steps.
        save_every: Forwards between checkpoints; they may fall into a step.
    """

    method: str
    precision: str = "float32"
    accumulate: int = 1
    norm_batch_size: int | None = None
    ranks: int = 1
    steps: int = 18
    save_every: int = 3

    @property
    def forwards(self) -> int:
        return self.steps * self.accumulate

    def is_refused(self) -> bool:
        """Whether anybatch refuses the combination."""
        method = anybatch.METHODS[self.method]
        if self.accumulate > 1 and (method.builder or self.method in ("l1", "range")):
            return True
        return self.norm_batch_size is not None and bool(method.builder or method.wraps)


class Training:
    """What a process trains with."""

    def __init__(self, course: Course, rank: int, seed: int) -> None:
        torch.manual_seed(seed)
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 36, 4),
        )
        options = dict(OPTIONS.get(course.method, {}))
        if course.norm_batch_size is not None:
            options["norm_batch_size"] = course.norm_batch_size
        model = anybatch.convert(model, course.method, **options)
        if anybatch.METHODS[course.method].wraps:
            model = anybatch.VirtualDataset(model, [0.1] * 3, [1.0] * 3)
        if course.accumulate > 1:
            anybatch.accumulate(model, course.accumulate)
        self.course, self.rank, self.model = course, rank, model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, course.steps)
        self.progress = anybatch.NormScheduler(model, -(-course.steps // EPOCH))
        # It overflows at first, and grows again and again: steps are skipped.
        self.scaler = torch.amp.GradScaler(
            "cpu", 2.0**24, growth_interval=3, enabled=course.precision == "float16"
        )
        self.data = torch.Generator().manual_seed(seed + rank)
        self.losses: list[Tensor] = []

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rate": self.rate.state_dict(),
            "progress": self.progress.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": [p.grad for p in self.model.parameters()],
            "data": self.data.get_state(),
            "random": torch.get_rng_state(),
            "losses": self.losses,
        }

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.progress.load_state_dict(state["progress"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])
        self.scaler.load_state_dict(state["scaler"])
        for parameter, gradient in zip(self.model.parameters(), state["gradients"], strict=True):
            parameter.grad = gradient
        self.data.set_state(state["data"])
        torch.set_rng_state(state["random"])
        self.losses = state["losses"]

    def forward_and_backward(self, replica: nn.Module, number: int) -> None:
        """One forward of a micro-batch, one backward, and the step if it is the last."""
        course = self.course
        last = (number + 1) % course.accumulate == 0
        x = torch.randn(BATCH, 3, 8, 8, generator=self.data) * (1 + self.rank) + 0.1
        y = torch.randint(4, (BATCH,), generator=self.data)
        alone = course.ranks > 1 and not last
        with replica.no_sync() if alone else nullcontext():  # type: ignore[operator]
            kind = AUTOCAST.get(course.precision, torch.bfloat16)
            with torch.autocast("cpu", kind, enabled=course.precision != "float32"):
                loss = F.cross_entropy(replica(x).float(), y) / course.accumulate
            self.scaler.scale(loss).backward()
        self.losses.append(loss.detach())
        if last:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.rate.step()
            if (number + 1) // course.accumulate % EPOCH == 0:
                self.progress.step()


def checkpoint(folder: Path, rank: int, number: int) -> Path:
    return folder / f"rank{rank}-{number:04d}.pt"


def newest(course: Course, folder: Path) -> int | None:
    """Forwards done in the last checkpoint that every process has written."""
    numbers = range(course.save_every, course.forwards, course.save_every)
    whole = [
        number
        for number in numbers
        if all(checkpoint(folder, rank, number).is_file() for rank in range(course.ranks))
    ]
    return whole[-1] if whole else None


def enter(course: Course, folder: Path, rank: int, store: str, teller: Connection) -> None:
    """The life of a process: go on where the last one was killed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = newest(course, folder)
    if course.ranks > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=course.ranks)
    training = Training(course, rank, seed=0 if start is None else 1 + start)
    if start is not None:
        training.load(checkpoint(folder, rank, start))
    replica: nn.Module = training.model
    if course.ranks > 1:
        drawn = torch.get_rng_state()
        replica = nn.parallel.DistributedDataParallel(training.model)
        torch.set_rng_state(drawn)
    for number in range(start or 0, course.forwards):
        training.forward_and_backward(replica, number)
        teller.send_bytes(b".")
        if (number + 1) % course.save_every == 0:
            path = checkpoint(folder, rank, number + 1)
            write_whole(path, partial(torch.save, training.state()))
    write_whole(folder / f"result{rank}.pt", partial(torch.save, training.state()))
    if course.ranks > 1:
        dist.barrier()
    os._exit(0)  # torch's threads may abort an interpreter that takes its leave


# --- the processes ---------------------------------------------------------------------


def context() -> Any:
    """Processes that begin with everything imported, and nothing else."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["reliability.warm"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return found


def run(course: Course, folder: Path, kill: tuple[int, int, float] | None = None) -> bool:
    """Start the processes of a training, and wait for their end, or bring it about.

    Args:
        course: The training.
        folder: Of its checkpoints and its result.
        kill: Which process is killed, after how many forwards, and how many seconds after that.

    Returns:
        Whether the kill struck before the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fork, store = context(), str(folder / f"store{time.monotonic_ns()}")
    processes, listeners = [], []
    for rank in range(course.ranks):
        listener, teller = fork.Pipe(duplex=False)
        process = fork.Process(target=enter, args=(course, folder, rank, store, teller))
        process.start()
        teller.close()
        processes.append(process)
        listeners.append(listener)
    try:
        if kill is not None:
            victim, forwards, seconds = kill
            try:
                for _ in range(forwards):
                    listeners[victim].recv_bytes()
            except EOFError:  # it reached its end before
                pass
            time.sleep(seconds)
            processes[victim].kill()
            processes[victim].join()
            return bool(processes[victim].exitcode == -signal.SIGKILL)
        for process in processes:
            process.join(300)
            assert process.exitcode == 0, process.exitcode
        return False
    finally:
        for process in processes:  # as a launcher does when one of a group is gone
            process.kill()
            process.join()
        for listener in listeners:
            listener.close()


def kill_and_compare(course: Course, folder: Path, kills: int, seed: int) -> int:
    """Kill a training again and again, and let it end: its numbers are those of a whole one.

    Args:
        course: The training.
        folder: An empty one.
        kills: How often.
        seed: Of who is killed, and when.

    Returns:
        Kills that struck before the end, all survived.
    """
    run(course, folder / "whole")
    chance, struck = random.Random(f"{seed}/{course}"), 0
    for _ in range(kills):
        victim, forwards = chance.randrange(course.ranks), chance.randint(1, 8)
        struck += run(course, folder / "killed", (victim, forwards, chance.random() * 0.005))
    run(course, folder / "killed")
    for rank in range(course.ranks):
        whole, killed = (
            torch.load(folder / name / f"result{rank}.pt", weights_only=True)
            for name in ("whole", "killed")
        )
        assert_equal(whole, killed, f"rank {rank}")
    return struck


def assert_equal(one: Any, other: Any, where: str) -> None:
    """That two nests of plain data and tensors are equal bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where}: {(one - other).abs().max()} apart"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}, {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}, {number}")
    else:
        assert one == other, where
