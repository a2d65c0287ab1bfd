"""A small detector that learns from scratch on a CPU: one stage, without anchors, as FCOS."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.tools.residual import Basic, conv
from papers.datasets.coco import BOX, CLASS, CROWD
from papers.networks import boxes
from papers.networks.pyramid import normed

_WIDTHS, _FEATURES = (16, 32, 64, 96), 48
_STRIDE = 8  # pixels between the places that are asked for a box
_RADIUS = 1.5  # strides around its middle, in which a box is learned
_PRIOR = 0.01  # chance of a class at a place that an untrained network starts from
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss
_LARGEST = 5.0  # logarithm of a distance in strides
_SCORE, _OVERLAP, _CANDIDATES, _MOST = 0.05, 0.6, 300, 100


class Detections(NamedTuple):
    """Objects that a detector found in an image, best first.

    Attributes:
        boxes: ``(n, 4)``.
        scores: ``(n,)``, from 0 to 1.
        classes: ``(n,)``.
        masks: ``(n, height, width)``, bool; None of a detector of boxes alone.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | None = None


class Targets(NamedTuple):
    """Objects in some images.

    Attributes:
        boxes: ``(N, M, 6)``, as `papers.datasets.coco.Part` has them.
        masks: ``(N, M, height, width)``, bool; None for a detector of boxes alone.
    """

    boxes: Tensor
    masks: Tensor | None = None

    def split(self, size: int) -> "list[Targets]":
        """So many images at a time."""
        parts = self.boxes.split(size)
        masks = [None] * len(parts) if self.masks is None else self.masks.split(size)
        return [Targets(*pair) for pair in zip(parts, masks, strict=True)]


class Places(NamedTuple):
    """Outputs of the heads at each place.

    Attributes:
        classes: Logits, ``(N, classes, h, w)``.
        distances: To the box's four sides, as logarithms, in strides, ``(N, 4, h, w)``.
        centres: Logits of how near it is to the box's middle, ``(N, 1, h, w)``.
    """

    classes: Tensor
    distances: Tensor
    centres: Tensor


