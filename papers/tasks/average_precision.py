"""Average precision of what a detector finds, by COCO's own evaluation."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from papers.datasets.coco import BOX, CLASS, CROWD
from papers.networks.one_stage import Detections

NUMBERS = ("average_precision", "average_precision_50", "average_precision_75")


def average_precision(
    found: Sequence[Detections], targets: Tensor, masks: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """Average precision at intersections over union from 0.5 to 0.95, and at 0.5 and 0.75.

    A hundred boxes per image count; boxes of crowds count neither for nor against. It is what
    pycocotools computes, as the papers' is. (torchmetrics' metric is the same one behind an import
    of torchvision.)

    Args:
        found: Of each image.
        targets: ``(N, M, 6)``, in the same pixels.
        masks: Of each image, ``(M, height, width)``, for the precision of masks, too.

    Returns:
        ``average_precision``, ``average_precision_50`` and ``average_precision_75`` of boxes, from
        0 to 1; with masks ``mask_average_precision`` and on as well.

    Raises:
        ValueError: If pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ValueError(
            "average precision is computed by pycocotools; pip install 'anybatch[papers]'"
        ) from error
    truth = COCO()
    there = sorted({int(k) for k in targets[..., CLASS].unique().tolist() if k >= 0})
    height, width = (0, 0) if masks is None else masks[0].shape[1:]
    truth.dataset = {
        "images": [{"id": k, "height": height, "width": width} for k in range(len(targets))],
        "categories": [{"id": k} for k in there],
        "annotations": [dict(one, id=k) for k, one in enumerate(_true(targets, masks), 1)],
    }
    guesses = list(_guessed(found))
    numbers: dict[str, float] = {}
    for kind, before in (("bbox", ""), ("segm", "mask_")):
        if kind == "segm" and masks is None:
            continue
        precisions = [0.0] * len(NUMBERS)
        if guesses:  # of none, pycocotools makes no index
            with contextlib.redirect_stdout(io.StringIO()):  # it says what it does
                truth.createIndex()
                judge = COCOeval(truth, truth.loadRes([dict(one) for one in guesses]), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
            precisions = [max(float(p), 0.0) for p in judge.stats[: len(NUMBERS)]]
        numbers.update(zip((before + name for name in NUMBERS), precisions, strict=True))
    return numbers


def _true(targets: Tensor, masks: Sequence[Tensor] | None) -> Iterator[dict[str, Any]]:
    for image, rows in enumerate(targets.tolist()):
        for k, row in enumerate(rows):
            if row[CLASS] < 0:
                continue
            left, top, right, bottom = row[BOX]
            box = [left, top, right - left, bottom - top]
            one: dict[str, Any] = {"image_id": image, "category_id": int(row[CLASS])}
            one |= {"bbox": box, "area": box[2] * box[3], "iscrowd": int(row[CROWD])}
            if masks is not None:
                one["segmentation"] = _encoded(masks[image][k])
            yield one


def _guessed(found: Sequence[Detections]) -> Iterator[dict[str, Any]]:
    for image, one in enumerate(found):
        corner, far = one.boxes[:, :2], one.boxes[:, 2:]
        sides = torch.cat([corner, far - corner], 1).tolist()
        rows = zip(sides, one.scores.tolist(), one.classes.tolist(), strict=True)
        for k, (box, score, label) in enumerate(rows):
            guess = {"image_id": image, "category_id": int(label), "bbox": box, "score": score}
            if one.masks is not None:
                guess["segmentation"] = _encoded(one.masks[k])
            yield guess


def _encoded(mask: Tensor) -> Any:
    import numpy as np
    from pycocotools import mask as coder

    return coder.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
