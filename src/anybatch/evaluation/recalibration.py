"""Population statistics from data: what running averages only estimate."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase

from anybatch.conversion.norm_types import norm_kind
from anybatch.core.arguments import check_choice, check_from, check_module, first_input
from anybatch.core.name_patterns import Where, matches
from anybatch.core.norm_layer import NormLayer
from anybatch.core.text_tables import text_table
from anybatch.evaluation.batches import (
    Forward,
    Shown,
    check_repeatable,
    device_of,
    examples_in,
    reading,
)
from anybatch.evaluation.batches import run as run_batch
from anybatch.evaluation.population_moments import (
    Pool,
    group_of_processes,
    pool_across,
    raise_together,
)
from anybatch.evaluation.restore_model import borrowed, random_numbers
from anybatch.evaluation.valid_positions import valid_positions
from anybatch.layers.control import end_steps, no_update
from anybatch.layers.virtual_dataset import VirtualDataset

_REUSED = 20  # passes more, for a layer whose input depends on its own output


@dataclass(frozen=True)
class RecalibratedLayer:
    """The outcome for one layer.

    Attributes:
        name: In the model.
        kind: Its class.
        status: "recalibrated", or why it was left alone.
        values: Values per channel behind its statistics.
        mean_change: Distance of the old mean from the new, in new standard
            deviations, root mean square over the channels; None where there was none.
        var_change: Factor between the old and the new variance, geometric mean
            over the channels, from 1 on; None where there was none.
    """

    name: str
    kind: str
    status: str
    values: int = 0
    mean_change: float | None = None
    var_change: float | None = None


@dataclass(frozen=True)
class Recalibration:
    """The result of `recalibrate`; print it for a table.

    Attributes:
        layers: Every normalization layer with running statistics, in the order of the model.
        examples: Examples seen in a pass, by all processes.
        passes: Passes over the data.
        mode: As given.
        settled: Whether the last pass found what the one before it had found, or
            had to (always so unless a layer is used several times in a forward).
    """

    layers: tuple[RecalibratedLayer, ...]
    examples: int
    passes: int
    mode: str
    settled: bool

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "kind", "status", "values", "mean moved (std)", "variance (factor)")
        table = text_table(head, map(_cells, self.layers))
        more = "" if self.settled else "; statistics were still moving"
        return f"{table}\n{self.examples} examples, {self.passes} pass(es), {self.mode}{more}"


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    mode: Literal["layerwise", "together"] = "layerwise",
    where: Where | None = None,
    tolerance: float = 1e-6,
    progress: Shown = None,
    process_group: Any = None,
) -> Recalibration:
    """Replace running statistics by those of the data ("precise BN"), in every layer.

    Of each channel of a layer's input ``x``, over all values of all batches (the valid ones where
    the layer has a mask, as in a `forward` of your own with `masked`)::

        running_mean = mean(x)    running_var = sum((x - mean(x))**2) / (n - 1)

    pooled exactly (not a mean of batch variances) in float64, each batch weighing
    by its values. A layer of the uncentred form (moving average batch
    normalization) gets ``running_var = mean(x**2)`` and keeps its mean of 0. After
    training with small batches, averaging of weights, pruning, quantization, or
    on data of another domain.

    ``"layerwise"`` takes each layer's input from the network as it is at inference,
    with the new statistics in the layers before it. The outcome then depends on the
    data alone, not on how they come in batches, and is what inference will meet.
    One pass measures all layers at once, and settles those whose predecessors are
    settled: it takes as many passes as norms follow one another on the longest path,
    fewer where a pass moves nothing by more than `tolerance`. ``"together"`` is
    one pass in which all layers normalize by their batches, as in training (dropout
    is off): precise BN as its paper has it; the outcome depends on the batch
    size, and is noisy where that is small.

    ``torch.nn.GroupNorm`` has no running statistics; the averages that inference
    example weighing needs (four-things, equation 3) are collected as buffers
    ``running_mean`` and ``running_var``, which are not part of its ``state_dict``.

    Frozen layers, layers without running statistics and those that no batch reaches
    are left alone. Where anything fails, model and random numbers are as they were;
    the method's own state is always left alone. Where running statistics start fast
    (``momentum_warmup``), ``num_batches_tracked`` is set, so that the next batch does
    not replace them; a step that accumulates begins anew.

    Args:
        model: The network; only running statistics are changed.
        loader: Gives the data; read once a pass, with random numbers rewound, so
            that shuffling and augmentation are the same in each.
        forward: Called as ``forward(model, batch)`` (default: see `evaluation.batches.run`).
        max_batches: Use only so many batches (default None: all).
        mode: ``"layerwise"`` (default) or ``"together"``.
        where: Which layers: a name pattern or a predicate ``(name, module)``.
        tolerance: Largest change, in standard deviations of a channel or relative to
            its variance, that counts as none (default 1e-6).
        progress: Show a bar (default None: where standard error is a terminal), or a
            function that is called with the batches done and their number.
        process_group: Processes whose data are pooled (default None: all, where
            ``torch.distributed`` is initialized).

    Returns:
        What was done, layer by layer.

    Raises:
        ValueError: For an empty loader, a model without a layer to recalibrate,
            statistics that are not finite or come from one value, or a loader that
            can be read only once where several passes are needed.
        TypeError: For a loader or batch of another kind.

    Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3.1.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> result = recalibrate(net, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
        >>> net[0].running_mean.item(), net[0].running_var.item(), result.examples
        (3.0, 7.0, 3)
    """
    check_module("model", model)
    check_choice("mode", mode, ("layerwise", "together"))
    check_from("tolerance", tolerance, 0)
    group = group_of_processes(process_group)
    _refuse_lazy(model)
    if mode == "together" and any(isinstance(m, VirtualDataset) for m in model.modules()):
        raise ValueError(
            "mode='together': a VirtualDataset has virtual examples in training alone, and they "
            'would be counted; give mode="layerwise"'
        )
    with borrowed(model, training=False) as inner:
        found = {name: module for name, module in inner.named_modules() if _counts(module)}
        chosen = {n: m for n, m in found.items() if _obstacle(n, m, where) is None}
        if not chosen:
            raise ValueError(_nothing(model, found, where))
        depth = sum(not isinstance(module, nn.GroupNorm) for module in chosen.values())
        most = 1 if mode == "together" else max(depth, 1)
        if most > 1:
            check_repeatable(loader, f'mode="layerwise" takes up to {most} passes')
        if mode == "together":
            for module in chosen.values():
                module.train(not isinstance(module, nn.GroupNorm))
        rewind, device = random_numbers(inner), device_of(inner)
        read = partial(reading, loader, device=device, max_batches=max_batches, progress=progress)
        old = {name: _stored(module) for name, module in chosen.items()}
        meter = _Meter(chosen)
        passes, settled = 0, False
        while not settled:
            rewind()
            title = f"pass {passes + 1} of up to {most}" if most > 1 else "recalibrating"
            with read(title=title) as batches:
                pools, examples, reused = meter.measure(inner, batches, forward, group)
            passes += 1
            new = {name: _statistics(chosen[name], pool) for name, pool in pools.items()}
            change = max(_change(_stored(chosen[name]), new[name]) for name in new)
            if mode == "together":
                settled = True
                break
            for name, statistics in new.items():
                if not isinstance(chosen[name], nn.GroupNorm):
                    _store(chosen[name], statistics)
            settled = change <= tolerance or (passes >= most and not reused)
            if passes >= most + (_REUSED if reused else 0):
                break
        _check(pools, new)
    for name, statistics in new.items():
        _store(chosen[name], statistics)
    rows = []
    for name, module in found.items():
        kind, why = type(module).__name__, _obstacle(name, module, where)
        if why is not None or name not in new:
            rows.append(RecalibratedLayer(name, kind, why or "left alone: no batch reached it"))
        else:
            changes = _distances(old[name], new[name], module)
            rows.append(RecalibratedLayer(name, kind, "recalibrated", pools[name].count, *changes))
    return Recalibration(tuple(rows), examples, passes, mode, settled)


class _Meter:
    """Pools the inputs of layers, while a network runs."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.pools: dict[str, Pool] = {}
        for name, module in layers.items():
            # After the forward: by then hooks that give the layer its mask have run.
            module.register_forward_hook(self._listener(name), with_kwargs=True)

    def measure(
        self, model: nn.Module, batches: Iterator[Any], forward: Forward | None, group: Any
    ) -> tuple[dict[str, Pool], int, bool]:
        """Statistics by layer, examples seen, and whether a layer was used more than once."""
        self.pools = {name: Pool.empty(*_shape(module)) for name, module in self.layers.items()}
        error: BaseException | None = None
        examples = count = 0
        try:
            with torch.no_grad(), no_update():
                for batch in batches:
                    run_batch(model, batch, forward)
                    examples += examples_in(batch)
                    count += 1
        except BaseException as caught:
            error = caught
        try:
            raise_together(error, group, device_of(model))
        finally:
            del error
        reused = any(pool.calls > count for pool in self.pools.values())
        if group is not None:
            self.pools = {name: pool_across(pool, group) for name, pool in self.pools.items()}
            seen = Pool.empty(2, device_of(model))
            seen.count = 1
            seen.mean += torch.tensor([examples, reused], device=seen.mean.device)
            seen = pool_across(seen, group)
            examples, reused = round(float(seen.mean[0]) * seen.count), bool(seen.mean[1])
        reached = {name: pool for name, pool in self.pools.items() if pool.count}
        if not reached:
            raise ValueError(
                "model: no batch reached any of its normalization layers; with a forward of your "
                "own, let it call the model it is given"
            )
        return reached, examples, reused

    def _listener(self, name: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            x = first_input(args, kwargs)
            self.pools[name].add(x, valid_positions(module, args, kwargs, x))

        return listen


def _counts(module: nn.Module) -> bool:
    """True if a module is a norm that this is about, though perhaps to be left alone."""
    kind = norm_kind(module)
    return kind is not None and (kind.family != "other" or isinstance(module, nn.GroupNorm))


def _obstacle(name: str, module: nn.Module, where: Where | None) -> str | None:
    """The reason why a layer is left alone, or None."""
    kind = norm_kind(module)
    frozen = isinstance(module, NormLayer) and module.frozen
    if frozen or (kind is not None and kind.family == "frozen"):
        return "left alone: frozen"
    if not matches(where, name, module):
        return "left alone: not in where"
    if not isinstance(module, nn.GroupNorm) and getattr(module, "running_var", None) is None:
        return "left alone: no running statistics"
    return None


def _nothing(model: nn.Module, found: dict[str, nn.Module], where: Where | None) -> str:
    if not found:
        return f"model: {type(model).__name__} has no batch norm or group norm to recalibrate"
    reasons = "; ".join(f"{n or 'the model'} {_obstacle(n, m, where)}" for n, m in found.items())
    given = "model" if where is None else f"where={where!r}"
    return f"{given}: there is no layer to recalibrate: {reasons}"


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _LazyNormBase):
            raise ValueError(
                f"model: {name or 'it'} does not know its channels yet; run one batch through it"
            )


def _shape(module: nn.Module) -> tuple[int, torch.device | None]:
    channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    tensors = (*module.buffers(recurse=False), *module.parameters(recurse=False))
    return int(channels), tensors[0].device if tensors else None  # type: ignore[arg-type]


def _statistics(module: nn.Module, pool: Pool) -> tuple[Tensor | None, Tensor]:
    """The new running mean (None: leave it) and running variance of a layer."""
    if isinstance(module, NormLayer) and not module.centered:
        return None, pool.second_moment()
    return pool.mean, pool.var()


def _stored(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """A copy of a layer's running mean and variance in float64; None where it has none."""
    mean, var = module._buffers.get("running_mean"), module._buffers.get("running_var")
    if mean is None or var is None:
        return None
    place = Pool.empty(0, var.device).mean.device
    return mean.detach().to(place, torch.float64), var.detach().to(place, torch.float64)


def _store(module: nn.Module, statistics: tuple[Tensor | None, Tensor]) -> None:
    """Put statistics into a layer, into all its memories."""
    mean, var = statistics
    end_steps(module)  # else its next micro-batch goes back to where the step began
    for other in module.further_memories if isinstance(module, NormLayer) else ():
        _store(other, statistics)
    with torch.no_grad():
        for name, value in (("running_mean", mean), ("running_var", var)):
            if value is None:
                continue
            buffer = module._buffers.get(name)
            if buffer is None:  # a group norm
                like = next(module.parameters(recurse=False), value.float())
                dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
                buffer = value.to(like.device, dtype, copy=True)
                module.register_buffer(name, buffer, persistent=False)
            else:
                buffer.copy_(value)
    if isinstance(module, NormLayer):
        module.end_momentum_warmup()


def _change(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor | None, Tensor]) -> float:
    """Largest change of a channel's statistics; infinite from nothing or what is not finite."""
    if old is None:
        return 0.0  # a group norm's averages, which nothing depends on
    mean, var = new
    scale = var.clamp(min=1e-12)
    change = ((var - old[1]).abs() / scale).max()
    if mean is not None:
        change = torch.maximum(change, ((mean - old[0]).abs() / scale.sqrt()).max())
    return float(torch.nan_to_num(change, nan=torch.inf))


def _distances(
    old: tuple[Tensor, Tensor] | None, new: tuple[Tensor | None, Tensor], module: nn.Module
) -> tuple[float | None, float | None]:
    if old is None:
        return None, None
    eps = float(module.eps)  # type: ignore[arg-type]
    mean, var = new
    moved = None
    if mean is not None:
        moved = float(((mean - old[0]).square() / (var + eps)).mean().sqrt())
    return moved, float(((var + eps) / (old[1] + eps)).log().abs().mean().exp())


def _check(pools: dict[str, Pool], new: dict[str, tuple[Tensor | None, Tensor]]) -> None:
    for name, (mean, var) in new.items():
        what = name or "the model"
        if not all(bool(t.isfinite().all()) for t in (mean, var) if t is not None):
            raise ValueError(
                f"model: the input of {what} is not finite on these data; nothing was changed. "
                "Look for infinite inputs or weights before it"
            )
        if pools[name].count < 2 and mean is not None:
            raise ValueError(
                f"loader gave {what} one value per channel, which has no variance: give more data"
            )


def _cells(row: RecalibratedLayer) -> tuple[str, ...]:
    moved = "" if row.mean_change is None else f"{row.mean_change:.4f}"
    factor = "" if row.var_change is None else f"{row.var_change:.4f}"
    values = str(row.values) if row.values else ""
    return row.name or "(the model)", row.kind, row.status, values, moved, factor
