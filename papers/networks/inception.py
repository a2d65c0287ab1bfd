"""Inception-v3 (Szegedy et al. 2016) without its auxiliary classifier."""

import torch
from torch import Tensor, nn

Size = int | tuple[int, int]


def _unit(
    inputs: int, outputs: int, size: Size, stride: int = 1, padding: Size = 0
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU())


class _Branches(nn.ModuleList):
    """Branches on the same input, whose outputs are put side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


def _pool() -> nn.AvgPool2d:
    return nn.AvgPool2d(3, 1, 1)


def _small(inputs: int, pooled: int) -> _Branches:
    """Two 3x3 convolutions in the place of a 5x5 one."""
    return _Branches(
        [
            _unit(inputs, 64, 1),
            nn.Sequential(_unit(inputs, 48, 1), _unit(48, 64, 5, padding=2)),
            nn.Sequential(
                _unit(inputs, 64, 1), _unit(64, 96, 3, padding=1), _unit(96, 96, 3, padding=1)
            ),
            nn.Sequential(_pool(), _unit(inputs, pooled, 1)),
        ]
    )


def _factored(inputs: int, width: int) -> _Branches:
    """A row and a column in the place of a 7x7 convolution."""
    row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))

    def unit(inputs: int, outputs: int, shape: tuple[Size, Size]) -> nn.Sequential:
        return _unit(inputs, outputs, shape[0], padding=shape[1])

    return _Branches(
        [
            _unit(inputs, 192, 1),
            nn.Sequential(
                _unit(inputs, width, 1), unit(width, width, row), unit(width, 192, column)
            ),
            nn.Sequential(
                _unit(inputs, width, 1),
                unit(width, width, column),
                unit(width, width, row),
                unit(width, width, column),
                unit(width, 192, row),
            ),
            nn.Sequential(_pool(), _unit(inputs, 192, 1)),
        ]
    )


def _wide(inputs: int) -> _Branches:
    """Rows and columns side by side, for the coarsest maps."""

    def fork() -> _Branches:
        row = _unit(384, 384, (1, 3), padding=(0, 1))
        return _Branches([row, _unit(384, 384, (3, 1), padding=(1, 0))])

    return _Branches(
        [
            _unit(inputs, 320, 1),
            nn.Sequential(_unit(inputs, 384, 1), fork()),
            nn.Sequential(_unit(inputs, 448, 1), _unit(448, 384, 3, padding=1), fork()),
            nn.Sequential(_pool(), _unit(inputs, 192, 1)),
        ]
    )


def _first_reduction() -> _Branches:
    double = [_unit(288, 64, 1), _unit(64, 96, 3, padding=1), _unit(96, 96, 3, 2)]
    return _Branches([_unit(288, 384, 3, 2), nn.Sequential(*double), nn.MaxPool2d(3, 2)])


def _second_reduction() -> _Branches:
    factored = [
        _unit(768, 192, 1),
        _unit(192, 192, (1, 7), padding=(0, 3)),
        _unit(192, 192, (7, 1), padding=(3, 0)),
        _unit(192, 192, 3, 2),
    ]
    single = nn.Sequential(_unit(768, 192, 1), _unit(192, 320, 3, 2))
    return _Branches([single, nn.Sequential(*factored), nn.MaxPool2d(3, 2)])


def inception_v3(classes: int, channels: int, large: bool) -> nn.Sequential:
    """Build Inception-v3.

    Args:
        classes: Outputs.
        channels: Of the images.
        large: Whether the stem makes images eight times smaller, as for ImageNet at 299 pixels;
            that of small images has the same convolutions and leaves their size.

    Returns:
        The network.
    """
    stride, padding = (2, 0) if large else (1, 1)
    pool: list[nn.Module] = [nn.MaxPool2d(3, 2)] if large else []
    return nn.Sequential(
        _unit(channels, 32, 3, stride, padding),
        _unit(32, 32, 3, padding=padding),
        _unit(32, 64, 3, padding=1),
        *pool,
        _unit(64, 80, 1),
        _unit(80, 192, 3, padding=padding),
        *pool,
        _small(192, 32),
        _small(256, 64),
        _small(288, 64),
        _first_reduction(),
        _factored(768, 128),
        _factored(768, 160),
        _factored(768, 160),
        _factored(768, 192),
        _second_reduction(),
        _wide(1280),
        _wide(2048),
        nn.AdaptiveAvgPool2d(1),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(2048, classes),
    )
