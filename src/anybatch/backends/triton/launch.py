"""Launching the GPU kernels: which ones, over how many programs, in what tiles."""

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.backends.protocol import MethodSpec, start_of
from anybatch.backends.rule import BACKWARD_OPTIONS, COUNTERS, NUMBERS, OPTIONS, ROWS, WINDOWS
from anybatch.backends.triton.backward import backward_parts, backward_write
from anybatch.backends.triton.constants import PARTS, TILE, TILES
from anybatch.backends.triton.forward import forward_parts, forward_track, forward_write
from anybatch.backends.triton.method_kernels import kernels_for, padded

# Chosen by reckoning for an H200: 132 processors of 2,048 threads, 4.8 TB/s, 50 MB of cache.
_SECTOR = 32  # bytes that memory gives at a time: channels of a program, channels last
_TILE = 8192  # values that a program keeps in registers
_PART = 4096  # values of a tile where a program takes several
_REACH = 2**16  # values of a group's columns that one program takes whatever the others do
_FAR = 2**18  # the same, where there are programs enough for all processors
_WAVES = 8  # programs a processor, where columns are cut into parts
_PARTS = 512  # parts of a group at most
_SETTLED = 2**13  # values that a program settles on
_LONG = 2**31 - 2**24  # values, from which on 32 bits are too short


class Layout(NamedTuple):
    """How a normalization batch lies in memory, and how it is cut into groups.

    Attributes:
        last: Whether channels are side by side.
        channels: C.
        length: Positions of an example.
        itemsize: Bytes of a value.
        sizes: Examples of each group.
        width: Channels that share statistics.
        long: Whether offsets need 64 bits.
    """

    last: bool
    channels: int
    length: int
    itemsize: int
    sizes: tuple[int, ...]
    width: int
    long: bool


class Plan(NamedTuple):
    """Which programs a launch has.

    Attributes:
        source: TILE, TILES or PARTS.
        sides: Values side by side, in units of `align`, and the other side.
        cut: Examples of the smaller groups, and how many groups have one more.
        align: Power of two that divides the side.
        span: Channels of a program that decides.
        block: Rows and channels of its tile.
        warps: Warps of it.
        programs: How many there are for a group.
        part_block: Rows and channels of a tile of a part.
        tiles: Tiles of a part.
        parts: Parts of a group.
        part_programs: Programs for a part of all channels.
    """

    source: int
    sides: tuple[int, int]
    cut: tuple[int, int]
    align: int
    span: int
    block: tuple[int, int]
    warps: int
    programs: int
    part_block: tuple[int, int] = (1, 1)
    tiles: int = 1
    parts: int = 1
    part_programs: int = 1


def forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    applied: Tensor,
    own: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    block_counter: Tensor,
    spec: MethodSpec,
    layout: Layout,
    start: int,
    group: int,
    update_weight: float,
    eps: float,
    update: bool,
) -> None:
    """Normalize a batch, and remember it if it is to `update`.

    Args:
        x: Input, dense, channels first or last.
        y: Output, to be written.
        weight: Scale.
        bias: Shift.
        applied: Takes the statistics to normalize by, ``(rows, all groups, K)``.
        own: Takes the groups' own, ``(2, all groups, C)``; it may be `applied`.
        running: Running mean, running variance, batches tracked.
        block_counter: A whole number on the device that is 0.
        spec: The method.
        layout: Of this normalization batch.
        start: Its first example.
        group: Its first group in the tables.
        update_weight: Of the newest batch in running statistics, see `NormCall`.
        eps: Added to the variance.
        update: Whether state may change.
    """
    plan, groups = plan_for(layout, processors(x.device)), len(layout.sizes)
    num_statistics, method, kept = plan.source != PARTS, kernels_for(spec), spec.kept
    source, target, partial = x, y, x
    if not num_statistics:
        partial = weight.new_empty(2, groups * plan.parts, layout.channels)
        source, target = partial, weight.new_empty(3, groups, layout.channels)
        _over_parts(
            forward_parts,
            plan,
            layout,
            (x, partial),
            start,
            CENTERED=spec.centered,
            ACC=_type_of(weight),
        )
    ruled = spec.method.forward.rule is not None
    alone = groups == 1 and (ruled or layout.sizes[0] * layout.length > 1)
    lengths = [len(window) for window in kept.windows]
    begin, least = start_of(update_weight)
    method.forward[(plan.programs * groups,)](
        source,
        target,
        weight,
        bias,
        applied,
        own,
        *running,
        *padded(kept.rows, ROWS, weight),
        *padded(kept.windows, WINDOWS, weight),
        *padded(kept.counters, COUNTERS, block_counter),
        *padded(kept.numbers, NUMBERS, weight),
        block_counter,
        *plan.sides,
        start,
        *plan.cut,
        groups,
        group,
        applied.shape[1],
        plan.tiles * plan.part_block[0],
        plan.parts,
        *padded(tuple(lengths), WINDOWS, 1),
        *halves((eps, least, *padded(kept.options, OPTIONS, 0.0))),
        RULED=ruled,
        CENTERED=spec.centered,
        USES=method.uses,
        MOVES=method.moves,
        BEGIN=begin,
        UPDATE=update and alone,
        BLOCK_W=power(max(lengths)) if lengths else 0,
        **_shape(plan, layout),
    )
    if not num_statistics:
        _over_parts(forward_write, plan, layout, (x, y, target), start)
    if update and groups > 1:
        _track(own, running, block_counter, layout, plan, group, update_weight)


