"""Whole networks with batch norm, small and without downloaded weights: a few for every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.listing import Listed, image
from zoo.monai_networks import NETWORKS as MONAI
from zoo.transformers_networks import NETWORKS as TRANSFORMERS


@dataclass(frozen=True)
class Network:
    """How to build a network, what it takes (by batch size), and whether building it is slow."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    slow: bool = False


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


def listed(network: Listed, slow: bool = False) -> Network:
    """A network of the lists of all that the libraries have."""
    return Network(network.build, network.inputs, slow)


NETWORKS: dict[str, Network] = {
    "convnet": Network(convnet, image(3, 12, 12)),
    "tabular": Network(Tabular, image(6)),
    "pre-activation": Network(PreActivation, image(3, 8, 8)),
    "vgg": Network(vgg, image(3, 8, 8)),
    "inception": Network(Inception, image(3, 8, 8)),
    "residual": Network(Residual, image(3, 8, 8)),
    "wave": Network(Wave, image(2, 20)),
    "monai densenet121": listed(MONAI["DenseNet121"], slow=True),
    "monai resnet 3d": listed(MONAI["ResNet"]),
    "monai segresnet": listed(MONAI["SegResNet"]),
    "monai unet": listed(MONAI["UNet"]),
    "transformers resnet": listed(TRANSFORMERS["resnet"]),
    "transformers regnet": listed(TRANSFORMERS["regnet"]),
    "transformers mobilenet v1": listed(TRANSFORMERS["mobilenet_v1"], slow=True),
    "transformers mobilenet v2": listed(TRANSFORMERS["mobilenet_v2"], slow=True),
    "transformers efficientnet": listed(TRANSFORMERS["efficientnet"], slow=True),
    "transformers levit": listed(TRANSFORMERS["levit"], slow=True),
    "transformers cvt": listed(TRANSFORMERS["cvt"], slow=True),
    "transformers patchtst": listed(TRANSFORMERS["patchtst"], slow=True),
    "transformers hgnet v2": listed(TRANSFORMERS["hgnet_v2"], slow=True),
}
