"""Faster R-CNN and Mask R-CNN of torchvision, where it is installed, with norms in all parts."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from papers.datasets.coco import BOX, CLASS, CROWD
from papers.networks.one_stage import Detections, Targets

_CHANNELS, _HIDDEN = 256, 1024


class TwoStage(nn.Module):
    """A detector of torchvision behind what all detectors here can do.

    Attributes:
        early: What the names of the parts begin with that do not learn where the ResNet was loaded:
            its first convolution and first stage.

    Args:
        detector: Faster R-CNN or Mask R-CNN.
    """

    early = tuple(f"detector.backbone.body.{part}" for part in ("conv1", "bn1", "layer1"))

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    @property
    def resnet(self) -> nn.Module:
        """The part whose weights may be loaded."""
        body = self.detector.backbone.body  # type: ignore[union-attr]
        assert isinstance(body, nn.Module)
        return body

    def forward(self, x: Tensor, targets: Any = None) -> Any:
        return self.detector(list(x), targets)

    def loss(self, x: Tensor, targets: Targets) -> Tensor:
        """All losses of both stages, in sum.

        Args:
            x: Images, ``(N, 3, height, width)``, standardized.
            targets: What is in them; crowds are left out.

        Returns:
            The loss.
        """
        losses: dict[str, Tensor] = self(x, _as_torchvision(targets))
        return torch.stack([one.float() for one in losses.values()]).sum()

    def find(self, x: Tensor) -> list[Detections]:
        """Return the objects in each image."""
        return [
            Detections(
                one["boxes"].float(),
                one["scores"].float(),
                one["labels"] - 1,
                one["masks"][:, 0] > 0.5 if "masks" in one else None,
            )
            for one in self(x)
        ]


def _as_torchvision(targets: Targets) -> list[dict[str, Tensor]]:
    """One dictionary per image; classes are counted from 1, 0 is the background."""
    found = []
    for k, rows in enumerate(targets.boxes):
        real = (rows[:, CLASS] >= 0) & (rows[:, CROWD] == 0)
        one = {"boxes": rows[real][:, BOX], "labels": rows[real, CLASS].long() + 1}
        if targets.masks is not None:
            one["masks"] = targets.masks[k][real].to(torch.uint8)
        found.append(one)
    return found


def two_stage(name: str, classes: int, shape: tuple[int, ...]) -> TwoStage:
    """Build a two-stage detector with a feature pyramid, freshly initialized.

    All convolutions of the ResNet, of the pyramid and of the heads have a batch norm, the box head
    four of them and one linear layer ("4conv1fc"), the mask head four. Images come standardized
    and in their size, which torchvision is told to resize them to.

    Args:
        name: ``fasterrcnn50``, ``fasterrcnn101``, ``maskrcnn50`` or ``maskrcnn101``: which detector
            on a ResNet how deep.
        classes: Kinds of objects, without a background.
        shape: Of an image, ``(3, height, width)``.

    Returns:
        The detector.

    Raises:
        ValueError: If torchvision is not installed.
    """
    try:
        resnets = importlib.import_module("torchvision.models.resnet")
        parts = importlib.import_module("torchvision.models.detection.backbone_utils")
        faster = importlib.import_module("torchvision.models.detection.faster_rcnn")
        masked = importlib.import_module("torchvision.models.detection.mask_rcnn")
    except ImportError as error:
        raise ValueError(f"model={name!r}: torchvision is not installed; 'onestage' is") from error
    depth = name.removeprefix("fasterrcnn").removeprefix("maskrcnn")
    body = parts.BackboneWithFPN(
        getattr(resnets, f"resnet{depth}")(weights=None),
        {f"layer{k + 1}": str(k) for k in range(4)},
        [256, 512, 1024, 2048],
        _CHANNELS,
        norm_layer=nn.BatchNorm2d,
    )
    norm = {"norm_layer": nn.BatchNorm2d}
    layers = [_CHANNELS] * 4
    options: dict[str, Any] = {
        "box_head": faster.FastRCNNConvFCHead((_CHANNELS, 7, 7), layers, [_HIDDEN], **norm),
        "box_predictor": faster.FastRCNNPredictor(_HIDDEN, classes + 1),
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "fixed_size": (shape[2], shape[1]),
    }
    if name.startswith("faster"):
        return TwoStage(faster.FasterRCNN(body, **options))
    options["mask_head"] = masked.MaskRCNNHeads(_CHANNELS, layers, 1, **norm)
    options["mask_predictor"] = masked.MaskRCNNPredictor(_CHANNELS, _CHANNELS, classes + 1)
    return TwoStage(masked.MaskRCNN(body, **options))
