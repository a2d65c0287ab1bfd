"""Segmentation: images with a class per pixel, cross-entropy over pixels, mean IoU."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.tools.data import Dataset, noisy, shuffled
from anybatch.tools.images import standardized
from anybatch.tools.precision import forward
from anybatch.tools.run import Run
from papers.datasets.camvid import IGNORED

_LEAST_SIDE = 0.5


def batches(run: Run, data: Dataset, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch; order, noise and augmentation follow from seed and epoch alone."""
    for index, generator in shuffled(run, data, epoch):
        assert isinstance(data.train_x, Tensor)
        x, y = standardized(data.train_x[index]), data.train_y[index]
        if run.augments:
            x, y = augment(x, y, generator)
        yield noisy(run, x, generator).to(run.device), y.long().to(run.device)


def augment(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random part of each image, of half to all of its sides, flipped with a chance of a half.

    Args:
        x: Images ``(N, C, H, W)``.
        y: Classes of their pixels ``(N, H, W)``, uint8.
        generator: Draws sizes, places and flips.

    Returns:
        Images of the same size, interpolated, and the classes of the nearest pixels.
    """
    # Drawn on the generator's device, so that every device sees the same images.
    side, across, down, flip = torch.rand(4, len(x), generator=generator).to(x.device)
    side = _LEAST_SIDE + (1 - _LEAST_SIDE) * side
    room, zero = 1 - side, torch.zeros_like(side)
    rows = [
        torch.stack([torch.where(flip < 0.5, -side, side), zero, (2 * across - 1) * room], 1),
        torch.stack([zero, side, (2 * down - 1) * room], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    smooth = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    nearest = F.grid_sample(
        y[:, None].to(x.dtype), grid, mode="nearest", padding_mode="border", align_corners=False
    )
    return smooth, nearest[:, 0].to(y.dtype)


def loss(run: Run, data: Dataset, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are labelled; 0 where none is.

    Args:
        run: The run.
        data: Its data.
        model: The network.
        x: Images.
        y: Classes of their pixels.

    Returns:
        The loss, with a gradient.
    """
    return _summed(forward(run, model, x), y) / (y != IGNORED).sum().clamp(min=1)


def _summed(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores, y, ignore_index=IGNORED, reduction="sum")


def evaluate(
    run: Run, model: nn.Module, data: Dataset, size: int = 16
) -> tuple[float, dict[str, float]]:
    """Mean loss, mean IoU and accuracy over the labelled pixels of the held-out images.

    Of the pixels of all images together, for each class that is in them or was found in them::

        IoU = those that are of the class and found so / those that are of it or found so

    Args:
        run: The run.
        model: The network; it is left in evaluation mode.
        data: The data.
        size: Images at a time.

    Returns:
        Loss, and the numbers "mean_iou" and "pixel_accuracy" from 0 to 1.
    """
    model.eval()
    metrics = judges(data.classes)
    for metric in metrics.values():
        metric.to(run.device)
    total, pixels = 0.0, 0
    with torch.no_grad():
        for some, classes in zip(data.test_x.split(size), data.test_y.split(size), strict=True):
            y = classes.long().to(run.device)
            scores = forward(run, model, standardized(some).to(run.device))
            total += float(_summed(scores, y))
            pixels += int((y != IGNORED).sum())
            for metric in metrics.values():
                metric.update(scores.argmax(1), y)
    numbers = {name: float(metric.compute()) for name, metric in metrics.items()}
    return total / max(pixels, 1), numbers


def judges(classes: int) -> dict[str, Any]:
    """Build the metrics.

    Args:
        classes: Number of classes.

    Returns:
        Metrics of torchmetrics by the names of their numbers.

    Raises:
        ValueError: If torchmetrics is not installed.
    """
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
    except ImportError as error:
        raise ValueError(
            "mean IoU: torchmetrics measures it; pip install 'anybatch[papers]'"
        ) from error
    return {
        "mean_iou": MulticlassJaccardIndex(classes, ignore_index=IGNORED),
        "pixel_accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED),
    }
