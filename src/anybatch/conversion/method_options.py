"""The methods and options of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from anybatch.core.arguments import check_count, shown
from anybatch.core.norm_layer import NormLayer
from anybatch.core.reduction_scope import WORLD
from anybatch.layers.group_norm import fitting_groups
from anybatch.registry import Method, check_options, get_method


def methods_by_pattern(method: str | Mapping[str, str]) -> dict[str, Method]:
    """Name patterns with the method for each, from the `method` argument of `convert`.

    Returns:
        Name pattern -> method; the pattern ``"*"`` for a single name.

    Raises:
        ValueError: For an unknown method.
        TypeError: For anything else.

    Example:
        >>> {pattern: method.name for pattern, method in methods_by_pattern("mabn").items()}
        {'*': 'mabn'}
    """
    if isinstance(method, (str, type)):
        return {"*": get_method(method)}
    if not isinstance(method, Mapping) or not method:
        given = repr(method) if isinstance(method, Mapping) else shown(method)
        raise TypeError(
            f"method={given}: give a short name such as 'mabn', or a mapping of name patterns "
            "to short names"
        )
    return {pattern: get_method(name) for pattern, name in method.items()}


def check_arguments(
    methods: Mapping[str, Method], options: Mapping[str, Any], batch_size: int | None
) -> None:
    """Refuse options that none of the methods has, and an invalid batch size."""
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_options(methods.values(), options)


def options_for(
    method: Method, options: Mapping[str, Any], batch_size: int | None = None
) -> dict[str, Any]:
    """The options of one method: those given, the batch size, and those that `convert` suggests.

    Example:
        >>> options_for(get_method("mbn"), {"ghost_size": 4}, 8)
        {'batch_size': 8}
    """
    chosen = dict(method.suggested)
    chosen |= {name: value for name, value in options.items() if name in method.accepted}
    if batch_size is not None and method.uses_batch_size:
        chosen.setdefault("batch_size", batch_size)
    return chosen


def is_already(norm: nn.Module, method: Method, options: Mapping[str, Any]) -> bool:
    """True if a norm is a layer of the method, with the options that were asked for."""
    if not isinstance(norm, NormLayer) or type(norm) is not method.layer(norm.dims):
        return False
    wanted = {**options, **method.fixed}
    if "seed" in method.options and options.get("seed") is not None:
        return False  # the base of all layers' seeds: they are drawn again
    if "num_groups" in wanted:
        wanted["num_groups"] = fitting_groups(norm.num_features, wanted["num_groups"])
    return all(getattr(norm, name, value) == value for name, value in wanted.items())


def kept_options(norm: nn.Module, method: Method, options: Mapping[str, Any]) -> str:
    """The options of an existing layer that a new one would not have, as in ``window=8``."""
    different = []
    chosen = {**method.suggested, **method.at_start, **method.of_cuts(options)}
    for name, parameter in method.options.items():
        usual = options.get(name, chosen.get(name, parameter.default))
        value = getattr(norm, name, usual)
        if name not in ("seed", "generator") and value != usual:
            of_its_own = name == "process_group" and value != WORLD
            different.append(f"{name}={'of its own' if of_its_own else value}")
    return ", ".join(different)
