"""Holding layers still: frozen statistics, forwards that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from anybatch.core.arguments import check_count, check_flag, check_module, shown
from anybatch.core.gradient_accumulation import StepMemory
from anybatch.core.masks import shared_mask
from anybatch.core.name_patterns import Where, matches
from anybatch.core.norm_batch import updates
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.frozen_batch_norm import FrozenBatchNorm
from anybatch.layers.masked_group_norm import MaskedGroupNorm
from anybatch.layers.padding import SequenceLengths, lengths_of


def select(model: nn.Module, where: Where | None, optional: bool = False) -> list[NormLayer]:
    """The anybatch layers of ``model`` that ``where`` (a name pattern or predicate) picks.

    A network whose norms depend on no batch may have none, and if ``optional``, one without norms.
    """
    check_module("model", model)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, NormLayer)]
    if not layers and (is_independent(model) or (optional and not _has_batch_norms(model))):
        return []
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no anybatch layer: "
            'convert it first, for example with anybatch.convert(model, "bn")'
        )
    chosen = [m for n, m in layers if matches(where, n, m)]
    if not chosen:
        raise ValueError(f"where={where!r} picks none of {', '.join(n for n, _ in layers)}")
    return chosen


def is_independent(model: nn.Module) -> bool:
    """Return True if no norm of the network depends on the batch (`frozen`, `gn`, `ln`, `in`)."""
    return not _has_batch_norms(model) and any(
        isinstance(m, (FrozenBatchNorm, nn.GroupNorm)) for m in model.modules()
    )


def _has_batch_norms(model: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def freeze(
    model: nn.Module, statistics: bool = True, affine: bool = False, where: Where | None = None
) -> nn.Module:
    """Freeze normalization layers, through ``.train()`` and in the checkpoint.

    A layer with frozen statistics normalizes by its running statistics in
    training too, and changes neither them nor its memory. A checkpoint of a frozen
    layer freezes the one that loads it; that of a thawed one is as torch's, and thaws
    nothing: repeat `freeze` and `thaw` where a resumed run makes them.

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
    _check_flags(statistics, affine)
    for layer in select(model, where):
        layer.frozen = layer.frozen or statistics
        if affine:
            layer.freeze_affine(True)
    return model


