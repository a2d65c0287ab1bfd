"""Batch norms that end in an activation, as `BatchNormAct2d` of timm does.

Such a norm is torch's batch norm, then a dropout, then an activation, which it holds under the
names ``drop`` and ``act``. What replaces it holds the two under the same names, so that the keys of
a ``state_dict`` stay, and applies them in a forward hook.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_CLASS = "BatchNormAct2d"  # by name, so that timm is not imported
_PARTS = {"drop", "act"}


def ends_in_activation(norm: nn.Module) -> bool:
    """True if a norm applies a dropout and an activation to what it normalized.

    Example:
        >>> ends_in_activation(nn.BatchNorm2d(3))
        False
    """
    cls = type(norm)
    theirs = cls.__name__ == _CLASS and cls.__module__.partition(".")[0] == "timm"
    return _is_hooked(norm) or (theirs and set(norm._modules) == _PARTS)


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
    new._activated_class = old.__dict__.get("_activated_class", type(old))
    if not _is_hooked(new):
        new.register_forward_hook(apply_activation)


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
    for key in [k for k, hook in norm._forward_hooks.items() if hook is apply_activation]:
        del norm._forward_hooks[key]
    norm.__class__ = layer._activated_class  # type: ignore[assignment]
    norm.drop, norm.act = layer.drop, layer.act


def _is_hooked(norm: nn.Module) -> bool:
    return any(hook is apply_activation for hook in norm._forward_hooks.values())
