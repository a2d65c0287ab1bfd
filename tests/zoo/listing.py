"""How a network of a library is listed: what builds it, what it takes, what is different about it.

The lists can be read without the libraries: nothing is imported before a network is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch.registry import METHODS


@dataclass(frozen=True, eq=False)
class Call:
    """A call that is made later, when the library is there: of a class or function, by name."""

    module: str
    name: str
    arguments: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        target: Any = import_module(self.module)
        for part in self.name.split("."):
            target = getattr(target, part)
        return target(
            *(_made(value) for value in self.arguments),
            **{name: _made(value) for name, value in self.named.items()},
        )


def _made(value: Any) -> Any:
    if isinstance(value, Call):
        return value()
    if type(value) is dict:
        return {name: _made(item) for name, item in value.items()}
    if type(value) is list:
        return [_made(item) for item in value]
    return value


@dataclass(frozen=True, eq=False)
class Listed:
    """A network of a library, small and without downloaded weights.

    Attributes:
        build: makes it.
        inputs: what it takes, by batch size: a tensor, a tuple of positional or a mapping of
            keyword arguments.
        core: it belongs to the usual tests, not only to the slow ones.
        skipped: methods that are not tried with it, and why.
        refused: methods that must refuse it, and words of the message.
        needs: packages that it needs besides the library.
        batch: examples in a training step.
        look: what is compared of it in inference, from the model and its inputs, where its output
            is no continuous function of its input (default: all that it returns).
        tolerance: of the output in inference, as a share of the largest value.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    core: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    batch: int = 2
    look: Callable[[nn.Module, Any], Any] | None = None
    tolerance: float = 1e-5

    @property
    def methods(self) -> list[str]:
        """The methods that it is tried with."""
        return [name for name in METHODS if name not in self.skipped]


def image(*shape: int) -> Callable[[int], Tensor]:
    """A batch of random numbers."""
    return lambda n: torch.randn(n, *shape)


def images(*shapes: tuple[int, ...]) -> Callable[[int], tuple[Tensor, ...]]:
    """Several batches of random numbers."""
    return lambda n: tuple(torch.randn(n, *shape) for shape in shapes)


def named(**shapes: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    """Batches of random numbers by name."""
    return lambda n: {name: torch.randn(n, *shape) for name, shape in shapes.items()}


def pixels(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    """A batch of pictures as the networks of transformers take it."""
    return named(pixel_values=shape)


def randomize(model: nn.Module) -> nn.Module:
    """Give a network the look of a trained one: statistics and affine parameters at random."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is None:
                continue
            module.running_mean.normal_(0.0, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked.fill_(7)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0.0, 0.3)
    return model


def cases(networks: Mapping[str, Listed]) -> list[Any]:
    """Every network with every method as parameters of a test; all but the core are slow."""
    return [
        pytest.param(network, method, id=f"{name}-{method}", marks=_marks(network))
        for name, network in networks.items()
        for method in network.methods
    ]


def each(networks: Mapping[str, Listed]) -> list[Any]:
    """Every network as a parameter of a test; all but the core are slow."""
    return [
        pytest.param(network, id=name, marks=_marks(network)) for name, network in networks.items()
    ]


def _marks(network: Listed) -> list[pytest.MarkDecorator]:
    return [] if network.core else [pytest.mark.slow]
