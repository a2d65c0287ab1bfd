# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The forward kernels: one launch where a group's columns are small, three elsewhere.

`forward_columns` does all for one group of examples and some columns: moments, rule, output and
memory. Elsewhere `forward_parts` takes moments of parts of a group, `forward_columns` decides on
them, and `forward_write` writes the output. Where there are several groups, `forward_track` moves
the running statistics in the end.

Tables: `used` ``(rows, groups, K)`` the statistics to normalize by; `own` ``(2, groups, C)`` the
groups' own; `on` ``(3, groups, C)`` mean, scale and shift; `partial` ``(2, groups x parts, C)``.
"""

import triton
import triton.language as tl

from anybatch.backends import kinds
from anybatch.backends.triton import constants as sources
from anybatch.backends.triton.rules import arrive, choose, factors, number, recall, remember, track
from anybatch.backends.triton.tiles import (
    combine,
    group_rows,
    part_channels,
    part_rows,
    places,
    pool,
    row_moments,
    sides,
    tile_moments,
)

_PLAIN: tl.constexpr = tl.constexpr(kinds.PLAIN)
_WINDOW: tl.constexpr = tl.constexpr(kinds.WINDOW)
_TILE: tl.constexpr = tl.constexpr(sources.TILE)
_PARTS: tl.constexpr = tl.constexpr(sources.PARTS)


@triton.jit
def pooled(mean, var, lane, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Mean and variance of the columns that channels belong to."""
    if WIDTH > 1:
        middle = pool(mean, lane, WIDTH, SPAN) / WIDTH
        var = pool(var + (mean - middle) * (mean - middle), lane, WIDTH, SPAN) / WIDTH
        mean = middle
    return mean, var


@triton.jit
def put(table, row, group, all_groups, k, columns, value, mask):
    """Write into a table ``(rows, all_groups, columns)``."""
    tl.store(table + (row * all_groups + group) * columns + k, value, mask=mask)


@triton.jit
def get(table, row, group, all_groups, k, columns, mask):
    """Read from a table ``(rows, all_groups, columns)``, 0 where there is nothing."""
    return tl.load(table + (row * all_groups + group) * columns + k, mask=mask, other=0.0)


