"""Weight centralization (moving-average-bn, equation 18).

A layer keeps its weights and uses them minus their mean, so that its output has
little mean to subtract: what the uncentred form of moving average batch
normalization needs. The class of the layer is switched to one that centres in
its forward; parameters, hooks and ``state_dict`` keys stay as they were.
"""

import warnings
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from anybatch import backends
from anybatch.backends.native_memory import address_of
from anybatch.core.graphs import as_leaf, refuse_script

_Module = TypeVar("_Module", bound=nn.Module)


UNCENTRED = "uncentred_weight"  # the weight as it is, where a checkpoint's "weight" is the centred
CENTRED = "centralized"  # in the checkpoint of a layer whose norm does not tell of it


def centralized_weight(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weights of a convolution or linear layer, minus each output channel's mean.

    Args:
        module: The layer.
        weight: Its weights (default None: those that it has).
    """
    weight = module.weight if weight is None else weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    if not isinstance(module, _ConvTransposeNd):  # (out, in / groups, ...)
        dims = tuple(range(1, weight.dim()))
        return _centre(weight, dims)
    # (groups, in / groups, out / groups, ...)
    grouped = weight.unflatten(0, (module.groups, -1))
    return _centre(grouped, (1, *range(3, grouped.dim()))).flatten(0, 1)


def _centre(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    tracing = torch._C._get_tracing_state() is not None  # which cannot save a Python function
    if torch._C._are_functorch_transforms_active() or tracing:
        return weight - weight.mean(dims, keepdim=True)
    centred: Tensor = _Centre.apply(weight, dims)  # type: ignore[no-untyped-call]
    return centred


def _minus_mean(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    loops = (
        backends.row_kernels_for(weight) if dims[0] == 1 and len(dims) == weight.dim() - 1 else None
    )
    if loops is None:
        return weight - weight.mean(dims, keepdim=True)
    centred = torch.empty_like(weight)
    shape = weight.shape[0], weight.numel() // weight.shape[0]
    places = address_of(weight, weight.dtype, weight.numel()), centred.data_ptr()
    loops.centre(loops.LIKE[weight.dtype], *places, shape, loops.parts(weight.numel()))
    return centred


class _Centre(torch.autograd.Function):
    """``w - mean(w)``; a projection, so that the gradient is centred too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.dims = dims
        return _minus_mean(weight, dims)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return _minus_mean(gradient, ctx.dims), None
        centred: Tensor = _Centre.apply(gradient, ctx.dims)  # type: ignore[no-untyped-call]
        return centred, None


class _Centralized(nn.Module):
    """A leaf of symbolic traces, as torch's own layers are.

    Attributes:
        tells_centred: Whether its own entry in a checkpoint says that it centres its weights, so
            that no layer loads them that uses them as they are.
        centralized: That entry.
    """

    tells_centred = True
    centralized = torch.tensor(1, device="cpu")

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(input, Tensor):
            return as_leaf(self, input, *args, **kwargs)
        y: Tensor = super().forward(input, *args, **kwargs)
        return y

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tells_centred:
            destination[prefix + CENTRED] = torch.tensor(1, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Load; a checkpoint for plain code holds the weights as they were beside centred ones."""
        own = {key: v for key, v in state_dict.items() if key != prefix + CENTRED}
        weight = own.pop(prefix + UNCENTRED, None)
        if weight is not None:
            own[prefix + "weight"] = weight
        elif self.tells_centred and prefix + CENTRED not in state_dict:
            missing_keys.append(prefix + CENTRED)
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, *rest)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


class _CentralizedConv(_Centralized, _ConvNd):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, centralized_weight(self), bias)
        return y


class CentralizedConv1d(_CentralizedConv, nn.Conv1d):
    """A 1d convolution with centred weights; made by `weight_centralization`."""


class CentralizedConv2d(_CentralizedConv, nn.Conv2d):
    """A 2d convolution with centred weights; made by `weight_centralization`."""


class CentralizedConv3d(_CentralizedConv, nn.Conv3d):
    """A 3d convolution with centred weights; made by `weight_centralization`."""


class _ConvTranspose(_ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            dims,
            self.dilation,  # type: ignore[arg-type]
        )
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return function(
            input,
            centralized_weight(self),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            padding,
            self.groups,
            self.dilation,
        )


class CentralizedConvTranspose1d(_Centralized, _ConvTranspose, nn.ConvTranspose1d):
    """A 1d transposed convolution with centred weights; made by `weight_centralization`."""


class CentralizedConvTranspose2d(_Centralized, _ConvTranspose, nn.ConvTranspose2d):
    """A 2d transposed convolution with centred weights; made by `weight_centralization`."""


class CentralizedConvTranspose3d(_Centralized, _ConvTranspose, nn.ConvTranspose3d):
    """A 3d transposed convolution with centred weights; made by `weight_centralization`."""


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """``x (W - mean W)^T + b``."""
        return F.linear(input, centralized_weight(self), self.bias)


class CentralizedLinear(_Centralized, _Linear):
    """A linear layer with centred weights; made by `weight_centralization`."""


_CENTRALIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: CentralizedConv1d,
    nn.Conv2d: CentralizedConv2d,
    nn.Conv3d: CentralizedConv3d,
    nn.ConvTranspose1d: CentralizedConvTranspose1d,
    nn.ConvTranspose2d: CentralizedConvTranspose2d,
    nn.ConvTranspose3d: CentralizedConvTranspose3d,
    nn.Linear: CentralizedLinear,
}
CENTRALIZED = tuple(_CENTRALIZED.values())
_PLAIN = {centralized: plain for plain, centralized in _CENTRALIZED.items()}


def is_centralized(module: nn.Module) -> bool:
    """True if a layer uses centred weights.

    Example:
        >>> from torch import nn
        >>> import anybatch
        >>> from anybatch.layers.weight_centralization import is_centralized
        >>> is_centralized(anybatch.weight_centralization(nn.Linear(4, 2)))
        True
    """
    return isinstance(module, CENTRALIZED)


def weight_centralization(module: _Module) -> _Module:
    """Make a layer use its weights minus their mean, in place.

    ::

        W_used[o] = W[o] - mean(W[o])        for each output channel o

    Gradients pass the subtraction. Parameters and their keys stay as they were. The ``state_dict``
    has an entry ``centralized`` beside them, so that weights with and without it are not taken for
    one another; where `anybatch.convert` centralized for mabn, that layer has it.
    `anybatch.to_batchnorm` and `anybatch.fold` write the centred weights.

    Args:
        module: ``Conv1d`` to ``Conv3d``, ``ConvTranspose1d`` to ``3d`` or ``Linear``.

    Returns:
        The same object, of a subclass of its class.

    Raises:
        TypeError: For another layer, or a subclass whose forward is not known.
        ValueError: For a layer with one weight an output channel (a 1x1 depthwise
            convolution): nothing would be left of it.

    Source: moving-average-bn, equation 18.

    Example:
        >>> import torch, anybatch
        >>> conv = anybatch.weight_centralization(torch.nn.Conv2d(3, 8, 3))
        >>> conv(torch.ones(1, 3, 5, 5)).std() < 1e-5 + conv.bias.std()
        tensor(True)
    """
    if is_centralized(module):
        return module
    kind = _CENTRALIZED.get(type(module))
    if kind is None:
        known = ", ".join(k.__name__ for k in _CENTRALIZED)
        raise TypeError(f"module={type(module).__name__}: give one of {known}")
    if _fan_in(module) == 1:
        raise ValueError(
            f"module={module}: with one weight an output channel, centring leaves nothing"
        )
    module.__class__ = kind  # type: ignore[assignment]
    return module


def use_uncentred(module: nn.Module) -> None:
    """Make a centralized layer a plain one that uses its weights as they are, in place.

    Raises:
        TypeError: If another tool has changed its class.
    """
    if type(module) not in _PLAIN:
        raise TypeError(f"module={type(module).__name__}: another tool has changed its class")
    module.__class__ = _PLAIN[type(module)]
    module.__dict__.pop("tells_centred", None)


@torch.no_grad()
def decentralize(module: _Module) -> _Module:
    """Write the centred weights into a centralized layer and make it a plain one, in place.

    Args:
        module: A layer that went through `weight_centralization`; others pass as they are.

    Returns:
        The same object; its output is unchanged.

    Raises:
        TypeError: If another tool has changed its class.

    Example:
        >>> from torch import nn
        >>> import anybatch
        >>> from anybatch.layers.weight_centralization import decentralize
        >>> type(decentralize(anybatch.weight_centralization(nn.Linear(4, 2)))).__name__
        'Linear'
    """
    if is_centralized(module):
        weight = centralized_weight(module)
        use_uncentred(module)
        module.weight.copy_(weight)  # type: ignore[operator]
    return module


def _fan_in(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not isinstance(module, _ConvTransposeNd):
        return weight[0].numel()
    return weight[:, 0].numel() // module.groups


def match_centralization(
    name: str, module: nn.Module | None, centred: bool, *, told: bool
) -> str | None:
    """Let the layer before a norm use its weights as a checkpoint's network did.

    Args:
        name: Of the norm.
        module: The layer before it; None if there is none that can be centred here.
        centred: Whether the checkpoint was trained with centred weights there.
        told: Whether the checkpoint says so itself; else there is a warning.

    Returns:
        Why it cannot be done, or None.
    """
    if module is None:
        if centred:
            warnings.warn(
                f"{name}: the checkpoint was trained with centred weights before this layer, "
                "which are not centred here, and its output differs: convert the network "
                'while it is untrained, or with anybatch.convert(model, "mabn", '
                "centralize=True)",
                stacklevel=2,
            )
        return None
    if centred == is_centralized(module):
        return None
    try:
        if centred:
            weight_centralization(module)
            module.__dict__["tells_centred"] = False
        else:
            use_uncentred(module)
    except TypeError:
        return (
            f"{name}: the checkpoint was trained with weights before this layer that are "
            f"{'' if centred else 'not '}centred, and {type(module).__name__} cannot be switched "
            "to that: load before another tool changes its class"
        )
    if not told and not centred:
        warnings.warn(
            f"{name}: the checkpoint was trained with weights before this layer that are not "
            "centred; its weights are no longer centred, so that the output is the same; to "
            "centre the weights of a trained network, use convert(..., centralize=True)",
            stacklevel=2,
        )
    return None
