"""Segmentation at 2 images: the norms after global pooling are the problem.

Images of 32 x 32 pixels with discs; a disc's class depends on how many the image has, which the
network learns by an image-level branch, as in ASPP. A norm there has one value per image. Prints
which norms are noisy, and the mean IoU in per cent.

    pip install ".[cpu]"
    python examples/segmentation.py --seeds 3
"""

import argparse
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch

CLASSES = 3
WAYS: dict[str, str | dict[str, str]] = {
    "batch norm": "bn",
    "mbn after pooling, batch norm elsewhere": {"*branch*": "mbn", "*": "bn"},
    "mbn everywhere": "mbn",
    "group norm": "gn",
}


def unit(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Segmenter(nn.Module):
    """Three convolutions, and a branch that sees the whole image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(1, width), unit(width, width))
        self.branch = nn.Sequential(nn.AdaptiveAvgPool2d(1), unit(width, width, 1))
        self.head = nn.Sequential(unit(2 * width, width), nn.Conv2d(width, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        local = self.stem(x)
        return self.head(torch.cat([local, self.branch(local).expand_as(local)], 1))


def scene(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image of one to six discs and its labels: 1 where there are few discs, 2 where many."""
    count = int(torch.randint(1, 7, (), generator=generator))
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    inside = torch.zeros(32, 32, dtype=torch.bool)
    for _ in range(count):
        top, left = torch.randint(4, 28, (2,), generator=generator)
        inside |= (y - top).square() + (x - left).square() < 10
    image = inside + 0.3 * torch.randn(32, 32, generator=generator)
    return image[None], inside.long() * (1 if count < 4 else 2)


def scenes(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """So many images with their labels."""
    generator = torch.Generator().manual_seed(seed)
    return [scene(generator) for _ in range(count)]


@torch.no_grad()
def mean_iou(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """Intersection over union in per cent, the mean over classes."""
    images, labels = map(torch.stack, zip(*data, strict=True))
    answers = model.eval()(images).argmax(1)
    scores = []
    for number in range(CLASSES):
        answered, there = answers == number, labels == number
        scores.append((answered & there).sum() / (answered | there).sum().clamp(min=1))
    return 100 * torch.stack(scores).mean().item()


def run(way: str, seed: int, epochs: int, images: int) -> float:
    """Train one network at batch 2, recalibrate and test it."""
    torch.manual_seed(seed)
    model = anybatch.convert(Segmenter(), WAYS[way], batch_size=2)
    loader = torch.utils.data.DataLoader(scenes(images, seed), batch_size=2, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    schedule = anybatch.NormScheduler(model, total_epochs=epochs) if "mbn" in way else None
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        decay.step()
        if schedule is not None:
            schedule.step()
    if way != "group norm":
        anybatch.recalibrate(model, loader)
    return mean_iou(model, scenes(200, seed + 1000))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Diagnose a fresh network, train every way and seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training data")
    parser.add_argument("--images", type=int, default=100, help="training images")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.epochs, given.images) < 1:
        parser.error("--seeds, --epochs and --images: give whole numbers from 1 on")
    loader = torch.utils.data.DataLoader(scenes(given.images, 0), batch_size=2, shuffle=True)
    print("noisy:", ", ".join(anybatch.diagnose(Segmenter(), loader).reading.noisy))
    found = {}
    for way in WAYS:
        scores = [run(way, seed, given.epochs, given.images) for seed in range(given.seeds)]
        spread = stdev(scores) if len(scores) > 1 else 0.0
        print(f"{way:<42} {fmean(scores):.1f} ± {spread:.1f}", flush=True)
        found[way] = scores
    return found


if __name__ == "__main__":
    main()
