"""Digits at small batches before and after recalibration, for docs/use/recalibration.md.

python benchmarks/recalibration.py --output runs/recalibration
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch

import anybatch
from anybatch.tools.checkpoint import read_checkpoint
from anybatch.tools.classification import evaluate
from anybatch.tools.data import load
from anybatch.tools.run import Run
from anybatch.tools.training import train
from anybatch.tools.tune import build, training_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/recalibration"))
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load(Run())
    clean = training_batches(data)
    generator = torch.Generator().manual_seed(1)
    noisy = [x + 0.3 * torch.randn(x.shape, generator=generator) for x in clean]
    for size in (2, 4, 8):
        together = [x for x in torch.cat(noisy).split(size) if len(x) == size]
        ways = {
            "layerwise, clean": (clean, "layerwise"),
            "layerwise, with noise": (noisy, "layerwise"),
            f"together in batches of {size}, with noise": (together, "together"),
        }
        rows: dict[str, list[tuple[float, float]]] = {}
        for seed in range(given.seeds):
            run = Run(batch_size=size, seed=seed)
            train(run, given.output, keep_weights=True)
            _, state = read_checkpoint(given.output / "runs" / f"{run.key}.pt")
            model = build(run, data, state)
            rows.setdefault("running averages", []).append(evaluate(run, model, data))
            for name, (batches, mode) in ways.items():
                other = copy.deepcopy(model)
                anybatch.recalibrate(other, batches, mode=mode)
                rows.setdefault(name, []).append(evaluate(run, other, data))
            with anybatch.example_weighing(model, 1 / size) as weighed:
                rows.setdefault("example weight 1 / batch", []).append(evaluate(run, weighed, data))
            other = anybatch.eval_norm(model, noisy, size).apply(copy.deepcopy(model))
            rows.setdefault("eval_norm", []).append(evaluate(run, other, data))
        for name, values in rows.items():
            cells = [
                f"{statistics.fmean(column):.3f} ± {statistics.stdev(column):.3f}"
                for column in zip(*values, strict=True)
            ]
            print(f"| {size} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
