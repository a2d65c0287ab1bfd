"""A table of numbers: batches of 2 and of 256, with several norms.

scikit-learn's breast cancer data: 569 rows of 30 columns, 169 of them held out. Every way makes as
many passes over the data. Prints the accuracy in per cent.

    pip install ".[tools]"
    python examples/tabular.py --seeds 5
"""

import argparse
import itertools
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch

# Examples in a batch, method and its options.
WAYS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "batch norm, 256": (256, "bn", {}),
    "ghost, 256 in groups of 64": (256, "ghost", {"ghost_size": 64}),
    "batch norm, 2": (2, "bn", {}),
    "mabn, 2": (2, "mabn", {"batch_size": 2}),
    "group norm, 2": (2, "gn", {}),
}


def table(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows to train on and to test on, with standardized columns."""
    columns, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(columns).float(), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:400], order[400:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return (x[train], y[train]), (x[test], y[test])


def network() -> nn.Module:
    """Three hidden layers, each with a batch norm."""
    widths = (30, 64, 64, 64)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 2))


def run(way: str, seed: int, epochs: int) -> float:
    """Train one network; the learning rate follows the batch size."""
    size, method, options = WAYS[way]
    (x, y), (test_x, test_y) = table(seed)
    torch.manual_seed(seed)
    model = anybatch.convert(network(), method, **options)
    groups = anybatch.param_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1 * size / 64, momentum=0.9)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        decay.step()
    if method != "gn":
        anybatch.recalibrate(model, x.split(100))
    with torch.no_grad():
        return 100 * (model.eval()(test_x).argmax(1) == test_y).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train every way and seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training data")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.epochs) < 1:
        parser.error("--seeds and --epochs: give whole numbers from 1 on")
    found = {}
    for way in WAYS:
        scores = [run(way, seed, given.epochs) for seed in range(given.seeds)]
        spread = stdev(scores) if len(scores) > 1 else 0.0
        print(f"{way:<28} {fmean(scores):.1f} ± {spread:.1f}", flush=True)
        found[way] = scores
    return found


if __name__ == "__main__":
    main()
