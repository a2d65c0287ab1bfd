"""Batch normalization (Ioffe and Szegedy 2015): torch's arithmetic on this library's passes."""

from types import ModuleType

from torch import Tensor

from anybatch.backends.protocol import Recipe
from anybatch.core.compiled import ForwardData, Kept
from anybatch.core.norm_layer import Batch, NormLayer
from anybatch.core.statistics import Statistics


class _BatchNorm(NormLayer):
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
        track_running_stats: Keep running statistics (default True).
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
        norm_batch_size: Normalize in successive batches of so many examples
            (default None: the whole batch).
        example_weight: Share of an example's own statistics at inference, from 0
            to 1 (default 0.0; four-things, section 3.1).
        process_group: Processes whose batches are one in training, a process group or "world"
            (default None: this process alone).
        outlier_limit: Times its running variance that a channel of a batch may have and enter
            memory (default None: any).

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

    fuses = True

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        assert mean is not None
        if update:
            self.track(mean, batch.unbiased(var))
        return Statistics(mean, var)

    def fused(self, loops: ModuleType, data: ForwardData, groups: int, update: bool) -> Kept:
        return fused_groups(self, loops, data, groups, update)

    def recipe(self, examples: int, update: bool) -> Recipe | None:
        return Recipe()


def fused_groups(
    layer: NormLayer, loops: ModuleType, data: ForwardData, groups: int, update: bool
) -> Kept:
    """`NormLayer.fused` of layers whose groups of examples are normalized by their own alone."""
    columns, channels, running = layer.columns, layer.num_features, layer._running()
    used = own = loops.table((2, groups, columns))
    if columns != channels:
        own = loops.table((2, groups, channels))
    memory = (*running[:2], *loops.NONE)
    constants = (loops.NO_COUNT, loops.NO_SETTINGS, layer._number(), layer.eps, update)
    loops.forward(loops.PLAIN, *data, own, used, running, memory, *constants)
    return Kept(used)


class BatchNorm1d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    dims = 1


class BatchNorm2d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    dims = 2


class BatchNorm3d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    dims = 3
