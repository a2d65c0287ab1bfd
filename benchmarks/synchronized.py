"""Training steps of two processes on this machine, with and without synchronized statistics.

ResNet-20 on 32x32 images, DistributedDataParallel over gloo, one thread a process, all in
turn; medians of the ratios to torch's batch norm, which is each process's own.

    python benchmarks/synchronized.py [--batch-size 8] [--rounds 21]
"""

import argparse
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import anybatch
from anybatch.tools.machine import machine
from anybatch.tools.networks import build

SETTINGS = {
    "torch.nn.BatchNorm": None,
    "bn": {},
    "sync": {},
    "mabn": {},
    "mabn, synchronized": {"process_group": "world"},
    "fs, synchronized": {"process_group": "world", "seed": 0},
}


def work(rank: int, port: int, batch_size: int, rounds: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    models = {}
    for name, options in SETTINGS.items():
        torch.manual_seed(0)
        model = build("resnet20", 10, (3, 32, 32))
        if options is not None:
            model = anybatch.convert(model, name.split(",")[0], batch_size=batch_size, **options)
        models[name] = nn.parallel.DistributedDataParallel(model)
    optimizers = {n: torch.optim.SGD(m.parameters(), 0.01) for n, m in models.items()}
    x, y = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            dist.barrier()
            start = time.perf_counter()
            optimizers[name].zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizers[name].step()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    if rank == 0:
        print(machine())
        print("| statistics | step, ms | ratio |\n|---|---|---|")
        base = times["torch.nn.BatchNorm"][2:]
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken[2:], base, strict=True)]
            middle = 1e3 * statistics.median(taken[2:])
            print(f"| {name} | {middle:.1f} | {statistics.median(ratios):.2f} |")
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, given.batch_size, given.rounds), 2)


if __name__ == "__main__":
    main()
