# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Where the values of a program lie, and sums over them.

An activation is rows of channels: row m is a position of an example, and a group of examples is a
range of rows, whichever way it lies in memory. A program takes some tiles of ``(BLOCK_M, BLOCK_C)``
values. What a lane adds up and how lanes are added up is fixed: results are the same to the bit.
"""

import triton
import triton.language as tl


@triton.jit
def sides(inner, outer, LAST: tl.constexpr, ALIGN: tl.constexpr, LONG: tl.constexpr):
    """Channels and positions of an example; `inner` is the one that is side by side in memory.

    Divided by ALIGN, a power of two, so that the compiler sees what it is divisible by and reads
    several values at a time. LONG counts in 64 bits.
    """
    side = inner * ALIGN
    if LONG:
        side = side.to(tl.int64)
        outer = outer.to(tl.int64)
    if LAST:
        channels = side
        length = outer
    else:
        channels = outer
        length = side
    return channels, length


@triton.jit
def group_rows(g, start, small, large, length):
    """First row and number of rows of a group: the first `large` have an example more."""
    first = start + g * small + tl.minimum(g, large)
    size = small + (g < large).to(tl.int32)
    return first * length, size * length


@triton.jit
def part_channels(channels, BLOCK_C: tl.constexpr):
    """Channels of a program over parts, which of them there are, and the number of its part."""
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < channels, tl.program_id(0) // blocks


@triton.jit
def part_rows(
    place, parts, tiles, start, small, large, length, BLOCK_M: tl.constexpr, LONG: tl.constexpr
):
    """Group, first row, end of the group's rows, and tiles of a part of a group."""
    if LONG:
        place = place.to(tl.int64)
    g = place // parts
    first, rows = group_rows(g, start, small, large, length)
    skipped = (place % parts) * tiles * BLOCK_M
    left = (tl.maximum(rows - skipped, 0) + BLOCK_M - 1) // BLOCK_M
    return g, first + skipped, first + rows, tl.minimum(tiles, left)


@triton.jit
def places(m, c, channels, length, LAST: tl.constexpr):
    """Offsets of rows ``(BLOCK_M, 1)`` and channels ``(1, BLOCK_C)``."""
    if LAST:
        at = m * channels + c
    else:
        at = ((m // length) * channels + c) * length + m % length
    return at


@triton.jit
def combine(number, mean, square, total):
    """Mean and squared deviations of all rows from those of parts, `number` values each.

    The middle is taken in two steps: what rounding leaves in the first, the second takes out.
    """
    middle = tl.sum(number * mean, 0) / total
    away = tl.where(number > 0, mean - middle[None, :], 0.0)
    shift = tl.sum(number * away, 0) / total
    deviations = tl.sum(square + number * away * away, 0) - total * shift * shift
    return middle + shift, tl.where(deviations < 0, 0.0, deviations)


@triton.jit
def tile_moments(value, valid, total, CENTERED: tl.constexpr):
    """Mean and squared deviations of one tile, or zeros and squares."""
    if CENTERED:
        number = valid.to(value.dtype)
        mean, square = combine(number, value, tl.zeros_like(value), total)
    else:
        square = tl.sum(value * value, 0)
        mean = tl.zeros_like(square)
    return mean, square


@triton.jit
def row_moments(
    x,
    c,
    inside,
    begin,
    end,
    tiles,
    channels,
    length,
    LAST: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and squared deviations of rows from `begin`, before `end`, in so many tiles.

    Each lane keeps a mean and squared deviations of its own (Welford): no large numbers are
    subtracted, whatever the mean.
    """
    row = tl.arange(0, BLOCK_M)[:, None]
    mean = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    square = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    one = tl.full((1, 1), 1.0, ACC)
    for i in range(tiles):
        m = begin + i * BLOCK_M + row
        valid = (m < end) & inside[None, :]
        at = places(m, c[None, :], channels, length, LAST)
        value = tl.load(x + at, mask=valid, other=0.0).to(ACC)
        if CENTERED:
            away = tl.where(valid, value - mean, 0.0)
            mean += away * (one / (i + 1))
            square += away * tl.where(valid, value - mean, 0.0)
        else:
            square += value * value
    if CENTERED:
        total = tl.minimum(end - begin, tiles * BLOCK_M)
        number = tl.minimum((end - begin - row + BLOCK_M - 1) // BLOCK_M, tiles)
        number = tl.maximum(number, 0).to(ACC)
        middle, deviations = combine(number, mean, square, tl.maximum(total, 1).to(ACC))
    else:
        deviations = tl.sum(square, 0)
        middle = tl.zeros_like(deviations)
    return middle, deviations


@triton.jit
def row_sums(
    dy,
    x,
    c,
    inside,
    center,
    begin,
    end,
    tiles,
    channels,
    length,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return sum(dy) and sum(dy * (x - center)) of rows as in `row_moments`."""
    row = tl.arange(0, BLOCK_M)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    product = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for i in range(tiles):
        m = begin + i * BLOCK_M + row
        valid = (m < end) & inside[None, :]
        at = places(m, c[None, :], channels, length, LAST)
        above = tl.load(dy + at, mask=valid, other=0.0).to(ACC)
        value = tl.load(x + at, mask=valid, other=0.0).to(ACC)
        total += above
        product += above * tl.where(valid, value - center[None, :], 0.0)
    return tl.sum(total, 0), tl.sum(product, 0)


@triton.jit
def pool(value, lane, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Sum over the channels of each column, for each of them."""
    if WIDTH > 1:
        if WIDTH == SPAN:
            value = tl.sum(tl.where(lane < SPAN, value, 0.0), 0) + tl.zeros_like(value)
        else:
            same = (lane[:, None] // WIDTH) == (lane[None, :] // WIDTH)
            value = tl.sum(tl.where(same, value[None, :], 0.0), 1)
    return value


@triton.jit
def pooled(mean, var, lane, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Mean and variance of the columns that channels belong to."""
    if WIDTH > 1:
        middle = pool(mean, lane, WIDTH, SPAN) / WIDTH
        var = pool(var + (mean - middle) * (mean - middle), lane, WIDTH, SPAN) / WIDTH
        mean = middle
    return mean, var


@triton.jit
def put(table, row, group, all_groups, k, num_statistics, value, mask):
    """Write into a table ``(rows, all_groups, columns)``."""
    tl.store(table + (row * all_groups + group) * num_statistics + k, value, mask=mask)


@triton.jit
def get(table, row, group, all_groups, k, num_statistics, mask):
    """Read from a table ``(rows, all_groups, columns)``, 0 where there is nothing."""
    return tl.load(table + (row * all_groups + group) * num_statistics + k, mask=mask, other=0.0)


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
