# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The backward kernels, as the forward ones: one launch, or three.

Tables: `applied` as in the forward; `slopes` ``(2, groups, C)`` each group's gradients of bias and
scale; `on` ``(4, groups, C)`` centre, factors of dy and x, and constant; `partial`
``(2, groups x parts, C)`` the sums of parts.
"""

import triton
import triton.language as tl

from anybatch.backends.triton import constants as sources
from anybatch.backends.triton.rules import (
    arrive,
    average,
    finite,
    newest_weight,
    number,
    on_input,
    products,
    push,
    read_counter,
    read_row,
    read_window,
)
from anybatch.backends.triton.tiles import (
    get,
    group_rows,
    part_channels,
    part_rows,
    places,
    pool,
    put,
    row_sums,
    sides,
)

_TILE: tl.constexpr = tl.constexpr(sources.TILE)
_PARTS: tl.constexpr = tl.constexpr(sources.PARTS)


@triton.jit(do_not_specialize=sources.LOOSE)
def backward_columns(
    dy,
    x,
    dx,
    weight,
    applied,
    slopes,
    row0,
    window0,
    counter0,
    tracked,
    block_counter,
    inner,
    outer,
    start,
    small,
    large,
    groups,
    group,
    all_groups,
    parts,
    length0,
    eps,
    eps_rest,
    update_weight,
    update_weight_rest,
    option0,
    option0_rest,
    option1,
    option1_rest,
    CENTERED: tl.constexpr,
    USES: tl.constexpr,
    AVERAGED: tl.constexpr,
    MOVES: tl.constexpr,
    BEGIN: tl.constexpr,
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

    num_statistics = channels // WIDTH
    k = c // WIDTH
    mean = get(applied, 0, group + g, all_groups, k, num_statistics, inside)
    var = get(applied, 1, group + g, all_groups, k, num_statistics, inside)
    AT_D: tl.constexpr = 2 + (USES & 1)
    AT_CENTER: tl.constexpr = AT_D + ((USES >> 1) & 1)
    AT_OWN: tl.constexpr = AT_CENTER + ((USES >> 1) & 2)
    r = mean
    d = mean
    batch_weight = mean
    own_alone = mean
    center = mean
    if USES & 1:
        r = get(applied, 2, group + g, all_groups, k, num_statistics, inside)
    if USES & 2:
        d = get(applied, AT_D, group + g, all_groups, k, num_statistics, inside)
    if USES & 4:
        center = get(applied, AT_CENTER, group + g, all_groups, k, num_statistics, inside)
        batch_weight = get(applied, AT_CENTER + 1, group + g, all_groups, k, num_statistics, inside)
    if USES & 8:
        own_alone = get(applied, AT_OWN, group + g, all_groups, k, num_statistics, inside)
    w = tl.load(weight + c, mask=inside, other=0.0)
    ROWS: tl.constexpr = MOVES & 7
    WINDOWS: tl.constexpr = (MOVES >> 15) & 3
    COUNTERS: tl.constexpr = (MOVES >> 23) & 3
    old0 = read_row(row0, c, inside, ROWS > 0, ACC)
    table0, sum0, full0 = read_window(
        window0, c, inside, channels, length0, WINDOWS > 0, BLOCK_W, ACC
    )
    now0 = read_counter(counter0, COUNTERS > 0)
    newest = number(update_weight, update_weight_rest, ACC)
    if BEGIN:
        newest = newest_weight(newest, tl.maximum(tl.load(tracked), 1), BEGIN)

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
    eps_ = number(eps, eps_rest, ACC)
    dw, slope, product, inverse = products(sum_dy, sum_dyx, w, mean, var, r, d, center, eps_, USES)
    values = rows.to(ACC) * WIDTH
    psi = pool(product, lane, WIDTH, SPAN) / values
    used_psi = psi
    if AVERAGED:
        if WINDOWS > 0:
            sum0 = (psi + sum0) / tl.minimum(now0, length0)
        zero = tl.zeros((1,), ACC)
        averaged = average(
            psi,
            psi,
            psi,
            psi,
            old0,
            old0,
            old0,
            old0,
            sum0,
            sum0,
            full0,
            full0,
            now0,
            now0,
            zero,
            zero,
            number(option0, option0_rest, ACC),
            number(option1, option1_rest, ACC),
            zero,
            zero,
            zero,
            zero,
            eps_,
            newest,
        )
        used_psi = averaged
        if USES & 8:
            used_psi = tl.where(own_alone > 0, psi, averaged)
    on_dy = slope * inverse
    on_x, constant = on_input(
        sum_dy, slope, used_psi, batch_weight, inverse, lane, values, USES, CENTERED, WIDTH, SPAN
    )
    put(slopes, 0, group + g, all_groups, c, channels, sum_dy, inside)
    put(slopes, 1, group + g, all_groups, c, channels, dw, inside)
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
    if UPDATE and AVERAGED:
        tl.debug_barrier()  # all threads have read what changes now
        kept = inside & finite(psi)
        if ROWS > 0:
            tl.store(row0 + c, averaged, mask=kept)
        if WINDOWS > 0:
            push(window0, table0, psi, c, kept, channels, length0, BLOCK_W)
        if COUNTERS > 0:
            last, _ = arrive(block_counter, tl.program_id(0) * 0)
            tl.store(counter0, tl.sum(now0, 0), mask=last)


@triton.jit(do_not_specialize=sources.LOOSE)
def backward_parts(
    dy,
    x,
    applied,
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
    AT_CENTER: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The two sums of a part of a group, so many tiles."""
    ACC: tl.constexpr = applied.dtype.element_ty
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    c, inside, place = part_channels(channels, BLOCK_C)
    g, begin, end, own_tiles = part_rows(
        place, parts, tiles, start, small, large, length, BLOCK_M, LONG
    )
    center = get(applied, AT_CENTER, group + g, all_groups, c // WIDTH, channels // WIDTH, inside)
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
