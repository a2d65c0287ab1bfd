"""The backend that serves each layer of a network, and why the others do not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from anybatch.backends import BACKENDS
from anybatch.core.dispatch import choices_made
from anybatch.core.text_tables import text_table
from anybatch.evaluation.restore_model import borrowed
from anybatch.layers.control import select


@dataclass(frozen=True)
class LayerBackend:
    """The backend that serves a layer.

    Attributes:
        name: Name of the layer in the network.
        layer: Its class.
        backend: "triton", "numba" or "torch_library" (compiled kernels), or "aten" (torch's
            operators); "" if the layer was not called.
        reasons: Why the other backends do not serve it, by backend.
    """

    name: str
    layer: str
    backend: str
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`; ``str()`` of it is a table.

    Attributes:
        layers: One row per layer.
    """

    layers: tuple[LayerBackend, ...]

    def __str__(self) -> str:
        rows = []
        for one in self.layers:
            first = (one.name or "(the layer)", one.layer, one.backend or "not called")
            reasons = [f"not {backend}: {why}" for backend, why in one.reasons.items()]
            rows.append((*first, reasons[0] if reasons else ""))
            rows += [("", "", "", reason) for reason in reasons[1:]]
        return text_table(("layer", "class", "backend", "why"), rows)


def explain(model: nn.Module, *inputs: Any, **named: Any) -> Explanation:
    """Tell which backend serves each anybatch layer for a batch, and why the others do not.

    The network runs once, in the modes that it is in; its state, random numbers and gradients stay
    as they are. Call ``model.train()`` first to see the backends of training. Prints the result.

    Args:
        model: A layer of this library, or a network with some.
        *inputs: Its inputs.
        **named: Its inputs by name.

    Returns:
        One row per layer; of a layer that runs several times, the last run.

    Raises:
        ValueError: If the network has no layer of this library.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.MovingAverageBatchNorm2d(8, centered=True)
        >>> found = anybatch.explain(norm, torch.randn(2, 8, 5, 5))
        layer        class                     backend  why
        -----------  ------------------------  -------  ----------------------------...
        (the layer)  MovingAverageBatchNorm2d  aten     not triton: centered=True: the kernels...
        ...
        >>> found.layers[0].backend
        'aten'
    """
    found: dict[str, LayerBackend] = {}
    with borrowed(model) as inner, torch.enable_grad():
        chosen = set(select(inner, None))
        if not chosen:
            raise ValueError(
                f"model: the norms of {type(inner).__name__} depend on no batch; torch's operators "
                "serve them"
            )
        layers = {name: module for name, module in inner.named_modules() if module in chosen}
        with choices_made() as choices:
            for name, layer in layers.items():
                found[name] = LayerBackend(name, type(layer).__name__, "")
                layer.forget_plans()
                layer.register_forward_pre_hook(lambda *_: choices.clear())

                def note(module: nn.Module, *_: Any, name: str = name) -> None:
                    found[name] = _row(name, module, choices)

                layer.register_forward_hook(note)
            inner(*inputs, **named)
    explanation = Explanation(tuple(found.values()))
    print(explanation)
    return explanation


def _row(name: str, layer: nn.Module, choices: list[tuple[str, dict[str, str]]]) -> LayerBackend:
    kind = type(layer).__name__
    if choices:
        return LayerBackend(name, kind, *choices[-1])
    frozen = getattr(layer, "frozen", False)
    why = "frozen statistics" if layer.training and frozen else "evaluation mode"
    if layer.training and not frozen:
        why = "an empty batch"
    reason = f"{why}: torch normalizes"
    others = {backend.name: reason for backend in BACKENDS if backend.name != "aten"}
    return LayerBackend(name, kind, "aten", others)
