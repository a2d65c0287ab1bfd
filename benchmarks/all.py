"""Every question in turn, into one folder: CSV files, and an image of each.

    python benchmarks/all.py [--output runs/bench]                  # a CPU, about 6 minutes
    python benchmarks/all.py --device cuda [--output runs/bench-gpu]  # a GPU, under 8 minutes

What does not begin within ``--minutes`` is left out, and said. ``--tiny`` goes through the same
code on small data, where no figure means anything.
"""

import argparse
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import draw
from harness import SHAPES

SMALL_SHAPES = ("2x64x56x56", "2x256x14x14", "2x2048x7x7")
LARGE_SHAPES = ("32x64x56x56", "128x16x32x32", "4x256x100x152", "64x256x56x56")
TINY_SHAPES = ("2x4x5x5", "3x8x4x4")
OURS = ("bn", "mbn", "mabn", "brn", "ghost", "bgn", "fs", "bs")


class Task(NamedTuple):
    """One question: a script with its arguments, and the name of its CSV file."""

    name: str
    script: str
    arguments: tuple[str, ...]
    rounds: int = 15


def cpu_tasks(tiny: bool) -> list[Task]:
    """What `make bench` asks."""
    shapes = TINY_SHAPES if tiny else SHAPES
    networks = ("resnet8",) if tiny else ("resnet8", "resnet20")
    inference = "resnet8" if tiny else "resnet20"
    sizes = ("2", "4") if tiny else ("2", "32")
    steps = ("--networks", *networks, "--batch-sizes", *sizes)
    memory = ("--networks", networks[-1], "--batch-sizes", *sizes, "--shapes", *shapes)
    low = ("--shapes", *shapes[:2], "--precision", "bfloat16", "float16")
    low = (*low, "--layers", "bn", "mabn", "brn")
    ways = ("--shapes", *shapes) if tiny else ()
    parts = ("--networks", networks[-1], "--batch-sizes", sizes[1], "--norm-batch-size", "2")
    parts = (*parts, "--methods", "bn", "mbn", "mabn", "brn", "cbn")
    return [
        Task("import", "import_time", (), 9),
        Task("layers", "layers", ("--shapes", *shapes)),
        Task("steps", "training_step", steps),
        Task("inference", "inference", ("--network", inference, "--batch-sizes", "1", sizes[1])),
        Task("memory-networks", "memory", ("--layers-csv", "memory-layers.csv", *memory), 1),
        Task("roofline", "roofline", ("--shapes", *shapes), 31),
        Task("layers-16-bit", "layers", low),
        Task("modes", "modes", ways),
        Task("steps-parts", "training_step", parts),
    ]


def gpu_tasks(tiny: bool, device: str) -> list[Task]:
    """What `make bench-gpu` asks, most wanted first."""
    small = TINY_SHAPES[:1] if tiny else SMALL_SHAPES
    large = TINY_SHAPES[1:] if tiny else LARGE_SHAPES
    modes = ("--mode", "eager", *(("graph",) if device.startswith("cuda") else ()))
    both = ("--precision", "float32", "bfloat16")
    peers = ("nn.GroupNorm", "nn.SyncBatchNorm", "ghost, a loop")
    dearer = ("eager BN", "eager MABN", "eager BRN", "compiled BN")
    network, image = "resnet50", "3x64x64"
    if importlib.util.find_spec("torchvision") is not None:
        network, image = "torchvision.models:resnet50", "3x224x224"
    if tiny:
        network, image = "resnet8", "3x16x16"
    sizes = ("2", "4") if tiny else ("2", "64")
    step = ("--networks", network, "--inputs", image, "--batch-sizes", *sizes)
    step = (*step, "--precision", "bfloat16", "--channels-last")
    methods = ("--methods", "bn", "mbn", "mabn", "brn", "ghost", "bgn", "gn", "fs")
    memory = (*step, "--layers-csv", "memory-layers.csv", "--shapes", small[0], large[0])
    compiled = ("--networks", "resnet8" if tiny else "resnet20", "--batch-sizes", *sizes)
    compiled = (*compiled, "--mode", "compiled", "--methods", "bn", "mabn")
    names = ("--layers", *OURS, *peers)
    return [
        Task("layers-large", "layers", ("--shapes", *large, *both, *modes, *names)),
        Task("layers-small", "layers", ("--shapes", *small, *both, *modes, *names)),
        Task("steps", "training_step", (*step, *methods, *modes)),
        Task("roofline", "roofline", ("--shapes", *small, *large, *both), 31),
        Task("steps-cbn", "training_step", (*step, "--methods", "bn", "cbn"), 9),
        Task(
            "layers-peers",
            "layers",
            ("--shapes", small[0], large[0], *both, "--layers", "bn", *dearer),
        ),
        Task("memory-networks", "memory", memory, 1),
        Task(
            "inference",
            "inference",
            ("--network", network, "--inputs", image, "--batch-sizes", *sizes),
        ),
        Task("steps-compiled", "training_step", compiled, 9),
        Task("steps-operators", "training_step", (*compiled, "--operators"), 9),
    ]


def perform(task: Task, given: argparse.Namespace, seconds: float) -> int:
    """Run one script in this process; its status, 1 where it failed."""
    print(f"\n=== {task.name}", flush=True)
    typed = [given.output / text if text.endswith(".csv") else text for text in task.arguments]
    typed += ["--csv", given.output / f"{task.name}.csv"]
    typed += ["--rounds", 2 if given.tiny else task.rounds]
    if task.script != "import_time":
        typed += ["--device", given.device, "--threads", given.threads, "--seconds", seconds]
    try:
        return int(importlib.import_module(task.script).main([str(text) for text in typed]))
    except SystemExit as error:  # arguments that a script does not take
        return int(error.code or 0) if isinstance(error.code, int) else 1
    except Exception:  # the other questions must have their answers
        traceback.print_exc()
        return 1


def main(typed: Sequence[str] | None = None) -> int:
    """Ask all, draw all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", choices=["cpu", "gpu"], help="default: as the device")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(typed)
    asked = given.questions or ("cpu" if given.device == "cpu" else "gpu")
    given.output = given.output or Path("runs/bench" if asked == "cpu" else "runs/bench-gpu")
    given.output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    end = begin + 60 * (given.minutes or (6.0 if asked == "cpu" else 7.0))
    tasks = cpu_tasks(given.tiny) if asked == "cpu" else gpu_tasks(given.tiny, given.device)
    failed, taken = [], {}
    for task in tasks:
        left, start = end - time.monotonic(), time.monotonic()
        if left <= 0:
            print(f"\n=== {task.name}: no time left", flush=True)
        elif perform(task, given, left):
            failed.append(task.name)
        taken[task.name] = time.monotonic() - start
    draw.main([str(path) for path in sorted(given.output.glob("*.csv"))])
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in taken.items()))
    print(f"{time.monotonic() - begin:.0f} s in all: {given.output}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
