# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The backward kernels, as the forward ones: one launch, or three.

Tables: `used` as in the forward; `slopes` ``(2, groups, C)`` each group's gradients of bias and
scale; `on` ``(4, groups, C)`` centre, factors of dy and x, and constant; `partial`
``(2, groups x parts, C)`` the sums of parts.
"""

import triton
import triton.language as tl

from anybatch.backends import kinds
from anybatch.backends.triton import constants as sources
from anybatch.backends.triton.forward import get, put
from anybatch.backends.triton.rules import arrive, earlier, finite, flow, number, push
from anybatch.backends.triton.tiles import (
    group_rows,
    part_channels,
    part_rows,
    places,
    row_sums,
    sides,
)

_PLAIN: tl.constexpr = tl.constexpr(kinds.PLAIN)
_MOMENTUM: tl.constexpr = tl.constexpr(kinds.MOMENTUM)
_BATCH: tl.constexpr = tl.constexpr(kinds.BATCH)
_SMA: tl.constexpr = tl.constexpr(kinds.SMA)
_EMA: tl.constexpr = tl.constexpr(kinds.EMA)
_TILE: tl.constexpr = tl.constexpr(sources.TILE)
_PARTS: tl.constexpr = tl.constexpr(sources.PARTS)


@triton.jit(do_not_specialize=sources.LOOSE)
def backward_columns(
    dy,
    x,
    dx,
    weight,
    used,
    slopes,
    psi,
    psi_counter,
    tracked,
    arrivals,
    inner,
    outer,
    start,
    small,
    large,
    groups,
    group,
    all_groups,
    parts,
    psi_rows,
    eps,
    eps_rest,
    pace,
    pace_rest,
    KIND: tl.constexpr,
    AVERAGES: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    UPDATE: tl.constexpr,
    WANTED: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gradients of one group of examples in some columns.

    The SOURCE of sums is one tile, several, or parts that `backward_parts` left: then `x` is the
    table of them and `dx` takes centre, factors and constant.
    """
    ACC: tl.constexpr = weight.dtype.element_ty
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    block = tl.program_id(0) // groups
    g = tl.program_id(0) % groups
    lane = tl.arange(0, BLOCK_C)
    c = block * SPAN + lane
    inside = (lane < SPAN) & (c < channels)
    begin, rows = group_rows(g, start, small, large, length)
    row = tl.arange(0, BLOCK_M)[:, None]

    columns = channels // WIDTH
    k = c // WIDTH
    mean = get(used, 0, group + g, all_groups, k, columns, inside)
    var = get(used, 1, group + g, all_groups, k, columns, inside)
    third = mean
    fourth = mean
    center = mean
    if KIND != _PLAIN:
        third = get(used, 2, group + g, all_groups, k, columns, inside)
        fourth = get(used, 3, group + g, all_groups, k, columns, inside)
    if KIND == _MOMENTUM:
        center = third
    w = tl.load(weight + c, mask=inside, other=0.0)
    table = mean
    sums = mean
    old_psi = mean
    steps = tl.zeros((1,), ACC)
    old = tl.zeros((1,), ACC)
    count = tl.zeros((1,), tl.int64)
    if AVERAGES != _BATCH:
        count += tl.load(psi_counter)
    if AVERAGES == _SMA:
        table, sums, _ = earlier(psi, c, inside, channels, psi_rows, BLOCK_W)
        steps += tl.minimum(count + 1, psi_rows)
    elif AVERAGES == _EMA:
        old_psi = tl.load(psi + c, mask=inside, other=0.0)
        newest = number(pace, pace_rest, ACC)
        if CUMULATIVE:
            newest = 1 / (old + tl.maximum(tl.load(tracked), 1))
        old = tl.where(count > 0, 1 - newest, 0.0)

    if SOURCE == _TILE:
        valid = (row < rows) & inside[None, :]
        at = places(begin + row, c[None, :], channels, length, LAST)
        above = tl.load(dy + at, mask=valid, other=0.0).to(ACC)
        away = tl.load(x + at, mask=valid, other=0.0).to(ACC) - center[None, :]
        sum_dy = tl.sum(above, 0)
        sum_dyx = tl.sum(above * tl.where(valid, away, 0.0), 0)
    elif SOURCE == _PARTS:
        part = tl.arange(0, BLOCK_M)[:, None]
        there = (part < parts) & inside[None, :]
        from_ = x + (g * parts + part) * channels + c[None, :]
        sum_dy = tl.sum(tl.load(from_, mask=there, other=0.0), 0)
        sum_dyx = tl.sum(tl.load(from_ + groups * parts * channels, mask=there, other=0.0), 0)
    else:
        tiles = (rows + BLOCK_M - 1) // BLOCK_M
        sum_dy, sum_dyx = row_sums(
            dy,
            x,
            c,
            inside,
            center,
            begin,
            begin + rows,
            tiles,
            channels,
            length,
            LAST,
            BLOCK_M,
            BLOCK_C,
            ACC,
        )
    slope, own_psi, on_dy, on_x, constant = flow(
        sum_dy,
        sum_dyx,
        lane,
        w,
        mean,
        var,
        third,
        fourth,
        rows.to(ACC) * WIDTH,
        number(eps, eps_rest, ACC),
        sums,
        steps,
        old_psi,
        old,
        KIND,
        AVERAGES,
        WIDTH,
        SPAN,
    )
    put(slopes, 0, group + g, all_groups, c, channels, sum_dy, inside)
    put(slopes, 1, group + g, all_groups, c, channels, slope, inside)
    if SOURCE == _PARTS:
        put(dx, 0, g, groups, c, channels, center, inside)
        put(dx, 1, g, groups, c, channels, on_dy, inside)
        put(dx, 2, g, groups, c, channels, on_x, inside)
        put(dx, 3, g, groups, c, channels, constant, inside)
    elif WANTED:
        if SOURCE == _TILE:
            out = on_dy[None, :] * above + (on_x[None, :] * away + constant[None, :])
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask=valid)
        else:
            for i in range(tiles):
                m = begin + i * BLOCK_M + row
                valid = (m < begin + rows) & inside[None, :]
                at = places(m, c[None, :], channels, length, LAST)
                above = tl.load(dy + at, mask=valid, other=0.0, eviction_policy="evict_first")
                value = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_first")
                away = value.to(ACC) - center[None, :]
                out = on_dy[None, :] * above.to(ACC) + (on_x[None, :] * away + constant[None, :])
                tl.store(dx + at, out.to(dx.dtype.element_ty), mask=valid)
    if UPDATE and AVERAGES != _BATCH:
        tl.debug_barrier()  # all threads have read what changes now
        kept = inside & finite(own_psi)
        if AVERAGES == _SMA:
            push(psi, table, own_psi, c, kept, channels, psi_rows, BLOCK_W)
        else:
            tl.store(psi + c, own_psi + old * (old_psi - own_psi), mask=kept)
        last, _ = arrive(arrivals, tl.program_id(0) * 0)
        tl.store(psi_counter, tl.sum(count, 0) + 1, mask=last)


