"""Floating-point operations of a call, counted as torch dispatches them.

`torch.utils.flop_counter` counts convolutions and matrix products; norms and elementwise operators,
which are what methods differ in, are counted here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
# Operations an element of the input, of what torch does in one operator.
_STATISTICS = 4  # mean 1; variance 3: subtract, square, add
_AFFINE = 2  # with statistics, scale and shift of a channel in two numbers
_SUMS = 4  # of the gradient 1; of its product with the centred input 3
_GRADIENT = 4  # of the input: gradient, input and a constant, each with its factor
_FORWARD = {
    _ATEN.native_batch_norm,
    _ATEN._native_batch_norm_legit,
    _ATEN.cudnn_batch_norm,
    _ATEN.miopen_batch_norm,
}
_WHOLE: Mapping[Any, int] = {
    **dict.fromkeys(_FORWARD, _STATISTICS + _AFFINE),
    _ATEN.native_group_norm: _STATISTICS + _AFFINE,
    _ATEN.native_layer_norm: _STATISTICS + _AFFINE,
    _ATEN.batch_norm_update_stats: _STATISTICS,
    _ATEN.batch_norm_stats: _STATISTICS,
    _ATEN.var_mean: _STATISTICS,
    _ATEN.var: _STATISTICS,
    _ATEN.batch_norm_elemt: _AFFINE,
    _ATEN.cudnn_batch_norm_backward: _SUMS + _GRADIENT,
    _ATEN.miopen_batch_norm_backward: _SUMS + _GRADIENT,
    _ATEN.native_group_norm_backward: _SUMS + _GRADIENT,
    _ATEN.native_layer_norm_backward: _SUMS + _GRADIENT,
    _ATEN.batch_norm_backward_reduce: _SUMS,
    _ATEN.batch_norm_backward_elemt: _GRADIENT,
}
_FREE = frozenset(
    {
        _ATEN.copy_,
        _ATEN._to_copy,
        _ATEN.clone,
        _ATEN.cat,
        _ATEN.stack,
        _ATEN.fill_,
        _ATEN.zero_,
        _ATEN.zeros,
        _ATEN.ones,
        _ATEN.full,
        _ATEN.zeros_like,
        _ATEN.ones_like,
        _ATEN.full_like,
        _ATEN.new_zeros,
        _ATEN.new_ones,
        _ATEN.new_full,
        _ATEN.scalar_tensor,
        _ATEN.index,
        _ATEN.index_select,
        _ATEN.gather,
        _ATEN.index_put_,
        _ATEN.slice_scatter,
        _ATEN.select_scatter,
        _ATEN.slice_backward,
        _ATEN.select_backward,
        _ATEN.roll,
        _ATEN.repeat,
        _ATEN.constant_pad_nd,
        _ATEN.upsample_nearest2d,
        _ATEN._local_scalar_dense,
        _ATEN._unsafe_view,
        _ATEN._reshape_alias,
        _ATEN.empty,
        _ATEN.empty_like,
        _ATEN.empty_strided,
        _ATEN.new_empty,
        _ATEN.detach,
    }
)


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call, a backward pass in it included.

    A multiplication and an addition are two. Convolutions and matrix products are counted as
    `torch.utils.flop_counter` does; of a norm that torch makes in one operator mean and variance
    are 4 an element, normalizing with scale and shift 2, the sums of the backward pass 4 and the
    input's gradient 4; another operator is one an element of the largest tensor in it, and none
    where it only moves data. Compiled kernels step aside, so that the same passes are counted
    wherever they are made.

    Args:
        call: What to count; it is made once.

    Returns:
        Operations.

    Example:
        >>> x = torch.ones(10, 4)
        >>> count_flops(lambda: x @ torch.ones(4, 3) + 1)
        270
    """
    with _Counter() as counter:
        call()
    return int(counter.total)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.total += _operations(func, args, kwargs, out)
        return out


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = func.overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet in _FREE or func.is_view:
        return 0
    if packet == _ATEN.native_batch_norm_backward:
        return _batch_norm_backward(args)
    if packet in _FORWARD and args[5] is False:
        return _AFFINE * int(args[0].numel())
    if packet in _WHOLE:
        return _WHOLE[packet] * int(args[0].numel())
    sizes = (tensor.numel() for tensor in _floats((args, tuple(kwargs.values()), out)))
    return int(max(sizes, default=0))


def _batch_norm_backward(args: tuple[Any, ...]) -> int:
    """Return the operations of a batch norm's backward, for the gradients asked for."""
    trains, (of_input, *of_affine) = args[7], args[9]
    sums = _SUMS if any(of_affine) or (of_input and trains) else 0
    gradient = (_GRADIENT if trains else 1) if of_input else 0
    return (sums + gradient) * int(args[0].numel())


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _floats(part)
