"""Networks of segmentation-models-pytorch, each decoder on a small encoder, without weights."""

from __future__ import annotations

from typing import Any

from zoo.listing import Call, Listed, image


def made(name: str, encoder: str = "resnet18", **settings: Any) -> Listed:
    """A network by the name of its class."""
    named = {"encoder_name": encoder, "encoder_weights": None, "in_channels": 3, "classes": 2}
    build = Call("segmentation_models_pytorch", name, (), {**named, **settings})
    return Listed(build, image(3, 64, 64))


NETWORKS: dict[str, Listed] = {
    **{
        name: made(name)
        for name in (
            "DeepLabV3", "DeepLabV3Plus", "Linknet", "MAnet", "PAN", "PSPNet", "UPerNet",
            "UnetPlusPlus",
        )
    },
    "FPN": made("FPN"),
    "Unet": made("Unet", decoder_attention_type="scse"),
    "Unet of EfficientNet": made("Unet", "efficientnet-b0"),
    "Unet of MobileNet": made("Unet", "mobilenet_v2"),
    "Unet of VGG": made("Unet", "vgg11_bn"),
    "Unet of DenseNet": made("Unet", "densenet121"),
}  # fmt: skip
