"""Networks of torchvision.models with batch norm: what they are built with, without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.listing import Call, Listed, image

LISTS = "it takes lists of pictures, which a VirtualDataset does not"
VIRTUAL = dict.fromkeys(("vdn", "fs+vdn", "bs+vdn"), LISTS)


def classifier(name: str, size: int = 64, **settings: Any) -> Listed:
    """A network for pictures of 7 classes."""
    named = {"weights": None, "num_classes": 7, **settings}
    return Listed(Call("torchvision.models", name, (), named), image(3, size, size))


def segmenter(name: str) -> Listed:
    """A network for segmentation; with an auxiliary classifier where there is one."""
    named: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 4}
    if not name.startswith("lraspp"):
        named["aux_loss"] = True
    build = Call("torchvision.models.segmentation", name, (), named)
    return Listed(build, image(3, 64, 64))


def video(name: str, frames: int = 8) -> Listed:
    """A network for short clips."""
    build = Call("torchvision.models.video", name, (), {"weights": None, "num_classes": 5})
    return Listed(build, image(3, frames, 64, 64))


def _scene(n: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures with two boxes in each, their masks and key points."""
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [30.0, 20.0, 90.0, 80.0]])
    masks = torch.zeros(2, 96, 96, dtype=torch.uint8)
    masks[0, 8:60, 8:60] = masks[1, 20:80, 30:90] = 1
    points = torch.tensor([[[20.0, 20.0, 1.0], [50.0, 50.0, 1.0]]]).repeat(2, 1, 1)
    points[1, :, :2] += 20.0
    target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}
    target |= {"masks": masks, "keypoints": points}
    return [torch.rand(3, 96, 96) for _ in range(n)], [dict(target) for _ in range(n)]


def _maps(model: nn.Module, scene: tuple[list[Tensor], Any]) -> list[Tensor]:
    """The maps of the backbone and what the heads make of them, before boxes are chosen.

    Which boxes are kept turns on comparisons of scores that are all but equal here.
    """
    pictures: Any = torch.stack(scene[0])
    maps = list(model.backbone(pictures).values())
    rpn = getattr(model, "rpn", None)
    found = model.head(maps) if rpn is None else rpn.head(maps)
    nested = list(found.values() if isinstance(found, dict) else found)
    if rpn is not None:
        crops = torch.randn(2, maps[0].shape[1], 7, 7)
        nested.append(model.roi_heads.box_head(crops))
    return [*maps, *nested]


def detector(name: str, size: int | None = 96, **settings: Any) -> Listed:
    """A network that finds boxes; pictures are not made larger than they are."""
    named: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
    if size is not None:
        named |= {"min_size": size, "max_size": size}
    build = Call("torchvision.models.detection", name, (), {**named, **settings})
    return Listed(build, _scene, skipped=VIRTUAL, look=_maps)


PLAIN = (
    "densenet121", "efficientnet_b0",
    "efficientnet_b1", "efficientnet_v2_s", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0",
    "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "resnet34", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "vgg11_bn",
    "wide_resnet50_2",
)  # fmt: skip

NETWORKS: dict[str, Listed] = {
    **{name: classifier(name) for name in PLAIN},
    "googlenet": classifier("googlenet", init_weights=False, aux_logits=True),
    "inception_v3": classifier("inception_v3", 96, init_weights=False, aux_logits=False),
    "maxvit_t": classifier("maxvit_t", 224),
    **{
        name: segmenter(name)
        for name in (
            "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50",
            "fcn_resnet50", "lraspp_mobilenet_v3_large",
        )
    },
    **{name: video(name) for name in ("mc3_18", "r2plus1d_18", "r3d_18")},
    "s3d": video("s3d", 16),
    **{
        name: detector(name)
        for name in (
            "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn",
            "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn",
            "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn",
            "retinanet_resnet50_fpn_v2",
        )
    },
    "keypointrcnn_resnet50_fpn": detector("keypointrcnn_resnet50_fpn", num_keypoints=2),
    "ssdlite320_mobilenet_v3_large": detector("ssdlite320_mobilenet_v3_large", None),
}  # fmt: skip

LEFT_OUT: dict[str, str] = {
    "alexnet": "it has no norm",
    "convnext_*": "they have layer norm",
    "densenet161, 169 and 201": "densenet121 with more blocks",
    "deeplabv3_resnet101, fcn_resnet101": "those listed with more blocks",
    "efficientnet_b2 to b7, v2_m, v2_l": "those listed with more blocks",
    "raft_*": "optical flow; raft_large has batch norm in one encoder and takes pairs of frames",
    "regnet_* above 400mf": "those listed with more channels",
    "resnet101 and 152, resnext101_*, wide_resnet101_2": "those listed with more blocks",
    "ssd300_vgg16": "it has no batch norm",
    "squeezenet*": "they have no norm",
    "swin_*, vit_*, mvit_*, swin3d_*": "they have layer norm",
    "vgg11 to vgg19": "they have no norm",
    "vgg13_bn to vgg19_bn": "vgg11_bn with more layers",
}
