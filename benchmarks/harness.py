"""What the benchmarks share: arguments, a budget of time, tables and CSV files."""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from measurement_files import as_table, write_csv
from torch import Tensor, nn

from anybatch.tools.measurements import Measurement, surroundings
from anybatch.tools.timing import Call

SHAPES = ("2x64x56x56", "32x64x56x56", "4x256x100x152", "128x16x32x32")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Budget:
    """So many seconds; what is asked for when they are over is left out, and said."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def over(self, what: str) -> bool:
        """Whether there is no time left for it."""
        if self.end is None or time.monotonic() < self.end:
            return False
        print(f"no time left for {what}", flush=True)
        return True


def arguments(description: str, rounds: int = 15) -> argparse.ArgumentParser:
    """A parser with the arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seconds", type=float, help="leave out what does not begin in that time")
    return parser


def start(given: argparse.Namespace) -> Budget:
    """Set the threads, say what this is measured on; the budget."""
    torch.set_num_threads(given.threads)
    if torch.device(given.device).type == "cuda":
        torch.backends.cudnn.benchmark = True
    print(", ".join(f"{name} {value}" for name, value in surroundings(given.device).items()))
    return Budget(given.seconds)


def finish(
    rows: Sequence[Measurement], failed: Mapping[str, str], given: argparse.Namespace
) -> int:
    """Print the tables and what could not be measured, write the CSV; the exit status."""
    print(as_table(rows))
    for name, reason in failed.items():
        print(f"{name} could not be measured: {reason}")
    if given.csv is not None:
        write_csv(given.csv, rows, given.device)
        print(given.csv)
    return int(not rows)


def reason(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sizes(shape: str) -> tuple[int, ...]:
    """The numbers of a shape."""
    return tuple(int(size) for size in shape.split("x"))


def training_step(network: nn.Module, x: Tensor, target: Tensor) -> Call:
    """A step of a classifier: forward, loss, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, momentum=0.9)

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), target).backward()
        optimizer.step()

    return call
