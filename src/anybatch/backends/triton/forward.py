# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The forward kernels: one launch where a group's columns are small, three elsewhere.

`forward_columns` does all for one group of examples and some columns: moments, rule, output and
memory. Elsewhere `forward_parts` takes moments of parts of a group, `forward_columns` decides on
them, and `forward_write` writes the output. Where there are several groups, `forward_track` moves
the running statistics in the end.

Tables: `applied` ``(rows, groups, K)`` the statistics to normalize by; `own` ``(2, groups, C)`` the
groups' own; `on` ``(3, groups, C)`` mean, scale and shift; `partial` ``(2, groups x parts, C)``.
"""

import triton
import triton.language as tl

from anybatch.backends.triton import constants as sources
from anybatch.backends.triton.rules import (
    arrive,
    choose,
    factors,
    finite,
    move_row,
    newest_weight,
    number,
    push,
    read_counter,
    read_number,
    read_row,
    read_window,
    taken,
    track,
)
from anybatch.backends.triton.tiles import (
    get,
    group_rows,
    part_channels,
    part_moments,
    part_rows,
    places,
    pooled,
    put,
    row_moments,
    sides,
    tile_moments,
)

_TILE: tl.constexpr = tl.constexpr(sources.TILE)
_PARTS: tl.constexpr = tl.constexpr(sources.PARTS)


@triton.jit(do_not_specialize=sources.LOOSE)
def forward_columns(
    x,
    y,
    weight,
    bias,
    applied,
    own,
    running_mean,
    running_var,
    tracked,
    row0,
    row1,
    row2,
    row3,
    window0,
    window1,
    counter0,
    counter1,
    number0,
    number1,
    block_counter,
    inner,
    outer,
    start,
    small,
    large,
    groups,
    group,
    all_groups,
    held,
    parts,
    length0,
    length1,
    eps,
    eps_rest,
    update_weight,
    update_weight_rest,
    option0,
    option0_rest,
    option1,
    option1_rest,
    option2,
    option2_rest,
    option3,
    option3_rest,
    option4,
    option4_rest,
    option5,
    option5_rest,
    RULED: tl.constexpr,
    CENTERED: tl.constexpr,
    USES: tl.constexpr,
    MOVES: tl.constexpr,
    BEGIN: tl.constexpr,
    UPDATE: tl.constexpr,
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
    """Normalize one group of examples in some columns; with UPDATE, the only group, remember it.

    The SOURCE of moments is one tile, several, or parts that `forward_parts` left, `held` rows
    each: then `x` is the table of them and `y` takes mean, scale and shift.
    """
    ACC: tl.constexpr = weight.dtype.element_ty
    ROWS: tl.constexpr = MOVES & 7
    WINDOWS: tl.constexpr = (MOVES >> 15) & 3
    COUNTERS: tl.constexpr = (MOVES >> 23) & 3
    NUMBERS: tl.constexpr = (MOVES >> 27) & 3
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    block = tl.program_id(0) // groups
    g = tl.program_id(0) % groups
    lane = tl.arange(0, BLOCK_C)
    c = block * SPAN + lane
    inside = (lane < SPAN) & (c < channels)
    begin, rows = group_rows(g, start, small, large, length)
    row = tl.arange(0, BLOCK_M)[:, None]
    eps_ = number(eps, eps_rest, ACC)

    old_mean = read_row(running_mean, c, inside, RULED, ACC)
    old_var = read_row(running_var, c, inside, RULED, ACC)
    old0 = read_row(row0, c, inside, ROWS > 0, ACC)
    old1 = read_row(row1, c, inside, ROWS > 1, ACC)
    old2 = read_row(row2, c, inside, ROWS > 2, ACC)
    old3 = read_row(row3, c, inside, ROWS > 3, ACC)
    table0, sum0, full0 = read_window(
        window0, c, inside, channels, length0, WINDOWS > 0, BLOCK_W, ACC
    )
    table1, sum1, full1 = read_window(
        window1, c, inside, channels, length1, WINDOWS > 1, BLOCK_W, ACC
    )
    now0 = read_counter(counter0, COUNTERS > 0)
    now1 = read_counter(counter1, COUNTERS > 1)
    first = read_number(number0, NUMBERS > 0, ACC)
    second = read_number(number1, NUMBERS > 1, ACC)
    w = tl.load(weight + c, mask=inside, other=0.0)
    b = tl.load(bias + c, mask=inside, other=0.0)
    if SOURCE == _TILE:
        valid = (row < rows) & inside[None, :]
        at = places(begin + row, c[None, :], channels, length, LAST)
        value = tl.load(x + at, mask=valid, other=0.0).to(ACC)
        mean, square = tile_moments(value, valid, rows.to(ACC), CENTERED)
    elif SOURCE == _PARTS:
        mean, square = part_moments(
            x, g, groups, parts, held, rows, c, inside, channels, CENTERED, BLOCK_M, ACC
        )
    else:
        tiles = (rows + BLOCK_M - 1) // BLOCK_M
        mean, square = row_moments(
            x,
            c,
            inside,
            begin,
            begin + rows,
            tiles,
            channels,
            length,
            LAST,
            CENTERED,
            BLOCK_M,
            BLOCK_C,
            ACC,
        )
    var = square / rows.to(ACC)
    if WIDTH > 1:
        put(own, 0, group + g, all_groups, c, channels, mean, inside)
        put(own, 1, group + g, all_groups, c, channels, var, inside)
    middle, spread = pooled(mean, var, lane, WIDTH, SPAN)
    if WINDOWS > 0:
        new0, _ = taken(mean, var, mean, var, (MOVES >> 17) & 7)
        sum0 = (new0 + sum0) / tl.minimum(now0, length0)
    if WINDOWS > 1:
        new1, _ = taken(mean, var, mean, var, (MOVES >> 20) & 7)
        sum1 = (new1 + sum1) / tl.minimum(now0, length1)
    applied_mean, applied_var, r, d, batch_weight, own_alone, weight0, weight1, weight2, weight3 = (
        choose(
            middle,
            spread,
            old_mean,
            old_var,
            old0,
            old1,
            old2,
            old3,
            sum0,
            sum1,
            full0,
            full1,
            now0,
            now1,
            first,
            second,
            number(option0, option0_rest, ACC),
            number(option1, option1_rest, ACC),
            number(option2, option2_rest, ACC),
            number(option3, option3_rest, ACC),
            number(option4, option4_rest, ACC),
            number(option5, option5_rest, ACC),
            eps_,
            number(update_weight, update_weight_rest, ACC),
        )
    )
    scale, shift = factors(applied_mean, applied_var, r, d, w, b, eps_, USES)
    if SOURCE == _TILE:
        out = (value - applied_mean[None, :]) * scale[None, :] + shift[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)
    elif SOURCE == _PARTS:
        put(y, 0, g, groups, c, channels, applied_mean, inside)
        put(y, 1, g, groups, c, channels, scale, inside)
        put(y, 2, g, groups, c, channels, shift, inside)
    else:
        for i in range(tiles):
            m = begin + i * BLOCK_M + row
            valid = (m < begin + rows) & inside[None, :]
            at = places(m, c[None, :], channels, length, LAST)
            value = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC)
            out = (value - applied_mean[None, :]) * scale[None, :] + shift[None, :]
            tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)
    num_statistics = channels // WIDTH
    heads = inside & (lane % WIDTH == 0)
    k = c // WIDTH
    put(applied, 0, group + g, all_groups, k, num_statistics, applied_mean, heads)
    put(applied, 1, group + g, all_groups, k, num_statistics, applied_var, heads)
    zero = tl.zeros_like(spread)
    AT_D: tl.constexpr = 2 + (USES & 1)
    AT_CENTER: tl.constexpr = AT_D + ((USES >> 1) & 1)
    AT_OWN: tl.constexpr = AT_CENTER + ((USES >> 1) & 2)
    if USES & 1:
        put(applied, 2, group + g, all_groups, k, num_statistics, zero + r, heads)
    if USES & 2:
        put(applied, AT_D, group + g, all_groups, k, num_statistics, zero + d, heads)
    if USES & 4:
        put(applied, AT_CENTER, group + g, all_groups, k, num_statistics, middle, heads)
        part = zero + batch_weight
        put(applied, AT_CENTER + 1, group + g, all_groups, k, num_statistics, part, heads)
    if USES & 8:
        put(applied, AT_OWN, group + g, all_groups, k, num_statistics, zero + own_alone, heads)
    if UPDATE:
        tl.debug_barrier()  # all threads have read what changes now
        batches = tl.load(tracked) + 1
        newest = newest_weight(number(update_weight, update_weight_rest, ACC), batches, BEGIN)
        if (MOVES >> 29) & 1:
            track(c, inside, applied_mean, applied_var, newest, running_mean, running_var, CENTERED)
        else:
            bessel = tl.full((1,), 1.0, ACC) * rows / tl.maximum(rows - 1, 1)
            track(c, inside, mean, var * bessel, newest, running_mean, running_var, True)
        whole = zero == 0
        if ROWS > 0:
            take0: tl.constexpr = (MOVES >> 3) & 7
            new, gate = taken(mean, var, applied_mean, applied_var, take0)
            whole = move_row(row0, old0, weight0, now0, c, inside, whole, new, gate)
        if ROWS > 1:
            take1: tl.constexpr = (MOVES >> 6) & 7
            new, gate = taken(mean, var, applied_mean, applied_var, take1)
            whole = move_row(row1, old1, weight1, now0, c, inside, whole, new, gate)
        if ROWS > 2:
            take2: tl.constexpr = (MOVES >> 9) & 7
            new, gate = taken(mean, var, applied_mean, applied_var, take2)
            whole = move_row(row2, old2, weight2, now0, c, inside, whole, new, gate)
        if ROWS > 3:
            take3: tl.constexpr = (MOVES >> 12) & 7
            new, gate = taken(mean, var, applied_mean, applied_var, take3)
            whole = move_row(row3, old3, weight3, now0, c, inside, whole, new, gate)
        if WINDOWS > 0:
            new, gate = taken(mean, var, applied_mean, applied_var, (MOVES >> 17) & 7)
            push(window0, table0, new, c, inside & finite(gate), channels, length0, BLOCK_W)
        if WINDOWS > 1:
            new, gate = taken(mean, var, applied_mean, applied_var, (MOVES >> 20) & 7)
            push(window1, table1, new, c, inside & finite(gate), channels, length1, BLOCK_W)
        if COUNTERS > 0 or BEGIN:
            last, bad = arrive(block_counter, tl.sum((inside & (whole == 0)).to(tl.int32), 0))
            missed = (bad > 0).to(tl.int64)
            if COUNTERS > 0:
                tl.store(counter0, tl.sum(now0, 0) - missed * ((MOVES >> 25) & 1), mask=last)
            if COUNTERS > 1:
                tl.store(counter1, tl.sum(now1, 0) - missed * ((MOVES >> 26) & 1), mask=last)
        else:
            last = tl.program_id(0) == 0
        tl.store(tracked, batches, mask=last)


@triton.jit(do_not_specialize=sources.LOOSE)
def forward_parts(
    x,
    partial,
    inner,
    outer,
    start,
    small,
    large,
    groups,
    tiles,
    parts,
    CENTERED: tl.constexpr,
    ACC: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and squared deviations of a part of a group, so many tiles."""
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    c, inside, place = part_channels(channels, BLOCK_C)
    _, begin, end, own_tiles = part_rows(
        place, parts, tiles, start, small, large, length, BLOCK_M, LONG
    )
    mean, square = row_moments(
        x, c, inside, begin, end, own_tiles, channels, length, LAST, CENTERED, BLOCK_M, BLOCK_C, ACC
    )
    put(partial, 0, place, groups * parts, c, channels, mean, inside)
    put(partial, 1, place, groups * parts, c, channels, square, inside)


