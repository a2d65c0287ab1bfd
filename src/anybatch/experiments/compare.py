"""Methods side by side: the runs, in several processes, and the table they make."""

import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any, Protocol, TypeVar

from anybatch.experiments.config import BASELINE, Option, Run, classified
from anybatch.experiments.files import exclusive
from anybatch.experiments.training import OnEpoch, Row, stored_result, train
from anybatch.registry import get_method

# Those for the small batches of the default setting; a sample of these is smaller still.
DEFAULT_METHODS = ("bn", "gn", "mbn", "mabn", "cbn", "brn", "ghost", "bgn")
OnProgress = Callable[[str, int, Row | None], None]


class Keyed(Protocol):
    """What has files of its own."""

    @property
    def key(self) -> str:
        """A name for them, unlike that of all others."""
        ...


Job = TypeVar("Job", bound=Keyed)
Work = Callable[[Job, Path, OnEpoch], Row]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        base: The setting that all runs share; its method is not used.
        methods: Short names, at the base's batch size.
        seeds: One run each.
        target_batch_size: Of the batch norm that shows what can be reached.
        options: Of each method.
        centralize: Centralize weights before norms, whatever the method.
    """

    base: Run
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    target_batch_size: int = 32
    options: tuple[tuple[str, tuple[Option, ...]], ...] = ()
    centralize: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods=(): give one or more")
        if not self.seeds:
            raise ValueError("seeds=(): give one or more")
        for name in self.methods:
            if name == BASELINE:
                raise ValueError("methods: torch's batch norm is the baseline of every comparison")
            get_method(name)
        classified(self.base)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: give each once")
        if self.target_batch_size < 1:
            raise ValueError(f"target_batch_size={self.target_batch_size}: give 1 or more")

    def groups(self) -> dict[str, list[Run]]:
        """The runs, by row of the table: the target, the baseline, then each method."""
        base = self.base.but(options=())
        large = {"batch_size": self.target_batch_size, "norm_batch_size": None, "accumulate": 1}
        target = base.but(method=BASELINE, **large)
        if base.norm_batch_size is not None:  # the same steps, with larger statistics
            size = min(self.target_batch_size, base.batch_size)
            whole = size == base.batch_size
            target = base.but(method="bn", norm_batch_size=None if whole else size)
        baseline = base.but(method=BASELINE if base.norm_batch_size is None else "bn")
        rows = {"target": target, "baseline": baseline}
        for name in self.methods:
            own = dict(self.options).get(name, ())
            rows[name] = base.but(method=name, options=own, centralize=self.centralize)
        return {row: [run.but(seed=seed) for seed in self.seeds] for row, run in rows.items()}

    def runs(self) -> list[Run]:
        """Every run once, longest first so that no process is left with one at the end."""
        unique = {run.key: run for runs in self.groups().values() for run in runs}
        return sorted(unique.values(), key=lambda run: (run.batch_size, run.method != "mabn"))


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        row: "target", "baseline" or a method's name.
        run: One of its runs.
        accuracies: Of each seed, from 0 to 1.
        mean: Of the accuracies.
        spread: Their standard deviation; 0 for one seed.
        recovered: Share of the lost accuracy that is won back; None without a loss.
    """

    row: str
    run: Run
    accuracies: tuple[float, ...]
    mean: float
    spread: float
    recovered: float | None


def table(comparison: Comparison, results: dict[str, Row]) -> list[Line]:
    """The table of finished runs.

    Args:
        comparison: What was compared.
        results: Results by key.

    Returns:
        A line for the target, one for the baseline, then one a method.
    """
    groups = comparison.groups()
    accuracies = {
        row: tuple(float(results[run.key]["accuracy"]) for run in runs)
        for row, runs in groups.items()
    }
    means = {row: statistics.fmean(values) for row, values in accuracies.items()}
    lost = means["target"] - means["baseline"]
    return [
        Line(
            row,
            groups[row][0],
            values,
            means[row],
            statistics.stdev(values) if len(values) > 1 else 0.0,
            (means[row] - means["baseline"]) / lost if lost > 1e-9 else None,
        )
        for row, values in accuracies.items()
    ]


