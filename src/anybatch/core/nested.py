"""Tensors in nests of tuples, lists, mappings and dataclasses."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nest with another value in the place of each tensor.

    Named tuples, mappings and dataclasses keep their class, and what they hold besides.

    Example:
        >>> import torch
        >>> mapped(len, {"a": [torch.zeros(2), "text"]})
        {'a': [2, 'text']}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        parts = {key: mapped(change, item) for key, item in value.items()}
        if type(value) is dict:
            return parts
        new: Any = copy.copy(value)
        for key, item in parts.items():
            new[key] = item
        return new
    if isinstance(value, (tuple, list)):
        items = [mapped(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        named = {name: mapped(change, getattr(value, name)) for name in fields}
        return dataclasses.replace(value, **named)
    return value
