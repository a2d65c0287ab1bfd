"""Fine-tuning a network with batch norm at a batch of 2: what to do with its norms.

A network is trained at batch 32 to tell the digits 0 to 4 (scikit-learn's, 8 x 8 pixels), and then
fine-tuned at batch 2 on other images of the same digits (same task), on the digits 5 to 9 with a
fresh last layer (new classes), and on the first digits with inverted, noisy images (new domain).
Prints how far conversion moves the outputs of the trained network, and the accuracy in per cent.

    pip install ".[tools]"
    python examples/fine_tuning.py --seeds 5
"""

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch

METHODS = ("bn", "frozen", "mabn", "mbn", "brn", "gn")
TASKS = ("same task", "new classes", "new domain")
Data = tuple[Tensor, Tensor]


def digits(first: int, seed: int) -> tuple[Data, Data, Data]:
    """Five digits from `first` on: images to pretrain with, to fine-tune with, and to test with."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    rows = torch.nonzero((labels >= first) & (labels < first + 5)).flatten()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    parts = rows[:400], rows[400:600], rows[600:]
    return tuple((images[part].float() / 8 - 1, labels[part] - first) for part in parts)


def other_domain(data: Data, seed: int) -> Data:
    """The same images inverted, at half the contrast, with noise."""
    images, labels = data
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return 1 - 0.5 * images + 0.5 * noise, labels


def network() -> nn.Module:
    """Four hidden linear layers, each with a batch norm."""
    sizes = itertools.pairwise((64, 128, 128, 128, 128))
    layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in sizes]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(128, 5))


def batches(data: Data, size: int) -> Iterator[Data]:
    """One epoch in random order; the last batch is left out if it is not whole."""
    images, labels = data
    for rows in torch.randperm(len(labels)).split(size):
        if len(rows) == size:
            yield images[rows], labels[rows]


def train(
    model: nn.Module, data: Data, size: int, epochs: int, lr: float, scheduled: bool = False
) -> None:
    """SGD with momentum and a cosine; the layers of a method with a schedule hear of each epoch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    schedule = anybatch.NormScheduler(model, total_epochs=epochs) if scheduled else None
    for _ in range(epochs):
        for images, labels in batches(data, size):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        decay.step()
        if schedule is not None:
            schedule.step()


@torch.no_grad()
def outputs(model: nn.Module, data: Data) -> Tensor:
    """The network's output in evaluation."""
    return model.eval()(data[0])


def accuracy(model: nn.Module, data: Data) -> float:
    """Correct answers in per cent."""
    return 100 * (outputs(model, data).argmax(1) == data[1]).float().mean().item()


def run(seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """One pretrained network, fine-tuned with every method on every task."""
    torch.manual_seed(seed)
    pretraining, same, same_test = digits(0, seed)
    _, new, new_test = digits(5, seed)
    tasks = {
        "same task": (same, same_test),
        "new classes": (new, new_test),
        "new domain": (other_domain(same, seed), other_domain(same_test, seed + 1)),
    }
    trained = network()
    train(trained, pretraining, 32, 5 * epochs, lr=0.05)
    before = outputs(trained, same_test)
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        converted = anybatch.convert(copy.deepcopy(trained), method, batch_size=2)
        moved = (outputs(converted, same_test) - before).abs().max() / before.abs().max()
        found[method] = {"outputs move by": moved.item()}
        for task, (data, test) in tasks.items():
            torch.manual_seed(seed)
            model = copy.deepcopy(converted)
            if task == "new classes":
                model[-1] = nn.Linear(128, 5)
            scheduled = method != "frozen" and anybatch.METHODS[method].scheduled
            train(model, data, 2, epochs, 0.003, scheduled)
            found[method][task] = accuracy(model, test)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run every seed and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.epochs) < 1:
        parser.error("--seeds and --epochs: give whole numbers from 1 on")
    runs = [run(seed, given.epochs) for seed in range(given.seeds)]
    found = {method: [one[method] for one in runs] for method in METHODS}
    print("method               outputs move by " + "".join(f"{task:>16}" for task in TASKS))
    for method, rows in found.items():
        moved = max(row["outputs move by"] for row in rows)
        cells = [[row[task] for row in rows] for task in TASKS]
        spread = [stdev(cell) if len(cell) > 1 else 0.0 for cell in cells]
        text = [f"{fmean(c):.1f} ± {s:.1f}" for c, s in zip(cells, spread, strict=True)]
        print(f"{method:<20} {moved:>15.0e} " + "".join(f"{cell:>16}" for cell in text))
    return found


if __name__ == "__main__":
    main()
