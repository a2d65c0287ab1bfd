"""Networks with several copies of each norm, and what of a network belongs to its norms."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from anybatch.conversion.module_swap import move_hooks, swap
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.conversion.norm_with_activation import ends_in_activation
from anybatch.core.arguments import check_count, check_module
from anybatch.layers.norm_copies import NormCopies, use_copy
from anybatch.layers.uncentered_norm_layer import settle_centring
from anybatch.registry import Method


def check_copies(copies: int, methods: Iterable[Method]) -> None:
    """Refuse a number of copies, or methods that cannot have copies.

    Raises:
        ValueError: If it is below 1, or a method has no statistics or follows a convolution.
    """
    check_count("copies", copies)
    for method in methods if copies > 1 else ():
        if method.builder is not None or method.binds:
            why = "follows one convolution" if method.binds else "keeps no statistics"
            raise ValueError(f"copies={copies}: {method.name} {why}; choose another method")


def copied(norm: nn.Module, copies: int, share_affine: bool) -> nn.Module:
    """A norm with so many copies, which take over its hooks.

    Example:
        >>> len(copied(nn.BatchNorm1d(3), 2, True).copies)
        2
    """
    if copies == 1:
        return norm
    hooks = nn.Identity()
    if not ends_in_activation(norm):  # which is a hook of the norm's own
        move_hooks(norm, hooks)
        move_hooks(nn.Identity(), norm)
    several = NormCopies(norm, copies, share_affine)
    move_hooks(hooks, several)
    return several


def keep_copy(model: nn.Module, number: int) -> nn.Module:
    """Replace the copies of each norm by one of them, in place: for one domain's network.

    Args:
        model: A network converted with ``copies=``.
        number: Of the copy, from 0.

    Returns:
        The model; the norm where the model is itself copies of one.

    Raises:
        ValueError: If a norm has no such copy, or there are no copies; the model is as it was.

    Example:
        >>> import anybatch
        >>> net = anybatch.convert(nn.Sequential(nn.BatchNorm1d(3)), "bn", copies=2)
        >>> keep_copy(net, 1)[0]
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True)
    """
    with use_copy(model, number):
        several = [module for module in model.modules() if isinstance(module, NormCopies)]
    kept: dict[nn.Module, nn.Module] = {}
    for module in several:
        kept[module] = module.copies[number]
        if not ends_in_activation(kept[module]):
            move_hooks(module, kept[module])
    converted = swap(model, kept)
    settle_centring(converted)
    return converted


def norm_keys(model: nn.Module, *, affine: bool = True) -> list[str]:
    """The keys of a network's ``state_dict`` that belong to its batch norms.

    In federated training they stay on a client (FedBN, Li et al. 2021); with ``affine=False`` scale
    and shift are averaged with the other weights (SiloBN, Andreux et al. 2020).

    Args:
        model: A network with batch norms, torch's, frozen ones or of this library.
        affine: Whether scale and shift belong to them (default True).

    Returns:
        The keys, in the order of the ``state_dict``.

    Example:
        >>> norm_keys(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), affine=False)
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    check_module("model", model)
    places = model.named_modules(remove_duplicate=False)
    prefixes = tuple(f"{n}." if n else "" for n, module in places if is_batch_norm(module))
    keys = [key for key in model.state_dict() if prefixes and key.startswith(prefixes)]
    return [key for key in keys if affine or key.split(".")[-1] not in ("weight", "bias")]
