"""Exchanging modules inside a network: where a module sits, and what it carries along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from anybatch.conversion.norm_with_activation import apply_activation
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.bound_norm_layer import release

HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TORCHS = nn.Module().__dict__.keys()
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The network inside a wrapper, and what its names begin with there.

    Example:
        >>> unwrapped(nn.DataParallel(nn.ReLU()))
        (ReLU(), 'module.')
    """
    prefix = ""
    while (inner := _WRAPPERS.get(type(model).__name__)) is not None:
        model, prefix = getattr(model, inner), f"{prefix}{inner}."
    return model, prefix


def paths(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module with all the names it is reachable by, in the order of the network.

    Example:
        >>> shared = nn.ReLU()
        >>> paths(nn.Sequential(shared, shared))[shared]
        ('0', '1')
    """
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return {module: tuple(names) for module, names in found.items()}


def owners_of(modules: Iterable[nn.Module]) -> dict[int, list[nn.Module]]:
    """The modules that hold each Parameter, by the Parameter's identity.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> other.weight = one.weight
        >>> len(owners_of([one, other])[id(one.weight)])
        2
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in modules:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement wherever its original sits, under every name and every parent.

    That includes attributes that hold modules beside torch's own list of them, in plain lists,
    tuples and dictionaries. The result is the model, or the replacement of the model itself.

    Example:
        >>> norm, model = nn.BatchNorm1d(3), nn.Sequential()
        >>> _ = model.append(norm).append(norm)
        >>> swap(model, {norm: nn.Identity()})
        Sequential(
          (0): Identity()
          (1): Identity()
        )
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
        for name, value in parent.__dict__.items():
            if name not in _TORCHS and not isinstance(parent, NormLayer):
                parent.__dict__[name] = _swapped(value, replacements)
    return replacements.get(model, model)


def _swapped(value: Any, replacements: Mapping[nn.Module, nn.Module]) -> Any:
    """A value of an attribute with replacements in it, a list or dictionary in place."""
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if type(value) is tuple:
        items = [_swapped(item, replacements) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else tuple(items)
    if type(value) in (list, dict):
        for key, item in enumerate(value) if type(value) is list else value.items():
            new = _swapped(item, replacements)
            if new is not item:
                value[key] = new
    return value


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module another's hooks: the very dictionaries, so that handles still remove them.

    Example:
        >>> old, new = nn.ReLU(), nn.Identity()
        >>> handle = old.register_forward_hook(lambda *_: None)
        >>> move_hooks(old, new)
        >>> handle.remove(); len(new._forward_hooks)
        0
    """
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]


def let_go(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Unbind layers that left a network from the modules in it that they follow.

    Example:
        >>> import anybatch
        >>> linear = nn.Linear(2, 3)
        >>> norm = anybatch.CrossIterationBatchNorm1d(3, window=2).bind(linear)
        >>> let_go(linear, [norm]); len(linear._forward_hooks)
        0
    """
    bound = [layer for layer in layers if getattr(layer, "geometry", None) is not None]
    for module in model.modules() if bound else ():
        for layer in bound:
            release(module, layer)


def has_hooks(module: nn.Module) -> bool:
    """True if anything listens to, or changes, what goes into or comes out of a module.

    Layers that follow the weights of a convolution do not count, nor does a norm's own activation.
    """
    kinds = [name for name in HOOKS if name.startswith(("_forward", "_back"))]
    foreign = dict(module._forward_hooks)
    for key, hook in module._forward_hooks.items():
        if hook is apply_activation or isinstance(getattr(hook, "__self__", None), NormLayer):
            del foreign[key]
    kinds.remove("_forward_hooks")
    kinds.remove("_forward_hooks_with_kwargs")
    return bool(foreign) or any(module.__dict__[name] for name in kinds)
