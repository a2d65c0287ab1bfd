"""Batch norms that end in an activation, as `BatchNormAct2d` of timm does.

Such a norm is torch's batch norm, or a frozen one, then a dropout, then an activation, which it
holds under the names ``drop`` and ``act``. What replaces it holds the two under the same names, so
that the keys of a ``state_dict`` stay. A group norm becomes timm's own with an activation; other
norms apply the two in a forward hook.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

# By name, so that timm is not imported.
_BATCH, _FROZEN, _GROUP = "BatchNormAct2d", "FrozenBatchNormAct2d", "GroupNormAct"
_PARTS = {"drop", "act"}
_CAME_FROM = "_activated_class"  # attribute of a replacement


def ends_in_activation(norm: nn.Module) -> bool:
    """True if a norm applies a dropout and an activation to what it normalized.

    Example:
        >>> ends_in_activation(nn.BatchNorm2d(3))
        False
    """
    cls = type(norm)
    theirs = cls.__name__ in (_BATCH, _FROZEN) and cls.__module__.partition(".")[0] == "timm"
    return _CAME_FROM in norm.__dict__ or (theirs and set(norm._modules) == _PARTS)


def apply_activation(norm: nn.Module, args: Any, output: Tensor) -> Any:
    """The forward hook of a norm that ends in an activation."""
    return norm.act(norm.drop(output))  # type: ignore[operator]


def keep_activation(old: nn.Module, new: nn.Module) -> None:
    """Let a norm's replacement end in the norm's activation.

    Example:
        >>> old, new = nn.BatchNorm2d(3), nn.GroupNorm(1, 3)
        >>> old.drop, old.act = nn.Identity(), nn.ReLU()
        >>> keep_activation(old, new)
        >>> new.act is old.act, ends_in_activation(new)
        (True, True)
    """
    new.drop, new.act = old.drop, old.act
    cls = old.__dict__.get(_CAME_FROM, type(old))
    if cls.__name__ == _FROZEN:
        cls = _sibling(cls, _BATCH)
    group = _sibling(cls, _GROUP) if isinstance(new, nn.GroupNorm) else None
    if group is not None:
        _take_out(new)
        new.__class__ = group
        new.__dict__["_fast_norm"] = False
        return
    new._activated_class = cls
    if apply_activation not in new._forward_hooks.values():
        new.register_forward_hook(apply_activation)


def thaw_activation(frozen: nn.Module, norm: nn.Module) -> None:
    """Let a torch batch norm end in the activation of a frozen one, whose hooks it shares.

    Example:
        >>> frozen, norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        >>> frozen.drop, frozen.act, frozen._activated_class = nn.Identity(), nn.ReLU(), None
        >>> thaw_activation(frozen, norm)
        >>> norm.act is frozen.act
        True
    """
    norm.drop, norm.act = frozen.drop, frozen.act
    if _CAME_FROM in frozen.__dict__:
        norm._activated_class = frozen._activated_class
    else:
        norm.__class__ = _sibling(type(frozen), _BATCH)


def _sibling(cls: type[nn.Module], name: str) -> Any:
    """Another class of a norm's library, None if there is none."""
    return getattr(sys.modules.get(cls.__module__), name, None)


def give_back_activation(layer: nn.Module, norm: nn.Module) -> None:
    """Make a torch batch norm the kind of norm that a layer with an activation came from.

    The norm is in the place of the layer, and has its hooks.

    Example:
        >>> old, new, back = nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3)
        >>> old.drop, old.act = nn.Identity(), nn.ReLU()
        >>> keep_activation(old, new)
        >>> give_back_activation(new, back)
        >>> back.act is old.act
        True
    """
    _take_out(norm)
    norm.__class__ = layer._activated_class  # type: ignore[assignment]
    norm.drop, norm.act = layer.drop, layer.act


def _take_out(norm: nn.Module) -> None:
    for key in [k for k, hook in norm._forward_hooks.items() if hook is apply_activation]:
        del norm._forward_hooks[key]
