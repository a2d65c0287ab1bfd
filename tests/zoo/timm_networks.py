"""Networks of timm with batch norm: a fixed list, one of each family, without weights."""

from __future__ import annotations

from typing import Any

from zoo.listing import Call, Listed, image


def made(name: str, size: int = 64, **settings: Any) -> Listed:
    """A network by its name in timm, for 7 classes, without dropout of paths."""
    named = {"pretrained": False, "num_classes": 7, **settings}
    return Listed(Call("timm", "create_model", (name,), named), image(3, size, size))


# One of each family, the smallest.
NAMES = (
    "cspresnet50", "densenet121", "dla34", "dpn68", "ecaresnet26t", "efficientnet_b0",
    "efficientnet_lite0", "ese_vovnet19b_dw", "fbnetc_100", "gernet_s", "ghostnet_100",
    "hardcorenas_a", "hrnet_w18_small", "lcnet_050", "legacy_seresnet18", "mixnet_s",
    "mnasnet_small", "mobilenetv2_050", "mobilenetv3_small_050", "mobileone_s0", "regnetx_002",
    "regnety_002", "repvgg_a0", "res2net50_26w_4s", "resnest14d", "resnet10t", "resnet18",
    "resnext50_32x4d", "rexnet_100", "selecsls42b", "seresnet50", "skresnet18",
    "tf_efficientnetv2_b0", "tinynet_e", "vgg11_bn", "xception41",
)  # fmt: skip

NETWORKS: dict[str, Listed] = {
    **{name: made(name) for name in NAMES},
    "efficientformer_l1": made("efficientformer_l1", 224),
    "inception_v3": made("inception_v3", 96),
    "levit_128s": made("levit_128s", 224),
    "mobilevit_xxs": made("mobilevit_xxs"),
}
