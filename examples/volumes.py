"""Volumes at a batch of 2: MONAI's U-Net with several norms, evaluated with sliding windows.

Synthetic volumes of MONAI (spheres in noise) of 48³ voxels, crops of 32³ in batches of two, dict
batches and dict transforms. Prints the Dice score of whole volumes in per cent, as trained and
after `anybatch.recalibrate`, and how far the output at one end of a scan moves, in per cent of its
spread, if the content of the other end changes. With `--accumulate 4` four batches make a step of
the optimizer and of the norms; the row "bn apart" has the optimizer's alone.

    pip install ".[cpu]" monai
    python examples/volumes.py --seeds 3
    python examples/volumes.py --seeds 3 --epochs 16 --accumulate 4
"""

import argparse
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.data.synthetic import create_test_image_3d
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import compute_dice
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    RandFlipd,
    RandSpatialCropd,
    ScaleIntensityd,
)
from torch import Tensor, nn

import anybatch

METHODS = ("bn", "mbn", "mabn", "cbn", "in")
APART = " apart"
CROP = (32, 32, 32)
KEYS = ("image", "label")
Batch = dict[str, Any]


def volumes(count: int, seed: int) -> list[Batch]:
    """Noisy volumes with spheres, and the voxels inside one."""
    sizes = {"num_objs": 6, "rad_max": 10, "rad_min": 4, "noise_max": 0.7, "num_seg_classes": 1}
    random = np.random.RandomState(seed)
    made = [create_test_image_3d(48, 48, 48, random_state=random, **sizes) for _ in range(count)]
    return [dict(zip(KEYS, pair, strict=True)) for pair in made]


def loader(data: list[Batch], seed: int) -> DataLoader:
    """Random crops in batches of two."""
    transforms = Compose(
        [
            EnsureChannelFirstd(KEYS, channel_dim="no_channel"),
            ScaleIntensityd("image"),
            RandSpatialCropd(KEYS, CROP, random_size=False),
            *(RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)),
        ]
    )
    transforms.set_random_state(seed)
    return DataLoader(Dataset(data, transforms), batch_size=2, shuffle=True, drop_last=True)


def network() -> nn.Module:
    """MONAI's U-Net with batch norm in place of its instance norm."""
    sizes = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1}
    return UNet(3, 1, 2, norm="batch", **sizes)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The network's output for a batch of the loader."""
    return model(batch["image"])


def train(
    model: nn.Module,
    batches: DataLoader,
    epochs: int,
    scheduled: bool,
    accumulate: int = 1,
    joined: bool = False,
) -> None:
    """AdamW with one cosine over the epochs; so many batches make a step, also of the norms."""
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    if joined:
        anybatch.accumulate(model, optimizer=optimizer)
    schedule = anybatch.NormScheduler(model, total_epochs=epochs) if scheduled else None
    for _ in range(epochs):
        for number, batch in enumerate(batches, 1):
            (loss(forward(model, batch), batch["label"]) / accumulate).backward()
            if number % accumulate == 0 or number == len(batches):
                optimizer.step()
                optimizer.zero_grad()
        decay.step()
        if schedule is not None:
            schedule.step()


@torch.no_grad()
def dice(model: nn.Module, data: list[Batch]) -> float:
    """The mean Dice score of whole volumes in per cent."""
    model.eval()
    scores = []
    for volume in data:
        image = ScaleIntensityd("image")(volume)["image"]
        x = torch.as_tensor(image).float()[None, None]
        answer = sliding_window_inference(x, CROP, 4, model, overlap=0.25).argmax(1, keepdim=True)
        scores.append(compute_dice(answer, torch.as_tensor(volume["label"])[None, None]))
    return 100 * torch.cat(scores).mean().item()


@torch.no_grad()
def moved_by_far_content(model: nn.Module) -> float:
    """Change of the near end of a scan's output if its far end changes, in per cent."""
    scan = torch.rand(1, 1, 16, 16, 128)
    changed = scan.clone()
    changed[..., 96:] *= 10
    near, other = (model.eval()(one)[..., :32] for one in (scan, changed))
    return 100 * ((near - other).abs().max() / near.std()).item()


def run(row: str, seed: int, epochs: int, count: int, accumulate: int) -> dict[str, float]:
    """Train one network, and measure it."""
    torch.manual_seed(seed)
    batches = loader(volumes(count, seed), seed)
    method = row.removesuffix(APART)
    model = anybatch.convert(network(), method, batch_size=2)
    joined = accumulate > 1 and row == method != "in"
    train(model, batches, epochs, anybatch.METHODS[method].scheduled, accumulate, joined)
    test = volumes(8, seed + 1000)
    found = {"Dice": dice(model, test)}
    if anybatch.METHODS[method].exact_eval:  # instance norm has no running statistics
        anybatch.recalibrate(model, batches, forward=forward)
    return {
        **found,
        "recalibrated": dice(model, test),
        "moved by far content": moved_by_far_content(model),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run every method and seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training data")
    parser.add_argument("--volumes", type=int, default=16, help="training volumes")
    parser.add_argument("--accumulate", type=int, default=1, help="batches in a step")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.epochs, given.volumes, given.accumulate) < 1:
        parser.error("--seeds, --epochs, --volumes and --accumulate: give whole numbers from 1 on")
    if given.volumes < 2:
        parser.error("--volumes: give 2 or more, which make a batch")
    rows = ("bn" + APART, *METHODS) if given.accumulate > 1 else METHODS
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        of = given.epochs, given.volumes, given.accumulate
        found[row] = [run(row, seed, *of) for seed in range(given.seeds)]
        columns = {name: [one[name] for one in found[row]] for name in found[row][0]}
        spread = {n: stdev(c) if len(c) > 1 else 0.0 for n, c in columns.items()}
        cells = (f"{name} {fmean(c):.1f} ± {spread[name]:.1f}" for name, c in columns.items())
        print(f"{row:<9}" + "   ".join(cells), flush=True)
    return found


if __name__ == "__main__":
    main()
