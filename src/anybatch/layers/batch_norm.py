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

    Args:
        num_features: Channels C.
        eps: Added to the variance (default 1e-5).
        momentum: Weight of the newest batch in the running statistics (default
            0.1); None averages over all batches.
        affine: Learn weight and bias (default True).
        bias: Learn the shift, where affine is true (default True).
        track_running_stats: Keep running statistics (default True).
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
        norm_batch_size: Normalize in successive batches of so many examples
            (default None: the whole batch).
        memories: Memories that these batches take in turn (default 1).
        example_weight: Share of an example's own statistics at inference, from 0
            to 1 (default 0.0; four-things, section 3.1).
        process_group: Processes whose batches are one in training, a process group or "world"
            (default None: this process alone).
        outlier_limit: Times its running variance that a channel of a batch may have and enter
            memory (default None: any).
        momentum_warmup: A start of the running statistics, which follow the last ``1 / k`` of the
            batches until `momentum` is more (default 0: none).

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d.

    Raises:
        ValueError: For an argument out of range or an input of another shape.
        TypeError: For an input that is not floating point.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.BatchNorm2d(8)
        >>> norm(torch.randn(1, 8, 1, 1)).shape  # torch's layer raises here
        torch.Size([1, 8, 1, 1])
    """


class BatchNorm1d(BatchNorm, dims=1): ...


class BatchNorm2d(BatchNorm, dims=2): ...


class BatchNorm3d(BatchNorm, dims=3): ...