def _track(
    own: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    block_counter: Tensor,
    layout: Layout,
    plan: Plan,
    group: int,
    update_weight: float,
) -> None:
    """Groups of one value a channel have no variance to track; the larger ones come first."""
    sizes = [size for size in layout.sizes if size * layout.length > 1]
    if not sizes:
        return
    rows, wide = min(power(len(sizes)), 64), 16
    begin, least = start_of(update_weight)
    forward_track[(-(-layout.channels // wide),)](
        own,
        *running,
        block_counter,
        *plan.sides,
        *plan.cut,
        group,
        own.shape[1],
        len(sizes),
        sum(sizes),
        *halves((least,)),
        BEGIN=begin,
        LAST=layout.last,
        ALIGN=plan.align,
        BLOCK_M=rows,
        BLOCK_C=wide,
        num_warps=2,
    )


def backward(
    dy: Tensor,
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    applied: Tensor,
    slopes: Tensor,
    tracked: Tensor,
    block_counter: Tensor,
    spec: MethodSpec,
    layout: Layout,
    start: int,
    group: int,
    update_weight: float,
    eps: float,
    update: bool,
    wanted: bool,
) -> None:
    """Gradients of `forward`.

    Args:
        dy: Gradient of the output, as ``x`` in memory.
        x: Input.
        dx: Takes the gradient of the input.
        weight: Scale.
        applied: Statistics that it was normalized by.
        slopes: Takes each group's gradients of bias and scale, ``(2, all groups, C)``.
        tracked: Batches tracked.
        block_counter: A whole number on the device that is 0.
        spec: The method.
        layout: Of this normalization batch.
        start: Its first example.
        group: Its first group in the tables.
        update_weight: Of the newest in an exponential average, see `NormCall`.
        eps: Added to the variance.
        update: Whether averages may change.
        wanted: Whether to write `dx`.
    """
    plan, groups = plan_for(layout, processors(x.device)), len(layout.sizes)
    above, source, target = dy, x, dx
    if plan.source == PARTS:
        source = weight.new_empty(2, groups * plan.parts, layout.channels)
        target = weight.new_empty(4, groups, layout.channels)
        _over_parts(
            backward_parts,
            plan,
            layout,
            (dy, x, applied, source),
            start,
            (group, applied.shape[1]),
            AT_CENTER=max(spec.method.forward.row("center"), 0),
            WIDTH=layout.width,
        )
    method, kept = kernels_for(spec), spec.averages
    length = len(kept.windows[0]) if kept.windows else 1
    begin, least = start_of(update_weight)
    method.backward[(plan.programs * groups,)](
        above,
        source,
        target,
        weight,
        applied,
        slopes,
        *padded(kept.rows, 1, weight),
        *padded(kept.windows, 1, weight),
        *padded(kept.counters, 1, tracked),
        tracked,
        block_counter,
        *plan.sides,
        start,
        *plan.cut,
        groups,
        group,
        applied.shape[1],
        plan.parts,
        length,
        *halves((eps, least, *padded(kept.options, BACKWARD_OPTIONS, 0.0))),
        CENTERED=spec.centered,
        USES=method.uses,
        AVERAGED=spec.method.backward.rule is not None,
        MOVES=method.averages,
        BEGIN=begin if spec.method.backward.rule is not None else 0,
        UPDATE=update,
        WANTED=wanted,
        BLOCK_W=power(length),
        **_shape(plan, layout),
    )
    if wanted and plan.source == PARTS:
        _over_parts(backward_write, plan, layout, (dy, x, dx, target), start)


def _shape(plan: Plan, layout: Layout) -> dict[str, Any]:
    """What kernels that decide are compiled for."""
    return {
        "LAST": layout.last,
        "LONG": layout.long,
        "ALIGN": plan.align,
        "WIDTH": layout.width,
        "SPAN": plan.span,
        "SOURCE": plan.source,
        "BLOCK_M": plan.block[0],
        "BLOCK_C": plan.block[1],
        "num_warps": plan.warps,
    }


def _over_parts(
    kernel: Any,
    plan: Plan,
    layout: Layout,
    tensors: tuple[Tensor, ...],
    start: int,
    place: tuple[int, ...] = (),
    **constants: Any,
) -> None:
    """Launch a kernel over all parts of all groups."""
    groups = len(layout.sizes)
    kernel[(plan.part_programs * groups * plan.parts,)](
        *tensors,
        *plan.sides,
        start,
        *plan.cut,
        groups,
        *place,
        plan.tiles,
        plan.parts,
        LAST=layout.last,
        LONG=layout.long,
        ALIGN=plan.align,
        BLOCK_M=plan.part_block[0],
        BLOCK_C=plan.part_block[1],
        num_warps=_warps(plan.part_block[0] * plan.part_block[1]),
        **constants,
    )


def needs_long(values: int) -> bool:
    """Whether offsets into so many values need 64 bits."""
    return values > _LONG


@lru_cache(maxsize=1024)
def plan_for(layout: Layout, many: int) -> Plan:
    """Which programs serve a normalization batch.

    Args:
        layout: How it lies.
        many: Processors of the device.

    Returns:
        The plan.
    """
    channels, width, groups = layout.channels, layout.width, len(layout.sizes)
    rows = max(layout.sizes) * layout.length
    side, other = (channels, layout.length) if layout.last else (layout.length, channels)
    align = min(side & -side, 16)
    small = min(layout.sizes)
    common = (side // align, other), (small, sum(size > small for size in layout.sizes)), align

    least = _SECTOR // layout.itemsize if layout.last else _together(rows, channels, many)
    span = min(width * max(least // width, 1), channels)
    wide, programs = power(span), -(-channels // span)
    if rows * wide <= _REACH or (rows * wide <= _FAR and programs * groups >= many):
        deep = power(rows)
        if deep * wide <= _TILE:
            return Plan(TILE, *common, span, (deep, wide), _warps(deep * wide), programs)
        block = max(_TILE // wide, 1), wide
        return Plan(TILES, *common, span, block, _warps(block[0] * wide), programs)

    across = min(power(channels), 256 // layout.itemsize) if layout.last else 1
    block = min(max(_PART // across, 1), power(rows)), across
    tiles, blocks = -(-rows // block[0]), -(-channels // across)
    span = min(width * max(8 // width, 1), channels)
    most = min(max(_SETTLED // power(span), 1), _PARTS)
    parts = max(min(_WAVES * many // (blocks * groups), tiles, most), 1)
    tiles_each = -(-tiles // parts)
    parts = -(-tiles // tiles_each)
    settled = power(parts), power(span)
    return Plan(
        PARTS,
        *common,
        span,
        settled,
        _warps(settled[0] * settled[1]),
        -(-channels // span),
        block,
        tiles_each,
        parts,
        blocks,
    )


def _together(rows: int, channels: int, many: int) -> int:
    """Channels of a program, channels first: several where they are short and many."""
    return max(min(1024 // power(rows), channels // (2 * many)), 1)


def _warps(values: int) -> int:
    """Warps for a tile: 16 values a thread."""
    return min(max(power(values) // 512, 1), 16)


def power(value: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (value - 1).bit_length()


@lru_cache(maxsize=256)
def halves(values: tuple[float, ...]) -> tuple[float, ...]:
    """Each number as two of float32, which is how kernels take them."""
    found: list[float] = []
    for value in values:
        (near,) = struct.unpack("f", struct.pack("f", value))
        found += [near, value - near]
    return tuple(found)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Processors of a device; 1 where the interpreter runs kernels on a CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _type_of(tensor: Tensor) -> Any:
    import triton.language as tl

    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
