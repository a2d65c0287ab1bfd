"""Boxes as ``(left, top, right, bottom)`` in pixels, in the last dimension of a tensor."""

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """Areas, ``(...)`` of ``(..., 4)``; 0 where a side is negative."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of boxes in pairs.

    Args:
        one: ``(..., 4)``.
        other: Of a shape that broadcasts.

    Returns:
        Intersection and union, ``(...)``.
    """
    low = torch.maximum(one[..., :2], other[..., :2])
    high = torch.minimum(one[..., 2:], other[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    return common, area(one) + area(other) - common


def giou(one: Tensor, other: Tensor) -> Tensor:
    """Generalized intersection over union of boxes in pairs.

    ::

        giou = intersection / union - (hull - union) / hull

    Rezatofighi et al., Generalized Intersection over Union, 2019, algorithm 1.

    Args:
        one: ``(..., 4)``.
        other: Of a shape that broadcasts.

    Returns:
        From -1 to 1, ``(...)``.

    Example:
        >>> giou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))
        tensor(0.3333)
    """
    common, union = overlap(one, other)
    low = torch.minimum(one[..., :2], other[..., :2])
    high = torch.maximum(one[..., 2:], other[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    tiny = torch.finfo(hull.dtype).tiny
    return common / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, most: float) -> Tensor:
    """Non-maximum suppression: drop boxes that overlap a better one of their class too much.

    Args:
        boxes: ``(N, 4)``.
        scores: ``(N,)``.
        classes: ``(N,)``.
        most: Intersection over union that is still kept, from 0 to 1.

    Returns:
        Numbers of the boxes kept, best first.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [6, 6, 9, 9]])
        >>> suppress(boxes, torch.tensor([0.5, 0.9, 0.1]), torch.zeros(3), 0.5)
        tensor([1, 2])
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, classes = boxes[order], classes[order]
    common, union = overlap(boxes[:, None], boxes)
    same = classes[:, None] == classes
    clashes = ((common > most * union) & same).triu(1).cpu().numpy()
    kept = [True] * len(order)
    for k, row in enumerate(clashes):  # a box that is gone takes no other with it
        if kept[k]:
            for other in row.nonzero()[0]:
                kept[other] = False
    return order[torch.tensor(kept, dtype=torch.bool, device=order.device)]
