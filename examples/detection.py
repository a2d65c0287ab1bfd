"""A detector from scratch, image by image: several norms at a batch of 1.

Images of 48 x 48 pixels with discs and squares. The network answers, for each cell of 4 x 4 pixels,
whether a disc's or a square's centre is in it (as in CenterNet, without sizes). Prints whether the
norms are noisy, and the F1 score of the centres found, in per cent.

    pip install ".[cpu]"
    python examples/detection.py --seeds 3
"""

import argparse
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch

SIZE, CELL = 48, 4
WAYS = {"batch norm": "bn", "cbn": "cbn", "mabn": "mabn", "group norm": "gn"}
Scene = tuple[Tensor, Tensor]


def scene(generator: torch.Generator) -> Scene:
    """An image of one to five shapes, and a map of centres, of discs and of squares."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    image = 0.4 * torch.randn(SIZE, SIZE, generator=generator)
    centres = torch.zeros(2, SIZE // CELL, SIZE // CELL)
    for _ in range(int(torch.randint(1, 6, (), generator=generator))):
        top, left = torch.randint(5, SIZE - 5, (2,), generator=generator).tolist()
        kind = int(torch.randint(2, (), generator=generator))
        disc = (y - top).square() + (x - left).square() < 20
        square = torch.maximum((y - top).abs(), (x - left).abs()) < 4
        image = torch.where((disc, square)[kind], 1.0 + 0.2 * image, image)
        centres[kind, top // CELL, left // CELL] = 1
    return image[None], centres


def scenes(count: int, seed: int) -> list[Scene]:
    """So many images with their centres."""
    generator = torch.Generator().manual_seed(seed)
    return [scene(generator) for _ in range(count)]


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def detector() -> nn.Module:
    """A backbone of stride 4 and a head."""
    backbone = nn.Sequential(unit(1, 16), unit(16, 32, 2), unit(32, 32), unit(32, 64, 2))
    head = nn.Sequential(unit(64, 64), nn.Conv2d(64, 2, 1))
    nn.init.constant_(head[-1].bias, -4.0)  # centres are rare
    return nn.Sequential(backbone, head)


def loss(output: Tensor, batch: Scene) -> Tensor:
    """Cross-entropy of every cell; centres are rare and weigh ten times as much."""
    centres = batch[1]
    return F.binary_cross_entropy_with_logits(output, centres, 1 + 9 * centres)


def images_of(images: int, seed: int) -> torch.utils.data.DataLoader:
    """Images to train on, one by one."""
    return torch.utils.data.DataLoader(scenes(images, seed), batch_size=1, shuffle=True)


@torch.no_grad()
def f1(model: nn.Module, data: list[Scene]) -> float:
    """F1 score in per cent of the cells that the network names."""
    images, centres = map(torch.stack, zip(*data, strict=True))
    answers = model.eval()(images) > 0
    right = (answers & (centres > 0)).sum()
    return 200 * (right / (answers.sum() + centres.sum()).clamp(min=1)).item()


def run(way: str, seed: int, epochs: int, images: int) -> float:
    """Train one detector and test it."""
    method = WAYS[way]
    torch.manual_seed(seed)
    model = anybatch.convert(detector(), method)
    loader = images_of(images, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    schedule = anybatch.NormScheduler(model, total_epochs=epochs) if method == "cbn" else None
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss(model(batch[0]), batch).backward()
            optimizer.step()
        decay.step()
        if schedule is not None:
            schedule.step()
    if method != "gn":
        anybatch.recalibrate(model, loader)
    return f1(model, scenes(100, seed + 1000))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Diagnose a fresh detector, train every way and seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training data")
    parser.add_argument("--images", type=int, default=80, help="training images")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.epochs, given.images) < 1:
        parser.error("--seeds, --epochs and --images: give whole numbers from 1 on")
    reading = anybatch.diagnose(detector(), images_of(given.images, 0), loss=loss).reading
    print("Is batch norm the problem?", reading.problem)
    found = {}
    for way in WAYS:
        scores = [run(way, seed, given.epochs, given.images) for seed in range(given.seeds)]
        spread = stdev(scores) if len(scores) > 1 else 0.0
        print(f"{way:<16} {fmean(scores):.1f} ± {spread:.1f}", flush=True)
        found[way] = scores
    return found


if __name__ == "__main__":
    main()
