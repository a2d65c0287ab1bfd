"""Layers for timm's networks, whose norms may end in an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from anybatch.conversion.norm_with_activation import keep_activation
from anybatch.conversion.replacement import replacement
from anybatch.registry import get_method


def norm_act_layer(
    method: str, act_layer: type[nn.Module] = nn.ReLU, **options: Any
) -> Callable[..., nn.Module]:
    """Make a constructor for timm's ``norm_layer=`` where norm and activation are one layer.

    timm chooses such a layer by the name of a class: it takes `anybatch.BatchNorm2d` for its own
    ``BatchNormAct2d``, without a word, and refuses other names. It takes a function as it is. Where
    timm's network has plain norms, as ResNet, give it `anybatch.norm_layer`.

    Args:
        method: A method's short name; not `cbn`.
        act_layer: The activation of the network (default ReLU); timm does not tell a function.
        **options: The method's own arguments.

    Returns:
        A function that makes timm's ``BatchNormAct2d`` and converts it.

    Raises:
        ValueError: For an unknown method, or `cbn`, which follows a convolution.
        TypeError: For an option that the method does not have.
        ImportError: When it is called without timm.

    Example:
        >>> layer = norm_act_layer("mabn", nn.SiLU)  # timm.create_model(..., norm_layer=layer)
    """
    found = get_method(method)
    if found.binds:
        raise ValueError(
            f"method={method!r}: its layers follow the convolution before them; build the network "
            f"with timm's own norms and call anybatch.convert(model, {found.name!r})"
        )
    found.check_options(options)

    def layer(num_features: int, *args: Any, **kwargs: Any) -> nn.Module:
        from timm.layers import BatchNormAct2d

        kwargs.setdefault("act_layer", act_layer)
        norm = BatchNormAct2d(num_features, *args, **kwargs)
        new = replacement(norm, found, {**found.suggested, **options})
        keep_activation(norm, new)
        return new

    return layer