@triton.jit
def part_moments(
    partial,
    g,
    groups,
    parts,
    held,
    rows,
    c,
    inside,
    channels,
    CENTERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and squared deviations of a group from those of its parts."""
    part = tl.arange(0, BLOCK_M)[:, None]
    number = tl.minimum(rows - part.to(tl.int64) * held, held)
    number = tl.where(part < parts, tl.maximum(number, 0), 0)
    there = (number > 0) & inside[None, :]
    at = partial + (g * parts + part) * channels + c[None, :]
    square = tl.load(at + groups * parts * channels, mask=there, other=0.0)
    if CENTERED:
        mean = tl.load(at, mask=there, other=0.0)
        mean, square = combine(number.to(ACC), mean, square, rows.to(ACC))
    else:
        square = tl.sum(square, 0)
        mean = tl.zeros_like(square)
    return mean, square


@triton.jit(do_not_specialize=sources.LOOSE)
def forward_columns(
    x,
    y,
    weight,
    bias,
    used,
    own,
    running_mean,
    running_var,
    tracked,
    old_mean,
    old_var,
    window,
    counter,
    keep,
    arrivals,
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
    window_rows,
    warmup,
    renorm_warmup,
    eps,
    eps_rest,
    pace,
    pace_rest,
    first,
    first_rest,
    second,
    second_rest,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    CUMULATIVE: tl.constexpr,
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
    channels, length = sides(inner, outer, LAST, ALIGN, LONG)
    block = tl.program_id(0) // groups
    g = tl.program_id(0) % groups
    lane = tl.arange(0, BLOCK_C)
    c = block * SPAN + lane
    inside = (lane < SPAN) & (c < channels)
    begin, rows = group_rows(g, start, small, large, length)
    row = tl.arange(0, BLOCK_M)[:, None]
    eps_ = number(eps, eps_rest, ACC)

    old_m, old_v, table, sums, filled, now, share = recall(
        c,
        inside,
        channels,
        running_mean,
        running_var,
        old_mean,
        old_var,
        window,
        counter,
        keep,
        window_rows,
        KIND,
        BLOCK_W,
        ACC,
    )
    w = tl.load(weight + c, mask=inside, other=0.0)
    b = tl.load(bias + c, mask=inside, other=0.0)
    if SOURCE == _TILE:
        valid = (row < rows) & inside[None, :]
        at = places(begin + row, c[None, :], channels, length, LAST)
        value = tl.load(x + at, mask=valid, other=0.0).to(ACC)
        mean, square = tile_moments(value, valid, rows.to(ACC), KIND != _WINDOW)
    elif SOURCE == _PARTS:
        mean, square = part_moments(
            x, g, groups, parts, held, rows, c, inside, channels, KIND != _WINDOW, BLOCK_M, ACC
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
            KIND != _WINDOW,
            BLOCK_M,
            BLOCK_C,
            ACC,
        )
    var = square / rows.to(ACC)
    if WIDTH > 1:
        put(own, 0, group + g, all_groups, c, channels, mean, inside)
        put(own, 1, group + g, all_groups, c, channels, var, inside)
    middle, spread = pooled(mean, var, lane, WIDTH, SPAN)
    middle, spread, third, fourth = choose(
        middle,
        spread,
        old_m,
        old_v,
        sums,
        filled,
        now,
        share,
        eps_,
        number(first, first_rest, ACC),
        number(second, second_rest, ACC),
        window_rows,
        warmup,
        renorm_warmup,
        KIND,
        SMOOTH,
        BLOCK_W,
    )
    scale, shift = factors(middle, spread, third, fourth, w, b, eps_, KIND)
    if SOURCE == _TILE:
        out = (value - middle[None, :]) * scale[None, :] + shift[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)
    elif SOURCE == _PARTS:
        put(y, 0, g, groups, c, channels, middle, inside)
        put(y, 1, g, groups, c, channels, scale, inside)
        put(y, 2, g, groups, c, channels, shift, inside)
    else:
        for i in range(tiles):
            m = begin + i * BLOCK_M + row
            valid = (m < begin + rows) & inside[None, :]
            at = places(m, c[None, :], channels, length, LAST)
            value = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC)
            out = (value - middle[None, :]) * scale[None, :] + shift[None, :]
            tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)
    columns = channels // WIDTH
    heads = inside & (lane % WIDTH == 0)
    put(used, 0, group + g, all_groups, c // WIDTH, columns, middle, heads)
    put(used, 1, group + g, all_groups, c // WIDTH, columns, spread, heads)
    if KIND != _PLAIN:
        put(used, 2, group + g, all_groups, c // WIDTH, columns, third, heads)
        put(used, 3, group + g, all_groups, c // WIDTH, columns, fourth, heads)
    if UPDATE:
        remember(
            c,
            inside,
            channels,
            mean,
            var,
            rows,
            middle,
            spread,
            table,
            now,
            number(pace, pace_rest, ACC),
            running_mean,
            running_var,
            tracked,
            old_mean,
            old_var,
            window,
            counter,
            arrivals,
            window_rows,
            KIND,
            CUMULATIVE,
            BLOCK_W,
        )


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
    KIND: tl.constexpr,
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
        x,
        c,
        inside,
        begin,
        end,
        own_tiles,
        channels,
        length,
        LAST,
        KIND != _WINDOW,
        BLOCK_M,
        BLOCK_C,
        ACC,
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
    arrivals,
    inner,
    outer,
    small,
    large,
    group,
    all_groups,
    weighing,
    total,
    pace,
    pace_rest,
    CUMULATIVE: tl.constexpr,
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
    pace_ = number(pace, pace_rest, ACC)
    batches = tl.load(tracked) + 1
    if CUMULATIVE:
        pace_ = 1 / (pace_ * 0 + batches)
    track(c, inside, tl.sum(mean, 0), tl.sum(var, 0), pace_, running_mean, running_var, True)
    if CUMULATIVE:
        last, _ = arrive(arrivals, tl.program_id(0) * 0)
    else:
        last = tl.program_id(0) == 0
    tl.store(tracked, batches, mask=last)
