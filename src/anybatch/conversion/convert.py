"""Replacing the batch norms of a network by a method's layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from anybatch.conversion.module_swap import let_go, swap
from anybatch.conversion.norm_copies import copied
from anybatch.conversion.norm_types import listed
from anybatch.conversion.norm_with_activation import ends_in_activation, keep_activation
from anybatch.conversion.observe import undone_on_failure
from anybatch.conversion.plan import Decisions, decide
from anybatch.conversion.plan_table import PlanRow
from anybatch.conversion.relu_fusion.fused_block import fuse_block, unfuse
from anybatch.conversion.replacement import replacement
from anybatch.conversion.saving import save_for_plain_code
from anybatch.conversion.summary import summary
from anybatch.core.arguments import counted
from anybatch.core.module_state import has_initial_statistics
from anybatch.core.name_patterns import Where
from anybatch.core.notices import LOGGER, NoEffectWarning
from anybatch.layers.momentum_batch_norm import share_notice
from anybatch.layers.uncentered_norm_layer import UncenteredNormLayer, settle_centring
from anybatch.layers.weight_centralization import decentralize, weight_centralization
from anybatch.registry import FROZEN


def convert(
    model: nn.Module,
    method: str | Mapping[str, str],
    *,
    batch_size: int | None = None,
    example_inputs: Any = None,
    where: Where | None = None,
    centralize: bool | None = None,
    fuse: bool = False,
    copies: int = 1,
    share_affine: bool = True,
    verbose: bool = False,
    **options: Any,
) -> nn.Module:
    """Swap the batch norms of a network for a method's layers, in place.

    Parameters stay the same objects, so an optimizer made before stays valid. Statistics, train and
    eval flags, requires_grad, hooks, sharing, device and dtype are kept. The output of a trained
    network in evaluation mode stays the same, except for `bgn gn ln in`, which cannot keep it. The
    network is converted as a whole or left as it was. One line about what was done goes to the
    logger "anybatch", at level INFO.

    - Layers that sample: each gets its own seed, from the option `seed` (default 0) and its name. A
      network for `vdn`, `fs+vdn` or `bs+vdn` trains in a `VirtualDataset`.
    - "cbn": each layer is bound to the convolution or linear layer that feeds it; a norm fed by
      anything else stays as it is, and `plan` says why.
    - "mabn": in a fresh network, the weights of the convolutions that feed the norms are
      centralized; those of linear layers only with `centralize=True` (the paper centralizes
      kernels). Trained weights are centralized only with `centralize=True`, because that changes
      the output. From "mabn" to another method, centred weights are written into plain layers,
      unless `centralize=True`.
    - "brn": in a trained network it starts without a warm-up.
    - Frozen norms (torchvision's, detectron2's, those of transformers' detectors) become layers of
      the method whose scale and shift are trained; `where` leaves them out. "frozen" is a method
      too: statistics, scale and shift become constants (`FrozenBatchNorm2d`).
    - A network of transformers saves itself with `save_pretrained` so that plain code loads it.
    - `fuse=True`: a norm whose output goes only to a ReLU, or to an addition and then only to a
      ReLU, computes these in its own pass in training. The blocks that call such norms then have a
      subclass of their class, `FusedBottleneck` for `Bottleneck`, with the same parts, names and
      output. What is not certain to give the same output stays as it is, and `plan` says why.

    Args:
        model: The network.
        method: A method's short name, or a mapping of name patterns to short names; the first
            pattern that matches a norm decides.
        batch_size: Examples in a training forward, for the methods that use it (default None: they
            read it from the first batch).
        example_inputs: What the network takes (a tensor, a tuple of positional or a mapping of
            keyword arguments), for networks that cannot be traced symbolically.
        where: Which norms: a name pattern such as ``"encoder.*"`` or a predicate ``(name, module)``
            (default None: all).
        centralize: Whether to centralize the weights of the layers that feed the norms (default
            None: of the convolutions in a fresh network, for "mabn").
        fuse: Whether norms compute the ReLU that follows them, or the addition and the ReLU, in
            their own pass (default False; it also undoes an earlier fusion).
        copies: How many sets of statistics each norm gets, for domains, levels or kinds of batches
            (default 1); `use_copy` chooses one.
        share_affine: Whether they share scale and shift (default True).
        verbose: Print the line that is logged (default False).
        **options: The method's own arguments, such as ``window=32``.

    Returns:
        The model; its replacement where the model is itself a batch norm.

    Raises:
        ValueError: For an unknown method, a wrapped or compiled model, norms that cannot be
            converted (all of them are named, with the remedy), or "cbn" for a network in which
            no norm can be bound.
        TypeError: For an option that the method does not have.

    Warns:
        NoEffectWarning: If there was nothing to convert, if weights of a fresh network were not
            centralized because it cannot be traced, or if "frozen" norms have counted no batch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> weight = model[1].weight
        >>> convert(model, "gn", num_groups=2)[1]
        GroupNorm(2, 4, eps=1e-05, affine=True...)
        >>> model[1].weight is weight
        True
    """
    decided = decide(
        model,
        method,
        batch_size=batch_size,
        example_inputs=example_inputs,
        where=where,
        centralize=centralize,
        fuse=fuse,
        copies=copies,
        share_affine=share_affine,
        **options,
    )
    refuse_impossible(decided)
    chosen = [decision for decision in decided.rows if decision.method is not None]
    centred = [decision.decentralize for decision in chosen if decision.decentralize is not None]
    with undone_on_failure(model, [*(decision.norm for decision in chosen), *centred]):
        replacements = {
            d.norm: replacement(d.norm, d.method, d.options) for d in chosen if d.method
        }
        for feeder in centred:
            decentralize(feeder)
        for decision in decided.rows:
            if decision.centralize is not None:
                weight_centralization(decision.centralize)
            layer = replacements.get(decision.norm, decision.norm)
            if decision.follow is not None and isinstance(layer, UncenteredNormLayer):
                layer.follow(decision.follow)
            if decision.bind is not None:
                replacements[decision.norm].bind(decision.bind)  # type: ignore[operator]
    for norm, new in replacements.items():
        if ends_in_activation(norm):
            keep_activation(norm, new)
    replacements = {n: copied(new, copies, share_affine) for n, new in replacements.items()}
    let_go(model, replacements)
    unfused = unfuse(model)
    converted = swap(model, replacements)
    for block, fusion in decided.blocks.items():
        fuse_block(block, fusion.after(replacements))
    share_notice(module for new in replacements.values() for module in new.modules())
    settle_centring(converted)
    save_for_plain_code(converted)
    _report(decided, verbose)
    if not (chosen or unfused or decided.blocks):
        _warn_no_effect(decided)
    return converted


def refuse_impossible(decided: Decisions) -> None:
    """Raise if a norm cannot be converted, or if no norm can be bound for a method that binds."""
    refused = decided.plan.having("refuse")
    if refused:
        raise ValueError(
            f"nothing was converted, as {counted(len(refused), 'norm')} cannot be:\n"
            f"{_named(refused)}"
        )
    unbound = [decision.row for decision in decided.rows if decision.unbound]
    if unbound and all(decision.method is None for decision in decided.rows):
        method = next(method.name for method in decided.methods.values() if method.binds)
        raise ValueError(
            f"method={method!r}: nothing was converted, as {method} binds a norm to the "
            f"convolution or linear layer that feeds it, and none can be bound:\n{_named(unbound)}"
        )


def _report(decided: Decisions, verbose: bool) -> None:
    """Log what was done; warn of frozen norms that saw no batch, and of weights not centralized."""
    line = summary(decided)
    LOGGER.info(line)
    if verbose:
        print(line)
    unseen = [d.row for d in decided.rows if d.method is FROZEN and _is_unseen(d.norm)]
    if unseen:
        warnings.warn(
            f"convert: {counted(len(unseen), 'norm')} became constants that change nothing, mean 0 "
            "and variance 1, as no batch was counted: load or train the network first, and convert "
            f"it then\n{_named(unseen)}",
            NoEffectWarning,
            stacklevel=3,
        )
    if decided.unused:
        warnings.warn(
            f"convert: method has patterns that choose nothing: {', '.join(decided.unused)}; they "
            "match no norm, or one before them does (the first that matches counts)",
            NoEffectWarning,
            stacklevel=3,
        )
    untraced = [decision.row for decision in decided.rows if decision.untraced]
    if untraced:
        warnings.warn(
            f"convert: the weights before {counted(len(untraced), 'norm')} were not centralized, "
            "as the model cannot be traced, and mabn without centred weights subtracts no mean: "
            f"give example_inputs=, what the model's forward takes\n{_named(untraced)}",
            NoEffectWarning,
            stacklevel=3,
        )


def _is_unseen(norm: nn.Module) -> bool:
    var = norm._buffers.get("running_var")
    return var is not None and not var.is_meta and has_initial_statistics(norm)


def _warn_no_effect(decided: Decisions) -> None:
    """Warn that nothing was converted, unless everything is already as it was asked for."""
    rows = decided.plan.rows
    if any(row.reason.startswith("already ") for row in rows):
        return
    message = "convert: the model has no norm"
    if rows:
        message = f"convert changed nothing:\n{_named(rows)}"
    if rows and all(row.reason == "no batch norm" for row in rows):
        message += (
            "\nThese norms do not use the statistics of a batch. To use a method of anybatch, "
            "build the network with torch.nn.BatchNorm (norm='batch' in MONAI)."
        )
    warnings.warn(message, NoEffectWarning, stacklevel=3)


def _named(rows: Iterable[PlanRow]) -> str:
    return listed((row.name, row.reason) for row in rows)
