"""Ghost batch size and inference example weighing together, as docs/example-weighing.md has it.

python benchmarks/ghost_sizes.py digits --output runs/ghost-digits
python benchmarks/ghost_sizes.py pictures --train-size 200 --output runs/ghost-pictures
python benchmarks/ghost_sizes.py cifar100 --root data/cifar100 --size 4000 --output runs/ghost
"""

import argparse
from pathlib import Path

import torch

from anybatch.experiments.config import Run
from anybatch.experiments.figures import png
from anybatch.experiments.ghost_sizes import as_table, figure, ghost_sizes, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=("digits", "pictures", "cifar100"))
    parser.add_argument("--root")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--size", type=int, help="training and held-out pictures at most")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    if given.data == "digits":
        base = Run(noise=0.0)
    else:
        digits = given.data == "pictures"
        source = Run() if digits else Run(data="cifar100", root=given.root, model="resnet8")
        shape, path = (1, 8, 8) if digits else (3, 32, 32), given.output / "data.npz"
        root = str(path if path.is_file() else pictures(source, path, shape, given.size))
        base = Run(data="npz", root=root, model="resnet8")
    base = base.but(batch_size=64, epochs=given.epochs, train_size=given.train_size)

    def show(size: int, seed: int, alphas: tuple[float, ...]) -> None:
        print(f"ghost size {size}, seed {seed}: tuned weights {alphas}", flush=True)

    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows = ghost_sizes(base, given.output, seeds=seeds, on_run=show)
    (given.output / "figure.png").write_bytes(png(figure(rows)))
    print(as_table(rows))


if __name__ == "__main__":
    main()
