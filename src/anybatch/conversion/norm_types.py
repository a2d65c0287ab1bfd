"""The kinds of normalization modules, and the reasons why some cannot be converted.

Everything in ``conversion`` asks this file what a module is, so that `plan`, `convert`,
`to_batchnorm` and `fold` never disagree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from anybatch.conversion.frozen_norms import TORCH_NORMS, frozen_dims, is_frozen_norm
from anybatch.conversion.norm_with_activation import ends_in_activation
from anybatch.core.arguments import check_module
from anybatch.core.norm_layer import NormLayer

OTHER_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)

# Methods of a subclass of torch's norms that a replacement may drop: no forward calls them.
_HARMLESS = {"extra_repr", "reset_parameters", "reset_running_stats"}
_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}

# Wrappers that hold on to the modules they were given, by class name, so that nothing is imported:
# when to wrap instead, and the attribute that holds the model.
_WRAPPERS = {
    "DistributedDataParallel": ("wrap it in DistributedDataParallel afterwards", "module"),
    "DataParallel": ("wrap it in DataParallel afterwards", "module"),
    "FullyShardedDataParallel": ("wrap it in FullyShardedDataParallel afterwards", "module"),
    "FSDPModule": ("call fully_shard afterwards", None),
    "DeepSpeedEngine": ("initialize DeepSpeed afterwards", "module"),
    "OptimizedModule": ("call torch.compile afterwards", "_orig_mod"),
    "ScriptModule": ("script or trace it afterwards", None),
}


@dataclass(frozen=True)
class NormKind:
    """A kind of normalization module.

    Args:
        family: "batch" (torch's or ours), "frozen" (constants by design) or "other".
        dims: number of spatial dimensions the class is for (1, 2 or 3); None if it has none.
        refusal: why a batch norm cannot be taken over, with the remedy; None if it can.
    """

    family: Literal["batch", "frozen", "other"]
    dims: int | None = None
    refusal: str | None = None


def norm_kind(module: nn.Module) -> NormKind | None:
    """Say what kind of normalization a module is, or None if it is none.

    The kind has the reason and the remedy where a batch norm cannot be taken over.

    Example:
        >>> norm_kind(nn.BatchNorm2d(4))
        NormKind(family='batch', dims=2, refusal=None)
        >>> norm_kind(nn.Linear(2, 2)) is None
        True
    """
    if is_frozen_norm(module):
        return NormKind("frozen", frozen_dims(module))
    if isinstance(module, (NormLayer, _BatchNorm)):
        return NormKind("batch", dims_of(module), _refusal(module))
    if isinstance(module, OTHER_NORMS):
        return NormKind("other")
    return None


def is_norm(module: nn.Module) -> bool:
    """True if a module is a normalization of any kind."""
    return norm_kind(module) is not None


def is_batch_norm(module: nn.Module) -> bool:
    """Check if a module is a batch norm: torch's, ours or a frozen one of any library."""
    kind = norm_kind(module)
    return kind is not None and kind.family != "other"


def dims_of(norm: nn.Module) -> int | None:
    """The number of spatial dimensions a norm's class is for, read from its class.

    Example:
        >>> dims_of(nn.BatchNorm3d(4)), dims_of(nn.SyncBatchNorm(4))
        (3, None)
    """
    if isinstance(norm, NormLayer):
        return norm.dims or None
    return next((dims for dims, cls in TORCH_NORMS.items() if isinstance(norm, cls)), None)


def channels_of(norm: nn.Module) -> int:
    """The number of channels of a batch norm, read from its statistics where its class has none.

    Example:
        >>> channels_of(nn.BatchNorm2d(4))
        4
    """
    known = getattr(norm, "num_features", None)
    mean = norm._buffers.get("running_mean") if known is None else None
    return int(known or 0) if mean is None else mean.numel()


def wrapper_refusal(model: nn.Module) -> str | None:
    """The reason why modules of a model may not be exchanged: it, or a part, is wrapped.

    Example:
        >>> wrapper_refusal(nn.DataParallel(nn.Linear(2, 2)))
        'the model is wrapped in DataParallel, ... is its .module.'
    """
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith(("torch.", "deepspeed.")):
                return _wrapped(where, cls.__name__, *_WRAPPERS[cls.__name__])
        if module.__dict__.get("_compiled_call_impl") is not None:
            return _wrapped(where, "torch.compile (Module.compile)", "compile it afterwards", None)
    return None


def check_bare(model: nn.Module) -> None:
    """Raise unless the model is a network whose modules may be exchanged."""
    check_module("model", model)
    if (refusal := wrapper_refusal(model)) is not None:
        raise ValueError(refusal)


def listed(reasons: Iterable[tuple[str, str]]) -> str:
    """Norms by name, each with the reason for what becomes of it, one per line."""
    return "\n".join(f"  {name or 'the model'}: {reason}" for name, reason in reasons)


def has_plain_forward(module: nn.Module, *, any_weight: bool = False) -> bool:
    """True if a convolution or linear layer computes what its torch class computes.

    A subclass that pads, standardizes its weight or quantizes in its own forward does not; nor
    does a layer whose weight is recomputed by a parametrization or a weight-norm hook, but for
    `any_weight`.

    Example:
        >>> has_plain_forward(nn.Conv2d(3, 4, 3))
        True
        >>> has_plain_forward(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
        False
    """
    if "forward" in module.__dict__ or not (any_weight or "weight" in module._parameters):
        return False
    base = _torch_class(module)
    names = ("forward", "_conv_forward", "__call__")
    return base is not None and all(
        getattr(type(module), name, None) is getattr(base, name, None) for name in names
    )


def recomputed_parameter(module: nn.Module) -> str | None:
    """The reason why a weight or bias is no parameter of its own, with the remedy; None if it is.

    Example:
        >>> from torch.nn.utils import prune
        >>> norm = prune.identity(nn.BatchNorm1d(3), "weight")
        >>> recomputed_parameter(norm)
        "its weight is pruned: ... torch.nn.utils.prune.remove(module, 'weight') first"
    """
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        remove = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        return f"its {name} is parametrized: call {remove} first"
    for name in ("weight", "bias"):
        if name in module._parameters or getattr(module, name, None) is None:
            continue
        if f"{name}_mask" in module._buffers:
            remove = f"torch.nn.utils.prune.remove(module, {name!r})"
            return f"its {name} is pruned: make that permanent with {remove} first"
        norm = "weight" if f"{name}_g" in module._parameters else "spectral"
        if norm == "weight" or f"{name}_orig" in module._parameters:
            remove = f"torch.nn.utils.remove_{norm}_norm(module)"
            return f"its {name} has a {norm} norm: call {remove} first"
        return f"its {name} is no parameter of its own: make it a torch.nn.Parameter first"
    return None


def _torch_class(module: nn.Module) -> type[nn.Module] | None:
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules") and issubclass(cls, (_ConvNd, nn.Linear)):
            return cls
    return None


def _refusal(norm: nn.Module) -> str | None:
    if isinstance(norm, _LazyNormBase):
        return (
            "its number of channels is not known yet: run one batch through the model before "
            "converting it"
        )
    if isinstance(norm, nn.SyncBatchNorm):
        return (
            "SyncBatchNorm does not say whether it is 1d, 2d or 3d: convert the model before "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm, or leave this layer out with where="
        )
    if (why := recomputed_parameter(norm)) is not None:
        return why
    if dims_of(norm) is None:
        return f"{_class_path(norm)} is not a 1d, 2d or 3d batch norm: leave it out with where="
    if "forward" in norm.__dict__:
        return "its forward was replaced on the instance: leave it out with where="
    own = (norm._parameters.keys() | norm._buffers.keys()) - _STATE
    if own and not isinstance(norm, NormLayer):
        names = " and ".join(sorted(own))
        return f"it holds {names}, which a replacement would lose: leave it out with where="
    return _subclass_refusal(norm)


def _subclass_refusal(norm: nn.Module) -> str | None:
    if ends_in_activation(norm):
        return None
    bases = {cls for cls in type(norm).__mro__ if _is_ours_or_torchs(cls)}
    own = [cls for cls in type(norm).__mro__ if cls not in bases]
    changed = [name for cls in own for name, value in vars(cls).items() if _runs(name, value)]
    dims = dims_of(norm)
    if changed:
        return (
            f"{_class_path(norm)} is a batch norm with its own {changed[0]}(), which a "
            f"replacement would lose: put a torch.nn.BatchNorm{dims}d (and what {changed[0]} "
            "adds) in its place, or leave it out with where="
        )
    if any(True for _ in norm.children()):
        return f"{_class_path(norm)} holds modules of its own: leave it out with where="
    return None


def _runs(name: str, value: object) -> bool:
    """True if a name that a class defines is a method or a property that a user may call."""
    called = callable(value) or isinstance(value, (property, classmethod, staticmethod))
    special = name.startswith("__") and name != "__call__"
    return called and not special and name not in _HARMLESS


def _is_ours_or_torchs(cls: type) -> bool:
    return cls.__module__.split(".")[0] in {"torch", "anybatch", "builtins", "typing", "abc"}


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _wrapped(where: str, wrapper: str, afterwards: str, attribute: str | None) -> str:
    inside = "" if attribute is None else f"; the model inside it is its .{attribute}"
    return (
        f"{where} is wrapped in {wrapper}, which holds on to the modules it was given. Work on "
        f"the bare model and {afterwards}{inside}."
    )