def thaw(
    model: nn.Module, statistics: bool = True, affine: bool = False, where: Where | None = None
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
    _check_flags(statistics, affine)
    layers = select(model, where)
    if not layers:
        raise ValueError(
            f"model: the norms of {type(model).__name__} depend on no batch, there is nothing to "
            'thaw; convert it to a method, for example with anybatch.convert(model, "mabn")'
        )
    for layer in layers:
        layer.frozen = layer.frozen and not statistics
        if affine:
            layer.freeze_affine(False)
    return model


def _check_flags(statistics: Any, affine: Any) -> None:
    check_flag("statistics", statistics)
    check_flag("affine", affine)


@contextmanager
def no_update() -> Iterator[None]:
    """A context in which forwards change no layer's running statistics or memory.

    Normalization itself is that of training: the batch's statistics count, but
    are not remembered. For a second forward of one step: gradient penalties,
    adversarial examples, sharpness-aware minimization, extra losses. Layers of this
    library obey it; torch's batch norms know nothing of it. The setting belongs to
    the thread that enters.

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


@contextmanager
def masked(
    model: nn.Module,
    mask: Tensor | None = None,
    where: Where | None = None,
    *,
    lengths: Tensor | None = None,
    zero: bool = False,
    dim: int | None = None,
) -> Iterator[None]:
    """A context in which norms take statistics from valid positions only, for padded input.

    Each layer gets the mask in its own shape: along dimensions in which its input is smaller or
    larger than the mask, the nearest position counts; where its input has no such dimension, an
    example with any valid position is valid. With n valid values a channel::

        mean = sum of valid x / n,    var = sum of valid (x - mean)^2 / n
        y    = weight * (x - mean) / sqrt(var + eps) + bias         everywhere

    which on the valid positions is the layer on the packed tensor: output, gradients and state. At
    inference a mask makes a difference with an `example_weight` only. What is not valid may be
    anything finite; it is normalized too, so that evaluation without a mask sees what training saw.
    A mask may be written into between forwards, by torch's operators (not through a NumPy array or
    ``.data``, which nobody notices).
    A batch without valid values is normalized by the running statistics.

    Statistics alone do not keep padding out: a convolution mixes it into valid positions. With
    ``zero=True``, padding at the end of sequences is set to 0 before convolutions and poolings of
    one or two dimensions and after norms, and the lengths follow their strides and kernels. An
    example's output there is then that without padding.

    Args:
        model: A network with anybatch layers, torch's group norms, or both.
        mask: True, or not 0, where input is valid: ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``, with
            the spatial dimensions of the network's input.
        where: Name pattern or predicate ``(name, module)`` of the norms that get it (default
            None: all).
        lengths: In place of a mask: valid positions of each example, ``(N,)``, along the last
            dimension of convolutions; they follow strides and kernels exactly.
        zero: Set padding to 0 (default False). With neither a mask nor lengths, these are read from
            the ``attention_mask`` that the model is called with, as transformers' models are.
        dim: Dimension of two-dimensional inputs along which lengths run, 2 or 3 (default None: the
            one of their size).

    A network under ``torch.compile`` runs uncompiled within `lengths` or `zero`, and with group
    norms, as compiled code runs no hooks. The mask is part of the network: masks in several threads
    need several networks.

    Raises:
        ValueError: If there is no layer; for both a mask and lengths, or neither without `zero`;
            for lengths given as a mask, or negative ones, or of other than the batch's examples;
            for a dimension other than 2 or 3, or none where two have the lengths' size;
            with `zero`, for a convolution whose padding is not zeros;
            with `zero`, for a mask that is not padded at the end; in a forward, if it does not fit
            a layer's input.
        TypeError: For a mask or lengths of floating point.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.BatchNorm1d(1)
        >>> x = torch.tensor([[[1.0, 3.0, 0.0, 0.0]], [[5.0, 0.0, 0.0, 0.0]]])
        >>> with anybatch.masked(norm, x[:, 0] > 0):
        ...     y = norm(x)
        >>> round(norm.running_mean.item() / norm.momentum, 4)  # of 1, 3 and 5
        3.0
    """
    if (mask is None) == (lengths is None) and not (zero and mask is None):
        given = "none" if mask is None else "both"
        raise ValueError(f"mask and lengths: {given} given; give one of them")
    for name, value in (("mask", mask), ("lengths", lengths)):
        if value is not None and (not isinstance(value, Tensor) or value.is_floating_point()):
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            wanted = "bool, true where input is valid" if name == "mask" else "whole numbers"
            raise TypeError(f"{name} of type {what}: give a tensor of {wanted}")
    if mask is not None and mask.dim() == 1 and bool((mask > 1).any()):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} with values up to {int(mask.max())}: it says which "
            "examples are valid; give lengths= for the valid positions of each"
        )
    if lengths is not None and bool((lengths < 0).any()):
        raise ValueError(f"lengths from {int(lengths.min())}: give whole numbers from 0 on")
    if dim is not None and (dim not in (2, 3) or not (zero or lengths is not None)):
        raise ValueError(f"dim={dim!r}: give 2 or 3, with lengths or zero=True")
    layers = select(model, where, optional=zero)
    groups = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.GroupNorm) and matches(where, name, module)
    ]
    # Compiled code runs no hooks.
    hooked = zero or lengths is not None or groups
    compiling = torch.compiler.is_compiling()
    eager = _uncompiled() if hooked and not compiling else nullcontext()
    if zero or lengths is not None:
        size = None if mask is None else mask.shape[-1]
        lengths = lengths_of(mask) if mask is not None else lengths
        followed: list[Any] = [*layers, *(module for _, module in groups)]
        following = SequenceLengths(model, followed, lengths, size, zero, dim)
        try:
            with eager:
                yield
        finally:
            following.remove()
        return
    assert mask is not None
    before = [layer.mask for layer in layers]
    for layer in layers:
        layer.mask = mask
    handles = [
        module.register_forward_hook(MaskedGroupNorm(mask, name), prepend=True, with_kwargs=True)
        for name, module in groups
    ]
    try:
        with eager, nullcontext() if compiling else shared_mask(mask):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, old in zip(layers, before, strict=True):
            layer.mask = old


@contextmanager
def _uncompiled() -> Iterator[None]:
    """A context without `torch.compile`, whose stance changes where it is made, not entered."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _accumulating(model: nn.Module) -> Iterator[tuple[NormLayer, StepMemory]]:
    """The layers that accumulate, with their state within a step."""
    for layer in model.modules():
        if isinstance(layer, NormLayer) and layer.step is not None:
            yield layer, layer.step


def end_steps(model: nn.Module) -> None:
    """Make the next forward of each layer that accumulates the first of an optimizer step."""
    for _, step in _accumulating(model):
        step.begin()


_numbers = count(1)


