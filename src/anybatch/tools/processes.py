"""Work in several processes, and locks between them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

from filelock import FileLock, Timeout

from anybatch.tools.training import OnEpoch, Row

OnProgress = Callable[[str, int, Row | None], None]


Work = Callable[[Any, Path, OnEpoch], Row]


def in_processes(
    runs: Sequence[Any], folder: Path, workers: int, on_progress: OnProgress, work: Work
) -> dict[str, Row]:
    """Do the same with each of the runs, in order, in processes of one thread each.

    Each run has a ``key`` that no other has. `work` is called in a process with a run, the folder
    and what to call after each epoch; it gives the result. `on_progress` is called with a run's
    key, the epochs done, and its result at the end.

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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides


def _end_with_parent() -> None:
    """Leave nothing behind that works on where the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Work, run: Any, folder: Path) -> Row:
    def tell(epochs: int, _: Row) -> None:
        if _news is not None:
            _news.put((run.key, epochs))

    return work(run, folder, tell)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process; two that write the same runs would undo each other's work.

    The lock ends with the process, even one that is killed.

    Raises:
        ValueError: If another process holds it.
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"output={str(folder)!r}: another process is at work in it; wait for it, or "
            "give another folder with --output"
        ) from error
