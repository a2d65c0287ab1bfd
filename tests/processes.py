"""Work in several processes on this machine, over gloo."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


def spawn(
    work: Callable[..., None], *arguments: object, world_size: int = 2, timeout: float = 300
) -> None:
    """Run ``work(rank, *arguments)`` in each of several processes of one process group.

    Args:
        work: A function of a module; what it raises fails the test.
        *arguments: Passed on; they are pickled.
        world_size: Processes.
        timeout: Seconds that a process waits for another.
    """
    for attempt in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            torch.multiprocessing.spawn(
                _enter, (port, world_size, timeout, work, arguments), world_size
            )
            return
        except torch.multiprocessing.ProcessRaisedException as error:
            if attempt == 2 or "EADDRINUSE" not in str(error):  # another took the port since
                raise
            time.sleep(1)


def _enter(
    rank: int,
    port: int,
    world_size: int,
    timeout: float,
    work: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    wait = timedelta(seconds=timeout)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=world_size, timeout=wait
    )
    work(rank, *arguments)
    dist.barrier()
    os._exit(0)  # torch's threads may abort an interpreter that takes its leave