class Accumulation:
    """Handle of `accumulate`: ends an optimizer step early, or the accumulation.

    It is a context manager too, which removes itself at the end.

    Args:
        model: Network whose layers accumulate.
        optimizer: Optimizer whose ``step()`` ends an optimizer step; None for none.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.model, self._number = model, next(_numbers)
        self._hook: Any = None
        if optimizer is not None:
            self._hook = optimizer.register_step_post_hook(self._after_step)
        for _, step in _accumulating(model):
            step.owner = self._number

    def _after_step(self, *_: Any) -> None:
        self.end_step()

    def end_step(self) -> None:
        """The next forward is the first of an optimizer step, however many this one had."""
        end_steps(self.model)

    def remove(self) -> None:
        """Every forward is a step again, where no later `accumulate` says otherwise."""
        for layer, step in _accumulating(self.model):
            if step.owner == self._number:
                layer.accumulate(1)
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> "Accumulation":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def accumulate(
    model: nn.Module, steps: int | None = None, *, optimizer: Optimizer | None = None
) -> Accumulation:
    """Tell the layers how many forwards make one optimizer step (gradient accumulation).

    Within a step the weights stand still, so that its micro-batches have the statistics of one
    batch. With n values a channel in a micro-batch, N in those of the step seen so far (this one
    included) and mean and var pooled over all N exactly::

        y  = weight * (x - mean) / sqrt(var + eps) + bias
        dx = (g - mean_n(g) - z * mean_n(g * z)) / sqrt(var + eps),     g = weight * dy

    The means in the gradient are the micro-batch's own, with full weight; where a method averages
    them over steps, those of a step's micro-batches are averaged first. A method's memory counts
    optimizer steps, and running statistics are updated once a step, each micro-batch weighing by
    its values. A step may end after fewer micro-batches than usual. In `GhostBatchNorm` and
    `BatchGroupNorm` groups keep statistics of their own; their running statistics alone pool.

    The first micro-batches of a step know only themselves: `CrossIterationBatchNorm` and
    `MovingAverageBatchNorm` bring what earlier steps know.

    Args:
        model: A network with anybatch layers.
        steps: Forwards in training that make one optimizer step; 1 undoes it. None where the
            optimizer alone tells.
        optimizer: Its ``step()`` alone ends a step, however many forwards that had: for a shorter
            last one, and for layers that are called several times in a forward. Of an optimizer
            around another (as for sharpness-aware minimization) the one whose ``step()`` is called.

    Returns:
        An `Accumulation`, to end a step by hand (``end_step()``) or to undo all (``remove()``).

    Raises:
        ValueError: If there is no layer, neither argument is given, a layer has a
            `norm_batch_size` (which cuts batches where this joins them), or its statistics do not
            pool (`L1BatchNorm`, `RangeBatchNorm`).
        TypeError: If ``steps`` is not a whole number.

    Example:
        >>> import torch, anybatch
        >>> net = torch.nn.Sequential(anybatch.BatchNorm1d(3))
        >>> _ = anybatch.accumulate(net, 4)
        >>> for _ in range(8):
        ...     _ = net(torch.randn(2, 3))
        >>> net[0].num_batches_tracked.item()
        2
    """
    if steps is not None:
        check_count("steps", steps)
    elif optimizer is None:
        raise ValueError("steps=None: give the forwards in an optimizer step, or the optimizer")
    if optimizer is not None and not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inside = getattr(optimizer, "optimizer", None)
        hint = ", such as its .optimizer" if isinstance(inside, Optimizer) else ""
        raise TypeError(f"optimizer={shown(optimizer)}: give a torch.optim.Optimizer{hint}")
    if steps == 1:
        for layer in select(model, None):
            layer.accumulate(1)
        return Accumulation(model, optimizer)
    return join_forwards(model, steps, optimizer, counts=optimizer is None)


def join_forwards(
    model: nn.Module, steps: int | None, optimizer: Optimizer | None = None, counts: bool = False
) -> Accumulation:
    """Join forwards to optimizer steps, as `accumulate` does.

    Args:
        model: A network with anybatch layers.
        steps: Forwards in a step, as far as that is known.
        optimizer: Its ``step()`` ends a step.
        counts: Whether so many forwards end a step (default False).

    Returns:
        An `Accumulation`.

    Raises:
        ValueError: If a layer cannot join forwards; no layer is then changed.
    """
    layers = select(model, None)
    check_joinable(model)
    for layer in layers:
        layer.accumulate(steps, counts)
    return Accumulation(model, optimizer)


def check_joinable(model: nn.Module) -> None:
    """Raise ValueError, with a layer's name, if a layer cannot join forwards to one step."""
    for name, layer in model.named_modules():
        if not isinstance(layer, NormLayer):
            continue
        if (obstacle := layer.pooling_obstacle()) is not None:
            raise ValueError(f"{name}: {obstacle}")
        if layer.norm_batch_size is not None:
            raise ValueError(
                f"{name}: norm_batch_size={layer.norm_batch_size} cuts a batch where accumulate "
                "joins batches; set it to None"
            )
