"""Batch normalization (Ioffe and Szegedy 2015): torch's arithmetic on this library's passes."""

from anybatch.core.norm_layer import NormLayer


class BatchNorm(NormLayer):
    """Batch normalization over ``(N, C, ...)``.

    ::

        y = weight * (x - mean) / sqrt(var + eps) + bias

    with the mean and the biased variance of each channel over the batch, and at
    inference the running ones. Equal to ``torch.nn.BatchNorm`` where that is
    defined; a batch with one value a channel is normalized by the running
    statistics instead of raising, and a channel that is not finite leaves its
    running statistics alone.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.BatchNorm2d(8)
        >>> norm(torch.randn(1, 8, 1, 1)).shape  # torch's layer raises here
        torch.Size([1, 8, 1, 1])
    """


class BatchNorm1d(BatchNorm, dims=1): ...


class BatchNorm2d(BatchNorm, dims=2): ...


class BatchNorm3d(BatchNorm, dims=3): ...
