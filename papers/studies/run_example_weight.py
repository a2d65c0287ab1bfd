"""Example weights of networks trained in several ways, as docs/use/example-weighing.md has it.

python -m papers.studies.run_example_weight (digits|images|cifar100) (ghost|methods)
--output FOLDER [--root data/cifar100] [--train-size 200]
"""

import argparse
from pathlib import Path

import torch

from anybatch.tools.figures import png
from anybatch.tools.run import Run
from papers.studies.example_weight import as_table, figure, image_arrays, weigh


def main() -> None:
    """Train, tune, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", choices=("digits", "images", "cifar100"))
    parser.add_argument("networks", choices=("ghost", "methods"))
    parser.add_argument("--root")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--size", type=int, help="training and held-out images at most")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    if given.data == "digits":
        base = Run(noise=0.0)
    else:
        digits = given.data == "images"
        source = Run() if digits else Run(data="cifar100", root=given.root, model="resnet8")
        shape, path = (1, 8, 8) if digits else (3, 32, 32), given.output / "data.npz"
        root = str(path if path.is_file() else image_arrays(source, path, shape, given.size))
        base = Run(data="npz", root=root, model="resnet8")
    base = base.but(batch_size=64, epochs=given.epochs, train_size=given.train_size)
    if given.networks == "ghost":
        runs = {
            f"ghost size {size}": base.but(method="ghost", options=(("ghost_size", size),))
            for size in (2, 4, 8, 16, 32)
        }
    else:
        runs = {f"bn, batch {size}": base.but(method="bn", batch_size=size) for size in (2, 8, 64)}
        runs |= {f"{method}, batch 64": base.but(method=method) for method in ("gn", "bgn")}

    def show(label: str, seed: int, alphas: tuple[float, ...]) -> None:
        print(f"{label}, seed {seed}: tuned weights {alphas}", flush=True)

    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows = weigh(runs, given.output, seeds=seeds, on_run=show)
    (given.output / f"{given.networks}.png").write_bytes(png(figure(rows)))
    print(as_table(rows))


if __name__ == "__main__":
    main()