class Body(nn.Module):
    """A small ResNet and a feature pyramid's way down, of which the finest map is given.

    Lin et al., Feature Pyramid Networks for Object Detection, 2017; of its maps only the one of
    `_STRIDE` is used, so that each norm of the heads sees one map a step.
    """

    def __init__(self) -> None:
        super().__init__()
        narrow = _WIDTHS[0]
        self.stem = nn.Sequential(conv(3, narrow, 3, 2), nn.BatchNorm2d(narrow), nn.ReLU())
        pairs = zip((narrow, *_WIDTHS[:-1]), _WIDTHS, strict=True)
        self.stages = nn.ModuleList([Basic(i, o, 2) for i, o in pairs])
        self.across = nn.ModuleList([normed(w, _FEATURES, 1) for w in _WIDTHS[1:]])
        self.smooth = nn.Sequential(normed(_FEATURES, _FEATURES, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.stem(x))
        fine = self.stages[1](x)
        middle = self.stages[2](fine)
        coarse = self.across[2](self.stages[3](middle))
        coarse = self.across[1](middle) + F.interpolate(coarse, scale_factor=2.0)
        y: Tensor = self.smooth(self.across[0](fine) + F.interpolate(coarse, scale_factor=2.0))
        return y


def _tower() -> nn.Sequential:
    """The four convolutions with norms that a head is made of."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [*normed(_FEATURES, _FEATURES, 3), nn.ReLU()]
    return nn.Sequential(*layers)


class OneStage(nn.Module):
    """A detector that asks every place for a class, a box around it and its nearness to the middle.

    The heads are two towers of four convolutions, each with a norm; Tian et al., FCOS: Fully
    Convolutional One-Stage Object Detection, 2019, with the middle of a box alone to learn from and
    on one map in place of five.

    Args:
        classes: Kinds of objects.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = Body()
        self.heads = nn.ModuleDict({"classes": _tower(), "boxes": _tower()})
        self.classes = nn.Conv2d(_FEATURES, classes, 3, padding=1)
        self.distances = nn.Conv2d(_FEATURES, 4, 3, padding=1)
        self.centres = nn.Conv2d(_FEATURES, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for last in (self.classes, self.distances, self.centres):
            nn.init.normal_(last.weight, std=0.01)
            assert last.bias is not None
            nn.init.constant_(last.bias, -math.log(1 / _PRIOR - 1) if last is self.classes else 0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.body(x)
        boxes = self.heads["boxes"](features)
        classes = self.classes(self.heads["classes"](features))
        return classes, self.distances(boxes), self.centres(boxes)

    def loss(self, x: Tensor, targets: Targets) -> Tensor:
        """Focal loss of classes, GIoU loss of boxes, cross-entropy of nearness, in sum.

        Args:
            x: Images, ``(N, 3, height, width)``.
            targets: Their boxes.

        Returns:
            The loss, divided by the number of places that learn a box.
        """
        said = Places(*(part.float() for part in self(x)))
        return loss(said, targets.boxes)

    def find(self, x: Tensor) -> list[Detections]:
        """Return the objects in each image."""
        said = Places(*(part.float() for part in self(x)))
        return [_found(Places(*parts)) for parts in zip(*said, strict=True)]


def loss(said: Places, targets: Tensor) -> Tensor:
    """The loss of what the heads say.

    Args:
        said: Of each place.
        targets: ``(N, M, 6)``.

    Returns:
        A number.
    """
    height, width = said.classes.shape[2:]
    points = grid(height, width, targets.device)
    which = assigned(points, targets)
    positive = which >= 0
    own = targets.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, targets.shape[2]))
    logits = said.classes.flatten(2).mT
    wanted = torch.zeros_like(logits)
    labels = own[..., CLASS].long().clamp(min=0)
    wanted.scatter_(2, labels[..., None], positive[..., None].to(wanted.dtype))
    count = positive.sum().clamp(min=1)
    of_classes = focal(logits, wanted).sum() / count

    sides = own[..., BOX]
    distances = torch.cat([points - sides[..., :2], sides[..., 2:] - points], -1)
    weight = torch.where(positive, nearness(distances.clamp(min=1e-6)), 0.0)
    guessed = around(points, said.distances.flatten(2).mT)
    of_boxes = (weight * (1 - boxes.giou(guessed, sides))).sum() / weight.sum().clamp(min=1e-6)
    centres = said.centres.flatten(1)
    crossed = F.binary_cross_entropy_with_logits(centres, weight, reduction="none")
    return of_classes + of_boxes + (crossed * positive).sum() / count


def grid(height: int, width: int, device: torch.device) -> Tensor:
    """The places, ``(height * width, 2)``, x before y, in pixels."""
    rows = (torch.arange(height, device=device) + 0.5) * _STRIDE
    columns = (torch.arange(width, device=device) + 0.5) * _STRIDE
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def assigned(points: Tensor, targets: Tensor) -> Tensor:
    """The box that each place learns: the smallest of those that it lies in the middle of.

    Args:
        points: ``(L, 2)``.
        targets: ``(N, M, 6)``.

    Returns:
        Its number, ``(N, L)``; -1 where there is none. Crowds are learned by no place.
    """
    sides = targets[:, None, :, BOX]
    inside = (points[:, None] > sides[..., :2]) & (points[:, None] < sides[..., 2:])
    middle = (sides[..., :2] + sides[..., 2:]) / 2
    near = (points[:, None] - middle).abs() <= _RADIUS * _STRIDE
    real = (targets[..., CLASS] >= 0) & (targets[..., CROWD] == 0)
    fits = inside.all(-1) & near.all(-1) & real[:, None]
    size = boxes.area(sides).masked_fill(~fits, torch.inf)
    smallest, which = size.min(2)
    return torch.where(smallest.isfinite(), which, -1)


def around(points: Tensor, logarithms: Tensor) -> Tensor:
    """The boxes of some places, from the logarithms of their distances in strides."""
    distances = logarithms.clamp(max=_LARGEST).exp() * _STRIDE
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def nearness(distances: Tensor) -> Tensor:
    """Nearness of places to the middle of their boxes, from 0 to 1.

    ::

        sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))

    Tian et al., 2019, equation 3.

    Args:
        distances: To the left, upper, right and lower side, ``(..., 4)``.

    Returns:
        ``(...)``.
    """
    one, other = distances[..., :2], distances[..., 2:]
    return (torch.minimum(one, other) / torch.maximum(one, other)).prod(-1).sqrt()


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss of each logit.

    ::

        -alpha (1 - p)^gamma log p  where wanted,  -(1 - alpha) p^gamma log(1 - p)  elsewhere

    with alpha 0.25 and gamma 2; Lin et al., Focal Loss for Dense Object Detection, 2017, section 3.

    Args:
        logits: Any shape.
        wanted: 0 or 1, of the same.

    Returns:
        Of the same.
    """
    missed = (torch.sigmoid(logits) - wanted).abs()
    weight = torch.where(wanted > 0, _ALPHA, 1 - _ALPHA) * missed**_GAMMA
    return weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def _found(said: Places) -> Detections:
    """Return the objects in one image: the best places, with non-maximum suppression."""
    height, width = said.classes.shape[1:]
    points = grid(height, width, said.classes.device)
    guessed = around(points, said.distances.flatten(1).T)
    sure = (said.classes.sigmoid() * said.centres.sigmoid()).sqrt().flatten()
    scores, best = sure.nan_to_num(0.0).topk(min(_CANDIDATES, len(sure)))
    best, scores = best[scores > _SCORE], scores[scores > _SCORE]
    chosen, labels = guessed[best % (height * width)], best // (height * width)
    limits = torch.tensor([width, height, width, height], device=chosen.device) * _STRIDE
    chosen = torch.minimum(chosen.clamp(min=0), limits)
    kept = boxes.suppress(chosen, scores, labels, _OVERLAP)[:_MOST]
    return Detections(chosen[kept], scores[kept], labels[kept])