@triton.jit(do_not_specialize=sources.LOOSE)
def backward_parts(
    dy,
    x,
    used,
    partial,
    inner,
    outer,
    start,
    small,
    large,
    groups,
    group,
    all_groups,
    tiles,
    parts,
    KIND: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The two sums of a part of a group, so many tiles."""
    ACC: tl.constexpr = used.dtype.element_ty
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    c, inside, place = part_channels(channels, BLOCK_C)
    g, begin, end, own_tiles = part_rows(
        place, parts, tiles, start, small, large, length, BLOCK_M, LONG
    )
    where = 2 if KIND == _MOMENTUM else 0
    center = get(used, where, group + g, all_groups, c // WIDTH, channels // WIDTH, inside)
    total, product = row_sums(
        dy,
        x,
        c,
        inside,
        center,
        begin,
        end,
        own_tiles,
        channels,
        length,
        LAST,
        BLOCK_M,
        BLOCK_C,
        ACC,
    )
    put(partial, 0, place, groups * parts, c, channels, total, inside)
    put(partial, 1, place, groups * parts, c, channels, product, inside)


@triton.jit(do_not_specialize=sources.LOOSE)
def backward_write(
    dy,
    x,
    dx,
    on,
    inner,
    outer,
    start,
    small,
    large,
    groups,
    tiles,
    parts,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dx = on_dy * dy + on_x * (x - center) + constant, what was read last first."""
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    c, inside, place = part_channels(channels, BLOCK_C)
    place = groups * parts - 1 - place
    g, begin, end, own_tiles = part_rows(
        place, parts, tiles, start, small, large, length, BLOCK_M, LONG
    )
    center = get(on, 0, g, groups, c, channels, inside)[None, :]
    on_dy = get(on, 1, g, groups, c, channels, inside)[None, :]
    on_x = get(on, 2, g, groups, c, channels, inside)[None, :]
    constant = get(on, 3, g, groups, c, channels, inside)[None, :]
    row = tl.arange(0, BLOCK_M)[:, None]
    for i in range(own_tiles):
        m = begin + i * BLOCK_M + row
        valid = (m < end) & inside[None, :]
        at = places(m, c[None, :], channels, length, LAST)
        above = tl.load(dy + at, mask=valid, other=0.0, eviction_policy="evict_first")
        value = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_first")
        away = value.to(center.dtype) - center
        out = on_dy * above.to(center.dtype) + (on_x * away + constant)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=valid)
