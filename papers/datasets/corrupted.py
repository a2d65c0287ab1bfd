"""CIFAR-100 with low contrast and noise: the same classes in another domain."""

from dataclasses import replace

import torch
from torch import Tensor

from anybatch.tools.data import LOADERS, Dataset
from anybatch.tools.run import Run

CONTRAST = 0.4  # share of an image's deviations from its mean that remains
NOISE = 0.3  # standard deviation of the noise, in standardized pixels


def load(run: Run) -> Dataset:
    """Load CIFAR-100 and corrupt its training and held-out images, the same way every time.

    With m the mean of an image per channel and standardized pixels x::

        x' = m + CONTRAST * (x - m) + NOISE * n,    n ~ N(0, 1)

    Contrast and noise are two of the corruptions of CIFAR-100-C (Hendrycks and Dietterich, 2019).

    Args:
        run: As `anybatch.tools.data.load` takes it.

    Returns:
        The data.
    """
    clean = LOADERS["cifar100"](run.but(data="cifar100"))
    assert isinstance(clean.train_x, Tensor) and isinstance(clean.test_x, Tensor)
    return replace(
        clean,
        name="cifar100-corrupted",
        train_x=_corrupt(clean.train_x, 0),
        test_x=_corrupt(clean.test_x, 1),
    )


def _corrupt(x: Tensor, seed: int) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    mean = x.mean((2, 3), keepdim=True)
    return (1 - CONTRAST) * mean + CONTRAST * x + NOISE * noise
