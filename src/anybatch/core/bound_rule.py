"""Rules on rows of torch's tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.backends.rule import Rule, bind, chosen


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(b, Tensor):
        return torch.minimum(a, b) if isinstance(a, Tensor) else b.clamp(max=a)
    return a.clamp(max=b) if isinstance(a, Tensor) else min(a, b)


def _maximum(a: Any, b: Any) -> Any:
    if isinstance(b, Tensor):
        return torch.maximum(a, b) if isinstance(a, Tensor) else b.clamp(min=a)
    return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)


def _clamp(x: Any, low: Any, high: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(low, Tensor) == isinstance(high, Tensor):
        return x.clamp(low, high)
    return _minimum(_maximum(x, low), high)


def _sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else x**0.5


def _where(dtype: torch.dtype, condition: Any, one: Any, other: Any) -> Any:
    if not isinstance(condition, Tensor):
        return one if condition else other
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.where(condition, one, other)
    if one == 1 and other == 0:
        return condition.to(dtype)
    return torch.where(condition, condition.new_full((), one, dtype=dtype), other)


def _lerp(start: Any, end: Any, weight: Any) -> Any:
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.lerp(start, end, weight)
    return start + weight * (end - start)


def in_torch(rule: Rule, dtype: torch.dtype) -> Callable[..., Any]:
    """A rule on torch's tensors of a type."""
    functions = {
        "sqrt": _sqrt,
        "minimum": _minimum,
        "maximum": _maximum,
        "clamp": _clamp,
        "where": partial(_where, dtype),
        "lerp": _lerp,
        "chosen": chosen,
    }
    bound: Callable[..., Any] = bind(rule, functions)
    return bound
