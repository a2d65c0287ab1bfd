"""The passes in plain torch: every device, dtype and memory format.

Each pass is written once, for one group of examples, on torch's own batch-norm
operators (vectorized, mixed precision, channels_last kept). More groups are
reached in one of two ways: an NCHW batch is seen as ``(1, N * C, ...)``, so that
one call serves all groups; any other layout is cut along the batch.

Tables of statistics are ``(G, C)``, or ``(C,)`` where there is one group; float32,
or float64 for a float64 input.
"""

import torch
from torch import Tensor

from anybatch.backends.aten.pooling import expand_rows, pool_rows, row_counts
from anybatch.backends.aten.scalars import scalar

LOW_PRECISION = (torch.float16, torch.bfloat16)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Type of the statistics of ``x``: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def second_moment(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Mean square of each group of examples and channel: a table ``(G, C)``."""
    _, squares = sums(x, x, sizes, None)
    count = row_counts(sizes, x.numel() // (x.shape[0] * x.shape[1]), squares)
    return squares / count


def moments(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group of examples and channel.

    Args:
        x: ``(N, C, ...)``.
        sizes: Examples in each group; they sum to N.

    Returns:
        Two tables ``(G, C)``.
    """
    if len(sizes) == 1:
        return _moments(x)
    if x.is_contiguous():
        mean, var = _moments(_instances(x))
        return pool_rows(mean.view(x.shape[:2]), var.view(x.shape[:2]), sizes)
    parts = [_moments(part) for part in x.split(sizes)]
    return torch.stack([mean for mean, _ in parts]), torch.stack([var for _, var in parts])


def affine(
    x: Tensor,
    sizes: tuple[int, ...],
    mean: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias``, in the type and format of ``x``.

    Args:
        x: ``(N, C, ...)``.
        sizes: Examples in each group.
        mean: Table ``(G, C)``; None is zero.
        var: Table ``(G, C)``.
        weight: Table ``(G, C)``; None is one.
        bias: Table ``(G, C)``; None is zero.
        eps: Added to the variance.

    Returns:
        A tensor like ``x``.
    """
    mean = torch.zeros_like(var) if mean is None else mean
    if len(sizes) == 1:
        return _affine(x, mean, var, weight, bias, eps)
    if x.is_contiguous():
        rows = [_example_rows(t, sizes) for t in (weight, bias)]
        table = (expand_rows(mean, sizes).reshape(-1), expand_rows(var, sizes).reshape(-1))
        y = _affine(_instances(x), *table, rows[0], rows[1], eps)
        # Not a view to autograd, which refuses to change one in place (nn.ReLU(inplace=True)).
        kept: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
        return kept
    parts = [
        _affine(part, mean[g], var[g], _row(weight, g), _row(bias, g), eps)
        for g, part in enumerate(x.split(sizes))
    ]
    return torch.cat(parts)


def sums(
    dy: Tensor, x: Tensor, sizes: tuple[int, ...], center: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The two sums of the backward pass, ``sum(dy)`` and ``sum(dy * (x - center))``.

    Args:
        dy: Gradient of the output, like ``x``.
        x: ``(N, C, ...)``.
        sizes: Examples in each group.
        center: Table ``(G, C)``; None is zero.

    Returns:
        Two tables ``(G, C)``.
    """
    if center is None:
        shape = (x.shape[1],) if len(sizes) == 1 else (len(sizes), x.shape[1])
        center = torch.zeros(shape, dtype=statistics_dtype(x), device=x.device)
    if len(sizes) == 1:
        return _sums(dy, x, center)
    if x.is_contiguous():
        rows = expand_rows(center, sizes).reshape(-1)
        first, second = _sums(_instances(dy.contiguous()), _instances(x), rows)
        return _sum_rows(first.view(x.shape[:2]), sizes), _sum_rows(second.view(x.shape[:2]), sizes)
    pieces = zip(dy.split(sizes), x.split(sizes), center, strict=True)
    parts = [_sums(d, part, c) for d, part, c in pieces]
    return torch.stack([first for first, _ in parts]), torch.stack([second for _, second in parts])


def gradient(
    dy: Tensor,
    x: Tensor,
    sizes: tuple[int, ...],
    center: Tensor | None,
    on_dy: Tensor,
    on_x: Tensor | None,
    constant: Tensor | None,
) -> Tensor:
    """``on_dy * dy + on_x * (x - center) + constant``, in the type and format of ``x``.

    Args:
        dy: Gradient of the output, like ``x``.
        x: ``(N, C, ...)``.
        sizes: Examples in each group.
        center: Table ``(G, C)``; None is zero.
        on_dy: Factor of dy, table ``(G, C)``.
        on_x: Factor of x, table ``(G, C)``; None is zero.
        constant: Table ``(G, C)``; None is zero.

    Returns:
        The gradient of the input, like ``x``.
    """
    if len(sizes) == 1:
        return _gradient(dy, x, center, on_dy, on_x, constant)
    if x.is_contiguous():
        rows = [_example_rows(t, sizes) for t in (center, on_x, constant)]
        factor = expand_rows(on_dy, sizes).reshape(-1)
        flat = _gradient(_instances(dy.contiguous()), _instances(x), rows[0], factor, *rows[1:])
        return flat.view(x.shape)
    parts = [
        _gradient(d, part, _row(center, g), on_dy[g], _row(on_x, g), _row(constant, g))
        for g, (d, part) in enumerate(zip(dy.split(sizes), x.split(sizes), strict=True))
    ]
    return torch.cat(parts)


def exact_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Sums and gradient in one call, where all of both flows through one group's statistics.

    Args:
        dy: Gradient of the output, like ``x``.
        x: ``(N, C, ...)``, one group.
        mean: Mean ``(C,)`` of the batch.
        var: Biased variance ``(C,)`` of the batch.
        weight: Row ``(C,)`` or None.
        eps: Added to the variance.
        mask: Which of input, weight and bias need a gradient.

    Returns:
        Gradients of input, weight and bias, None where not asked for.
    """
    inv = torch.rsqrt(var + scalar(eps))
    weight = None if weight is None else weight.contiguous()  # whose strides torch does not read
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    grads = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None, None, mean, inv, True, eps, list(mask)
    )
    return grads


def _row(table: Tensor | None, group: int) -> Tensor | None:
    return None if table is None else table[group]


def _example_rows(table: Tensor | None, sizes: tuple[int, ...]) -> Tensor | None:
    return None if table is None else expand_rows(table, sizes).reshape(-1)


def _instances(x: Tensor) -> Tensor:
    """An NCHW batch as one example whose channels are the examples' channels."""
    return x.view(1, x.shape[0] * x.shape[1], -1)


def _sum_rows(table: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return torch.stack([part.sum(0) for part in table.split(sizes)])


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = var = None
    if x.dtype in LOW_PRECISION:
        # Float32 buffers are what asks the operator for float32 statistics.
        mean, var = (torch.zeros(x.shape[1], device=x.device) for _ in range(2))
    return torch.batch_norm_update_stats(x, mean, var, 0.0)


def _affine(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)


def _sums(dy: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    # In evaluation mode and with unit variance, the gradients of bias and weight are the two sums.
    _, second, first = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, center, torch.ones_like(center), None, None, False, 0.0, [False, True, True]
    )
    if first.dtype != center.dtype:  # a compiler's tensors without data believe it is that of dy
        first, second = first.to(center.dtype), second.to(center.dtype)
    return first, second


def _gradient(
    dy: Tensor,
    x: Tensor,
    center: Tensor | None,
    on_dy: Tensor,
    on_x: Tensor | None,
    constant: Tensor | None,
) -> Tensor:
    shape = (1, -1, *(1,) * (x.dim() - 2))
    scaled = dy * on_dy.view(shape)
    if on_x is not None:
        # Subtracting first keeps the small differences of a large mean.
        column = on_x.view(shape)
        scaled.add_(x * column if center is None else (x - center.view(shape)).mul_(column))
    if constant is not None:
        scaled.add_(constant.view(shape))
    return scaled.to(x.dtype)
