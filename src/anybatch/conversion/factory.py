"""Constructors of layers, for code that builds its own norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from anybatch.layers.group_norm import fitting_groups
from anybatch.registry import get_method


def norm_layer(method: str, dims: int = 2, **options: Any) -> Callable[..., nn.Module]:
    """Make a constructor of a method's layers, for a ``norm_layer=`` argument.

    It is called as torch's batch norm is: with the channels, then ``eps``, ``momentum`` and so on.
    `anybatch.convert` on the finished network does more: it knows the batch size, binds `cbn` and
    centralizes weights for `mabn`. After a network was built with `mabn`, call
    ``convert(model, "mabn", centralize=True)``.

    Args:
        method: A method's short name, or "frozen".
        dims: Spatial dimensions: 1, 2 or 3 (default 2).
        **options: The method's own arguments.

    Returns:
        The constructor, a ``functools.partial``, which pickles.

    Raises:
        ValueError: For an unknown method, dims out of range, or `cbn`, which follows a convolution.
        TypeError: For an option that the method does not have.

    Example:
        >>> norm_layer("ghost", ghost_size=8)(16)
        GhostBatchNorm2d(16, eps=1e-05, momentum=0.1, affine=True, ..., ghost_size=8)
    """
    found = get_method(method)
    if found.binds:
        raise ValueError(
            f"method={method!r}: its layers follow the convolution before them; build the network "
            f"with torch.nn.BatchNorm{dims}d and call anybatch.convert(model, {found.name!r})"
        )
    found.check_options(options)
    found.layer(dims)
    return partial(_Constructor(found.name, dims, options))


@dataclass(frozen=True, eq=False)
class _Constructor:
    """Makes a method's layers; a class, as timm would take a function for a norm with activation.

    Args:
        method: Short name.
        dims: Spatial dimensions.
        options: The method's own arguments.
    """

    __name__ = "anybatch.norm_layer: give anybatch.integrations.timm.norm_act_layer"  # timm's error

    method: str
    dims: int
    options: Mapping[str, Any]

    def __call__(self, num_features: int, *args: Any, **kwargs: Any) -> nn.Module:
        found = get_method(self.method)
        given = {**found.fixed, **found.suggested, **found.at_start, **self.options, **kwargs}
        given = {**found.of_cuts(given), **given}
        if "num_groups" in found.options:
            most = given.get("num_groups", found.options["num_groups"].default)
            given["num_groups"] = fitting_groups(num_features, most)
        layer: Any = found.builder or found.layer(self.dims)
        made: nn.Module = layer(num_features, *args, **given)
        return made