def run_all(
    comparison: Comparison, folder: Path, workers: int, on_progress: OnProgress
) -> dict[str, Row]:
    """Train all runs that are not finished, in several processes of one thread each.

    Args:
        comparison: What to compare.
        folder: Results are kept in it; a run that was stopped goes on.
        workers: Processes.
        on_progress: Called with a run's key, the epochs done, and its result at the end.

    Returns:
        Results by key.

    Raises:
        KeyboardInterrupt: After Ctrl-C; the processes are stopped first.
    """
    return train_runs(comparison.runs(), folder, workers, on_progress)


def train_runs(
    runs: list[Run], folder: Path, workers: int, on_progress: OnProgress
) -> dict[str, Row]:
    """Train those of the runs that are not finished, in order, in processes of one thread each.

    Args:
        runs: What to train, each once.
        folder: Results are kept in it; a run that was stopped goes on.
        workers: Processes.
        on_progress: Called with a run's key, the epochs done, and its result at the end.

    Returns:
        Results by key.

    Raises:
        KeyboardInterrupt: After Ctrl-C; the processes are stopped first.
    """
    results: dict[str, Row] = {}
    waiting: list[Run] = []
    for run in runs:
        row = stored_result(folder / "runs" / f"{run.key}.json", run)
        if row is None:
            waiting.append(run)
        else:
            results[run.key] = row
            on_progress(run.key, run.epochs, row)
    if waiting:
        results |= in_processes(waiting, folder, workers, on_progress, train)
    return results


def in_processes(
    runs: list[Job], folder: Path, workers: int, on_progress: OnProgress, work: Work[Job]
) -> dict[str, Row]:
    """Do the same with each of the runs, in order, in processes of one thread each.

    Args:
        runs: What to do it with, each once.
        folder: Where their results are kept.
        workers: Processes.
        on_progress: Called with a run's key, the epochs done, and its result at the end.
        work: Called in a process with a run, the folder and what to call after each epoch; it gives
            the result.

    Returns:
        Results by key.

    Raises:
        KeyboardInterrupt: After Ctrl-C; the processes are stopped first.
    """
    context = multiprocessing.get_context("spawn")
    news: Queue[tuple[str, int]] = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(runs)), context, _start_worker, (news,))
    results: dict[str, Row] = {}
    try:
        pending: dict[Future[Row], str] = {
            pool.submit(_work, work, run, folder): run.key for run in runs
        }
        while pending:
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for key, epochs in _drain(news):
                on_progress(key, epochs, None)
            for future in done:
                key = pending.pop(future)
                results[key] = future.result()
                on_progress(key, len(results[key]["epochs"]), results[key])
        pool.shutdown()
    except BaseException:
        processes = list(getattr(pool, "_processes", {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    return results


def _drain(news: "Queue[tuple[str, int]]") -> Iterator[tuple[str, int]]:
    while True:
        try:
            yield news.get_nowait()
        except Empty:
            return


_news: "Queue[tuple[str, int]] | None" = None


def _start_worker(news: "Queue[tuple[str, int]]") -> None:
    import torch

    global _news
    _news = news
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides


def _work(work: Work[Job], run: Job, folder: Path) -> Row:
    def tell(epochs: int, _: Row) -> None:
        if _news is not None:
            _news.put((run.key, epochs))

    return work(run, folder, tell)


class Busy(Exception):
    """A living process holds a lock.

    Attributes:
        process: Its number.
    """

    def __init__(self, process: str) -> None:
        super().__init__(f"process {process} is at work")
        self.process = process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process; two that write the same runs would undo each other.

    Args:
        folder: It holds the lock, a file with this process's number.

    Raises:
        ValueError: If a living process holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(holding(folder / ".lock"))
        except Busy as error:
            raise ValueError(
                f"output={str(folder)!r}: {error} in it; wait for it, or give another folder with "
                "--output"
            ) from error
        yield


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Hold a lock, a file with this process's number; it goes with a process that is killed.

    Args:
        lock: The file.

    Raises:
        Busy: If a living process holds it.
    """
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(lock.open("a+", encoding="utf-8"))
            try:
                stack.enter_context(exclusive(file, wait=False))
            except BlockingIOError as error:
                file.seek(0)
                raise Busy(file.read()) from error
            try:  # the last holder may have taken the file away after it was opened here
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    break
            except FileNotFoundError:
                pass
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        finally:
            lock.unlink(missing_ok=True)


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    import platform

    import torch

    import anybatch

    return {
        "anybatch": anybatch.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), None
    )


def _commit() -> str | None:
    """The commit of the source tree this runs from, with a mark where it was changed."""
    import subprocess

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
