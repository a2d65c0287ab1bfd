"""Holding layers still: frozen statistics, forwards that leave no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from anybatch.layers.base import NormLayer, updates

Where = str | Callable[[str, nn.Module], bool]


def select(model: nn.Module, where: Where | None) -> list[NormLayer]:
    """The anybatch layers of ``model`` that ``where`` (a name pattern or predicate) picks."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, NormLayer)]
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no anybatch layer: "
            'convert it first, for example with anybatch.convert(model, "bn")'
        )
    chosen = [m for n, m in layers if where is None or _matches(where, n, m)]
    if not chosen:
        raise ValueError(f"where={where!r} picks none of {', '.join(n for n, _ in layers)}")
    return chosen


def _matches(where: Where, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, where) if isinstance(where, str) else where(name, module)


def freeze(
    model: nn.Module,
    statistics: bool = True,
    affine: bool = False,
    where: Where | None = None,
) -> nn.Module:
    """Freeze normalization layers, through ``.train()`` and in the checkpoint.

    A layer with frozen statistics normalizes by its running statistics in
    training too, and changes neither them nor its memory.

    Args:
        model: A network with anybatch layers (default: all of them are frozen).
        statistics: Freeze running statistics and memory.
        affine: Freeze weight and bias (``requires_grad`` becomes False).
        where: Name pattern (``"backbone.*"``) or predicate ``(name, module)``.

    Returns:
        The model.

    Raises:
        ValueError: If no layer is chosen.

    Example:
        >>> import torch, anybatch
        >>> net = torch.nn.Sequential(anybatch.BatchNorm1d(3))
        >>> anybatch.freeze(net).train()[0].frozen
        True
    """
    for layer in select(model, where):
        layer.frozen = layer.frozen or statistics
        if affine:
            layer.freeze_affine(True)
    return model


def thaw(
    model: nn.Module,
    statistics: bool = True,
    affine: bool = False,
    where: Where | None = None,
) -> nn.Module:
    """Undo `freeze`.

    Args:
        model: A network with anybatch layers.
        statistics: Thaw running statistics and memory.
        affine: Thaw weight and bias (``requires_grad`` becomes True).
        where: Name pattern or predicate ``(name, module)``.

    Returns:
        The model.

    Raises:
        ValueError: If no layer is chosen.

    Example:
        >>> import torch, anybatch
        >>> net = anybatch.freeze(torch.nn.Sequential(anybatch.BatchNorm1d(3)))
        >>> anybatch.thaw(net)[0].frozen
        False
    """
    for layer in select(model, where):
        layer.frozen = layer.frozen and not statistics
        if affine:
            layer.freeze_affine(False)
    return model


@contextmanager
def no_update() -> Iterator[None]:
    """A context in which forwards change no layer's running statistics or memory.

    Normalization itself is that of training: the batch's statistics count, but
    are not remembered. For a second forward of one step: gradient penalties,
    adversarial examples, sharpness-aware minimization, extra losses. The
    setting belongs to the thread that enters.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.BatchNorm1d(2)
        >>> with anybatch.no_update():
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.num_batches_tracked.item()
        0
    """
    before = updates.enabled
    updates.enabled = False
    try:
        yield
    finally:
        updates.enabled = before
