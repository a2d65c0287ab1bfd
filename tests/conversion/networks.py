"""Whole networks with batch norm, small and without downloaded weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """How to build a network, what it takes (by batch size), and whether building it is slow."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    slow: bool = False


def image(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def pixels(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {"pixel_values": torch.randn(n, *shape)}


# Plain torch


class Tabular(nn.Module):
    """BN first, then Linear-BN-ReLU twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(6)
        self.body = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.first(x)))


class PreActivation(nn.Module):
    """A block of the pre-activation kind: BN-ReLU-conv, where an addition feeds the next BN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            y = self.convs[i](self.norms[i](x).relu())
            x = x + self.convs[i + 1](self.norms[i + 1](y).relu())
        return self.head(x.mean((2, 3)))


class Wave(nn.Module):
    """1d convolutions, grouped and transposed, norms kept in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 8, 4, stride=2, groups=2)
        self.up = nn.ConvTranspose1d(8, 12, 4, stride=2, groups=4)
        self.norms = nn.ModuleDict({"down": nn.BatchNorm1d(8), "up": nn.BatchNorm1d(12)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms["down"](self.down(x)).relu()
        return self.norms["up"](self.up(x))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def vgg() -> nn.Sequential:
    """Convolutions in a chain, as in VGG."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


class Unit(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Inception(nn.Module):
    """Blocks of three branches, concatenated, and no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 8, 3)
        self.blocks = nn.ModuleList(nn.ModuleDict(self._branches(n)) for n in (8, 12))
        self.head = nn.Linear(12, 4)

    def _branches(self, inputs: int) -> dict[str, nn.Module]:
        return {
            "one": Unit(inputs, 4, 1),
            "three": nn.Sequential(Unit(inputs, 4, 1), Unit(4, 4, 3)),
            "pool": nn.Sequential(nn.AvgPool2d(3, 1, 1), Unit(inputs, 4, 1)),
        }

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.cat([branch(x) for branch in block.values()], 1)
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """Residual blocks whose shortcuts hold no norm, as in CIFAR ResNets of the first kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 8, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(Unit(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


# MONAI


def densenet() -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(2, 1, 3, init_features=16, growth_rate=8)


def resnet3d() -> nn.Module:
    from monai.networks.nets import ResNet

    widths = [8, 8, 16, 16]
    return ResNet("basic", [1, 1, 1, 1], widths, spatial_dims=3, n_input_channels=1, num_classes=2)


def segresnet() -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(3, 8, 1, 2, norm=("batch", {}), blocks_down=(1, 1), blocks_up=(1,))


def unet() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(2, 1, 2, channels=(8, 16, 16), strides=(2, 2), num_res_units=1, norm="batch")


# transformers


def hf_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2])
    return ResNetForImageClassification(config)


def hf_regnet() -> nn.Module:
    from transformers import RegNetConfig, RegNetModel

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}
    return RegNetModel(RegNetConfig(**sizes))


def hf_mobilenet_v1() -> nn.Module:
    from transformers import MobileNetV1Config, MobileNetV1Model

    return MobileNetV1Model(MobileNetV1Config(depth_multiplier=0.125))


def hf_mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25))


def hf_efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256)
    return EfficientNetModel(config)


def hf_levit() -> nn.Module:
    from transformers import LevitConfig, LevitModel

    config = LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1], key_dim=[4, 4, 4], attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2],
        down_ops=[["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2]],
    )  # fmt: skip
    return LevitModel(config)


def hf_cvt() -> nn.Module:
    from transformers import CvtConfig, CvtModel

    config = CvtConfig(embed_dim=[8, 12, 16], num_heads=[1, 2, 2], depth=[1, 2, 3])
    return CvtModel(config)


def hf_patchtst() -> nn.Module:
    from transformers import PatchTSTConfig, PatchTSTModel

    sizes = {"num_hidden_layers": 1, "d_model": 16, "ffn_dim": 16, "num_attention_heads": 2}
    return PatchTSTModel(
        PatchTSTConfig(num_input_channels=2, context_length=16, patch_length=4, **sizes)
    )


def hf_hgnet() -> nn.Module:
    from transformers import HGNetV2Config, HGNetV2ForImageClassification

    config = HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16], stage_mid_channels=[8, 8],
        stage_out_channels=[16, 24], stage_num_blocks=[1, 1], stage_numb_of_layers=[2, 2],
        stage_downsample=[False, True], stage_light_block=[False, True],
        stage_kernel_size=[3, 3], embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1],
    )  # fmt: skip
    return HGNetV2ForImageClassification(config)


NETWORKS: dict[str, Network] = {
    "convnet": Network(convnet, image(3, 12, 12)),
    "tabular": Network(Tabular, image(6)),
    "pre-activation": Network(PreActivation, image(3, 8, 8)),
    "vgg": Network(vgg, image(3, 8, 8)),
    "inception": Network(Inception, image(3, 8, 8)),
    "residual": Network(Residual, image(3, 8, 8)),
    "wave": Network(Wave, image(2, 20)),
    "monai densenet121": Network(densenet, image(1, 32, 32), slow=True),
    "monai resnet 3d": Network(resnet3d, image(1, 16, 16, 16)),
    "monai segresnet": Network(segresnet, image(1, 8, 8, 8)),
    "monai unet": Network(unet, image(1, 16, 16)),
    "transformers resnet": Network(hf_resnet, pixels(3, 32, 32)),
    "transformers regnet": Network(hf_regnet, pixels(3, 32, 32)),
    "transformers mobilenet v1": Network(hf_mobilenet_v1, pixels(3, 32, 32), slow=True),
    "transformers mobilenet v2": Network(hf_mobilenet_v2, pixels(3, 32, 32), slow=True),
    "transformers efficientnet": Network(hf_efficientnet, pixels(3, 32, 32), slow=True),
    "transformers levit": Network(hf_levit, pixels(3, 64, 64), slow=True),
    "transformers cvt": Network(hf_cvt, pixels(3, 64, 64), slow=True),
    "transformers patchtst": Network(
        hf_patchtst, lambda n: {"past_values": torch.randn(n, 16, 2)}, slow=True
    ),
    "transformers hgnet v2": Network(hf_hgnet, pixels(3, 32, 32), slow=True),
}


def randomize(model: nn.Module) -> nn.Module:
    """Give a network the look of a trained one: statistics and affine parameters at random."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is None:
                continue
            module.running_mean.normal_(0.0, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(7)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.3)
    return model