@triton.jit(do_not_specialize=sources.LOOSE)
def forward_write(
    x,
    y,
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
    """Write y = (x - mean) * scale + shift, what was read last first: it may still be in cache."""
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    c, inside, place = part_channels(channels, BLOCK_C)
    place = groups * parts - 1 - place
    g, begin, end, own_tiles = part_rows(
        place, parts, tiles, start, small, large, length, BLOCK_M, LONG
    )
    mean = get(on, 0, g, groups, c, channels, inside)[None, :]
    scale = get(on, 1, g, groups, c, channels, inside)[None, :]
    shift = get(on, 2, g, groups, c, channels, inside)[None, :]
    row = tl.arange(0, BLOCK_M)[:, None]
    for i in range(own_tiles):
        m = begin + i * BLOCK_M + row
        valid = (m < end) & inside[None, :]
        at = places(m, c[None, :], channels, length, LAST)
        value = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_first")
        out = (value.to(mean.dtype) - mean) * scale + shift
        tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=sources.LOOSE)
def forward_track(
    own,
    running_mean,
    running_var,
    tracked,
    block_counter,
    inner,
    outer,
    small,
    large,
    group,
    all_groups,
    weighing,
    total,
    update_weight,
    update_weight_rest,
    BEGIN: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Move running statistics towards those of `weighing` groups, of `total` examples together."""
    ACC: tl.constexpr = own.dtype.element_ty
    channels, length = sides(inner, outer, LAST, ALIGN, False)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    mean = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    var = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for first in range(0, weighing, BLOCK_M):
        g = first + tl.arange(0, BLOCK_M)[:, None]
        there = (g < weighing) & inside[None, :]
        size = small + (g < large).to(tl.int32)
        share = size.to(ACC) / total
        count = size.to(ACC) * length
        bessel = count / tl.maximum(count - 1, 1.0)
        at = own + (group + g) * channels + c[None, :]
        mean += share * tl.load(at, mask=there, other=0.0)
        var += share * bessel * tl.load(at + all_groups * channels, mask=there, other=0.0)
    batches = tl.load(tracked) + 1
    newest = newest_weight(number(update_weight, update_weight_rest, ACC), batches, BEGIN)
    track(c, inside, tl.sum(mean, 0), tl.sum(var, 0), newest, running_mean, running_var, True)
    if BEGIN:
        last, _ = arrive(block_counter, tl.program_id(0) * 0)
    else:
        last = tl.program_id(0) == 0
    tl.store(tracked, batches, mask=last)
