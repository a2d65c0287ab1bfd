"""Detection: images with boxes, a detector's own loss, average precision."""

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from anybatch.tools.data import Dataset, noisy, shuffled
from anybatch.tools.precision import autocast
from anybatch.tools.run import Run
from papers.datasets.coco import BOX, AnnotatedImages
from papers.networks.one_stage import Detections, Targets
from papers.paper_run import PaperRun
from papers.tasks.average_precision import average_precision


class Detector(Protocol):
    """Interface of a network for detection."""

    def loss(self, x: Tensor, targets: Targets) -> Tensor:
        """The loss on images ``(N, 3, height, width)``, with a gradient."""

    def find(self, x: Tensor) -> list[Detections]:
        """Return the objects in each image, in evaluation mode."""


def batches(run: Run, data: Dataset, epoch: int) -> Iterator[tuple[Tensor, Targets]]:
    """The batches of an epoch; order, noise and flips follow from seed and epoch alone."""
    for index, generator in shuffled(run, data, epoch):
        images = _images(data.train_x)[index]
        boxes = data.train_y[index.to(data.train_y.device)].cpu()
        x, masks = images.read(), images.masks() if finds_masks(run) else None
        if run.augments:
            flips = torch.rand(len(x), generator=generator) < 0.5
            x, boxes, masks = flipped(x, boxes, masks, flips, images.widths())
        masks = None if masks is None else masks.to(run.device)
        yield noisy(run, x, generator).to(run.device), Targets(boxes.to(run.device), masks)


def _images(x: object) -> AnnotatedImages:
    assert isinstance(x, AnnotatedImages)
    return x


def finds_masks(run: Run) -> bool:
    """Whether a run's network finds masks beside boxes."""
    return isinstance(run, PaperRun) and run.finds_masks


def flipped(
    x: Tensor, boxes: Tensor, masks: Tensor | None, flips: Tensor, widths: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn some images left to right, and what is in them.

    Args:
        x: ``(N, 3, height, width)``, filled up on the right.
        boxes: ``(N, M, 6)``.
        masks: ``(N, M, height, width)`` or None.
        flips: Which images, ``(N,)``.
        widths: How much of each is no filling, ``(N,)``.

    Returns:
        Images, boxes and masks.
    """
    columns = torch.arange(x.shape[3])
    turned = widths[:, None] - 1 - columns
    # The filling stays where it is.
    source = torch.where(flips[:, None] & (turned >= 0), turned, columns)
    x = x.gather(3, source[:, None, None].expand_as(x))
    if masks is not None:
        masks = masks.gather(3, source[:, None, None].expand_as(masks))
    left, top, right, bottom = boxes[..., BOX].unbind(-1)
    ends = widths[:, None].to(boxes.dtype)
    turned_boxes = torch.stack([ends - right, top, ends - left, bottom], -1)
    boxes = boxes.clone()
    boxes[..., BOX] = torch.where(flips[:, None, None], turned_boxes, boxes[..., BOX])
    return x, boxes, masks


def loss(run: Run, data: Dataset, model: nn.Module, x: Tensor, y: Targets) -> Tensor:
    """A detector's loss.

    Args:
        run: The run.
        data: Its data.
        model: The detector.
        x: Images.
        y: What is in them.

    Returns:
        The loss, with a gradient.
    """
    with autocast(run.precision, run.device):
        return cast(Detector, model).loss(x, y)


def evaluate(
    run: Run, model: nn.Module, data: Dataset, size: int = 16
) -> tuple[None, dict[str, float]]:
    """Average precision on the held-out images.

    Args:
        run: The run.
        model: The detector; it is left in evaluation mode.
        data: The data.
        size: Images at a time.

    Returns:
        None for the loss, which detectors have in training alone, and the numbers of
        `papers.tasks.average_precision`, from 0 to 1.
    """
    model.eval()
    images = _images(data.test_x)
    found: list[Detections] = []
    masks: list[Tensor] | None = [] if finds_masks(run) else None
    with torch.no_grad(), autocast(run.precision, run.device):
        for start in range(0, len(images), size):
            some = images[start : start + size]
            found += cast(Detector, model).find(some.read().to(run.device))
            if masks is not None:
                masks += some.masks()
    return None, average_precision(found, data.test_y.cpu(), masks)
