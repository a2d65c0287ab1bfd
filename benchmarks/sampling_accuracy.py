"""Accuracy of every way to sample, on CIFAR-10, as docs/results/sampling.md has it.

ResNet-20 at batch 128 with statistics from 1/128, 1/32 and 1/8 of the batch, beside torch's batch
normalization. Stopped, it goes on where it was.

    python benchmarks/sampling_accuracy.py --root data/cifar10 [--epochs 8] [--seeds 3]
        [--workers 2] [--output runs/sampling-accuracy]
"""

import argparse
import statistics
from pathlib import Path

from anybatch.tools.compare import train_runs
from anybatch.tools.machine import machine
from anybatch.tools.run import BASELINE, Option, Run
from anybatch.tools.training import Row

BATCH_SIZE = 128
SHARES = (128, 32, 8)
METHODS = ("ns", "bs", "fs", "points", "vdn")


def rows(base: Run) -> dict[tuple[str, int], Run]:
    """The settings, by method and the batch's share that is sampled, one in so many."""
    found = {(BASELINE, 1): base}
    for share in SHARES:
        for method in METHODS:
            option: Option = ("ratio", 1 / share)
            if method == "vdn":
                option = ("num_virtual", BATCH_SIZE // share)
            found[method, share] = base.but(method=method, options=(option,))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data/cifar10")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/sampling-accuracy"))
    given = parser.parse_args()
    base = Run(
        data="cifar10",
        root=given.root,
        model="resnet20",
        batch_size=BATCH_SIZE,
        epochs=given.epochs,
    )
    settings = rows(base)
    runs = [run.but(seed=seed) for seed in range(given.seeds) for run in settings.values()]
    done = 0

    def tell(key: str, epochs: int, row: Row | None) -> None:
        nonlocal done
        if row is not None:
            done += 1
            print(f"{done}/{len(runs)}  {key}  {100 * float(row['accuracy']):.2f} %", flush=True)

    results = train_runs(runs, given.output, given.workers, tell)
    print(machine())
    columns = " | ".join(f"1/{share}" for share in SHARES)
    print(f"| method | {columns} |\n|---|{'---|' * len(SHARES)}")
    for method in (BASELINE, *METHODS):
        shares = (1,) if method == BASELINE else SHARES
        cells = []
        for share in shares:
            run = settings[method, share]
            values = [
                100 * float(results[run.but(seed=seed).key]["accuracy"])
                for seed in range(given.seeds)
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
