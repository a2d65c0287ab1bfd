# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled passes over an activation.

In *planes*, arrays are ``(N, C, L)`` and a pass is over one channel, so that a channel is read,
decided on and written while it is in cache. In *rows*, arrays are flat and a pass is over all
channels: sums are kept for each place of a row, a few positions of all channels side by side.

Sums are float64. Rows add up a few values in the input's type first, parts of planes of 16 bits in
float32: this spares conversions.
"""

import numpy as np

from anybatch.backends.numba.compile import inlined
from anybatch.backends.numba.low_precision import number
from anybatch.backends.numba.streaming_stores import (
    lanes,
    leaves,
    put_affine,
    put_gradient,
    settle_stores,
)


@inlined
def settle(total, squares, count, shift, centered):
    """Mean and biased variance from the sums of x - shift and its square; or 0 and mean square."""
    if not centered:
        return 0.0, squares / count
    offset = total / count
    var = squares / count - offset * offset
    return shift + offset, 0.0 if var < 0 else var


# --- planes -----------------------------------------------------------------

CHUNK = 512  # values of a plane per partial sum, which is in the type of arithmetic


@inlined
def _first_mean(x, i, c):
    """The mean of the first values of a plane, in the type of arithmetic.

    Partial sums lose digits where what is subtracted is far from the other values, as one value may
    be and a mean of several is not.
    """
    total, many = number(0.0, x), min(CHUNK, x.shape[2])
    for k in range(many):
        total += x[i, c, k]
    return number(np.float64(total) / many, x)


@inlined
def plane_moments(x, c, first, last, centered):
    """Mean and biased variance of a channel in some examples, or 0 and its mean square.

    In one pass, of differences from a value near the mean. Four planes at a time: more streams for
    the processor to fetch ahead of.
    """
    total, squares, length = 0.0, 0.0, x.shape[2]
    away = _first_mean(x, first, c) if centered else number(0.0, x)
    fours = first + (last - first) // 4 * 4
    for i in range(first, fours, 4):
        for begin in range(0, length, CHUNK):
            one = two = number(0.0, x)
            for k in range(min(CHUNK, length - begin)):
                at = np.uintp(begin + k)  # unsigned: no check for negative indices
                p, q = x[i, c, at] - away, x[i + 1, c, at] - away
                r, s = x[i + 2, c, at] - away, x[i + 3, c, at] - away
                one += (p + q) + (r + s)
                two += (p * p + q * q) + (r * r + s * s)
            total += one
            squares += two
    for i in range(fours, last):
        for begin in range(0, length, CHUNK):
            one = two = number(0.0, x)
            for k in range(min(CHUNK, length - begin)):
                p = x[i, c, np.uintp(begin + k)] - away
                one += p
                two += p * p
            total += one
            squares += two
    return settle(total, squares, (last - first) * length, np.float64(away), centered)


@inlined
def plane_write(x, y, c, first, last, mean, scale, shift):
    """Write y = (x - mean) * scale + shift."""
    mean, scale, shift = number(mean, x), number(scale, x), number(shift, x)
    if leaves(y, y.shape[2]):
        for i in range(first, last):
            row, out = x[i, c], y[i, c]
            for k in range(0, x.shape[2], lanes(y)):
                put_affine(out, row, k, mean, scale, shift, k)
        settle_stores()
        return
    for i in range(first, last):
        for k in range(x.shape[2]):
            y[i, c, k] = (x[i, c, k] - mean) * scale + shift


@inlined
def plane_sums(dy, x, c, first, last, center):
    """Return sum(dy) and sum(dy * (x - center)); two planes of each at a time."""
    total, product, length, away = 0.0, 0.0, x.shape[2], number(center, x)
    pairs = first + (last - first) // 2 * 2
    for i in range(first, pairs, 2):
        for begin in range(0, length, CHUNK):
            one = two = number(0.0, x)
            for k in range(min(CHUNK, length - begin)):
                at = np.uintp(begin + k)
                a, b = number(dy[i, c, at], x), number(dy[i + 1, c, at], x)
                one += a + b
                two += a * (x[i, c, at] - away) + b * (x[i + 1, c, at] - away)
            total += one
            product += two
    for i in range(pairs, last):
        for begin in range(0, length, CHUNK):
            one = two = number(0.0, x)
            for k in range(min(CHUNK, length - begin)):
                at = np.uintp(begin + k)
                a = number(dy[i, c, at], x)
                one += a
                two += a * (x[i, c, at] - away)
            total += one
            product += two
    return total, product + (np.float64(away) - center) * total


@inlined
def plane_gradient(dy, x, dx, c, first, last, center, on_dy, on_x, constant):
    """Write dx = on_dy * dy + on_x * (x - center) + constant."""
    center, constant = number(center, x), number(constant, x)
    on_dy, on_x = number(on_dy, x), number(on_x, x)
    if leaves(dx, dx.shape[2]):
        for i in range(first, last):
            above, row, out = dy[i, c], x[i, c], dx[i, c]
            for k in range(0, x.shape[2], lanes(dx)):
                put_gradient(out, above, row, k, center, on_dy, on_x, constant, k)
        settle_stores()
        return
    for i in range(first, last):
        for k in range(x.shape[2]):
            dx[i, c, k] = on_dy * dy[i, c, k] + on_x * (x[i, c, k] - center) + constant


# --- rows -------------------------------------------------------------------
#
# A pass reads from two or four distant places at once: each is a stream that the processor
# fetches ahead of, and what stands for a place of a row is loaded once for all of them. A pass
# that writes goes from the end back, block by block: the sums before it have left the end in
# cache. Within a block it goes forward, as the processor expects.

_SHORT = 32  # values of a channel side by side, below which vector registers stay half empty
_FEW = 8  # examples, below which making rows costs more than they save
_ROW = 256  # values of a row, about
_BLOCK = 64  # rows, 64 KiB or so
NEAR = 64  # positions of many, whose mean is near that of all


@inlined
def in_rows(x, last):
    """Whether a batch is taken in rows: where short planes and enough of them make one."""
    return last or (x.shape[2] < _SHORT and x.shape[0] >= _FEW)


@inlined
def row_layout(x, last, starts):
    """Length of a row, values of a channel side by side in it, and values of an example."""
    channels, length = (x.shape[2], x.shape[1]) if last else (x.shape[1], x.shape[2])
    inner = 1 if last else length
    unit, example = channels * inner, channels * length
    smallest = (starts[-1] - starts[-2]) * example  # of all groups, the last one
    return unit * max(1, min(_ROW, smallest) // unit), inner, example


@inlined
def write_shifts(x, valid, first, last, shift):
    """Write what moments subtract: the mean of a channel's first values, of those that are valid.

    One value may be far from all others, and their differences from it then lose digits.
    """
    _, channels, inner = shift.shape
    stride, many = 1, inner
    if inner == 1:
        stride, many = channels, max(1, min(NEAR, (last - first) // channels // 8))
    for c in range(channels):
        total, seen = 0.0, 0
        for j in range(many):
            if valid.shape[0] == 0 or valid[first // channels + j]:
                total += number(x[first + c * inner + j * stride], x)
                seen += 1
        shift[:, c] = total / seen


@inlined
def channel_sums(sums, shape):
    """Sums over parts and over the places of a channel in a row."""
    repeats, channels, inner = shape
    kinds = sums.shape[1]
    places, total = sums.reshape(-1, kinds, repeats, channels, inner), np.zeros((kinds, channels))
    for part in range(places.shape[0]):
        for kind in range(kinds):
            for repeat in range(repeats):
                for c in range(channels):
                    for k in range(inner):
                        total[kind, c] += places[part, kind, repeat, c, k]
    return total


@inlined
def stretch(part, parts, first, last, period, streams):
    """Where a part begins and ends, in whole rows, and how long each of its streams is."""
    rows = -(-(last - first) // period)
    begin = first + period * (rows * part // parts)
    end = min(last, first + period * (rows * (part + 1) // parts))
    return begin, end, (end - begin) // streams // period * period


@inlined
def blocks(values, period):
    """How many blocks there are in so many values."""
    return -(-values // (_BLOCK * period))


@inlined
def block_of(block, period, begin, end):
    """Where a block begins and ends."""
    start = begin + block * _BLOCK * period
    return start, min(start + _BLOCK * period, end)


@inlined
def row_moments(part, parts, x, first, last, shift, sums):
    """Add up x - shift and its square for each place of a row."""
    period = shift.shape[0]
    begin, end, length = stretch(part, parts, first, last, period, 4)
    totals, squares = sums[part, 0], sums[part, 1]
    second, third, fourth = begin + length, begin + 2 * length, begin + 3 * length
    for at in range(0, length, period):
        one, two = x[begin + at : begin + at + period], x[second + at : second + at + period]
        three, four = x[third + at : third + at + period], x[fourth + at : fourth + at + period]
        for j in range(period):
            away = shift[j]
            a, b, c, d = one[j] - away, two[j] - away, three[j] - away, four[j] - away
            totals[j] += (a + b) + (c + d)
            squares[j] += (a * a + b * b) + (c * c + d * d)
    for at in range(begin + 4 * length, end, period):
        row = x[at : min(at + period, end)]
        for j in range(row.shape[0]):
            offset = np.float64(row[j] - shift[j])
            totals[j] += offset
            squares[j] += offset * offset


@inlined
def row_write(part, parts, x, y, first, last, table):
    """Write y = (x - mean) * scale + shift."""
    means, scales, shifts = table[0], table[1], table[2]
    period = means.shape[0]
    begin, end, length = stretch(part, parts, first, last, period, 2)
    past = leaves(y, period) and leaves(y, begin)
    for block in range(blocks(length, period) - 1, -1, -1):
        start, stop = block_of(block, period, begin, begin + length)
        for at in range(start, stop, period):
            far = at + length
            if past:
                for j in range(0, period, lanes(y)):
                    put_affine(y, x, at + j, means, scales, shifts, j)
                    put_affine(y, x, far + j, means, scales, shifts, j)
                continue
            one, two = x[at : at + period], x[far : far + period]
            out, out_two = y[at : at + period], y[far : far + period]
            for j in range(period):
                mean, scale, shift = means[j], scales[j], shifts[j]
                out[j] = (one[j] - mean) * scale + shift
                out_two[j] = (two[j] - mean) * scale + shift
    for at in range(begin + 2 * length, end, period):
        row, out = x[at : min(at + period, end)], y[at : min(at + period, end)]
        for j in range(row.shape[0]):
            out[j] = (row[j] - means[j]) * scales[j] + shifts[j]
    if past:
        settle_stores()


@inlined
def row_sums(part, parts, dy, x, first, last, center, sums):
    """Add up dy and dy * (x - center) for each place of a row."""
    period = center.shape[0]
    begin, end, length = stretch(part, parts, first, last, period, 2)
    totals, products = sums[part, 0], sums[part, 1]
    for at in range(begin, begin + length, period):
        far = at + length
        one, two = x[at : at + period], x[far : far + period]
        above, above_two = dy[at : at + period], dy[far : far + period]
        for j in range(period):
            a, b, middle = above[j], above_two[j], center[j]
            totals[j] += a + b
            products[j] += a * (one[j] - middle) + b * (two[j] - middle)
    for at in range(begin + 2 * length, end, period):
        above, row = dy[at : min(at + period, end)], x[at : min(at + period, end)]
        for j in range(row.shape[0]):
            totals[j] += above[j]
            products[j] += above[j] * (row[j] - center[j])


@inlined
def row_gradient(part, parts, dy, x, dx, first, last, center, table):
    """Write dx = on_dy * dy + on_x * (x - center) + constant."""
    on_dy, on_x, constant = table[0], table[1], table[2]
    period = center.shape[0]
    begin, end, _ = stretch(part, parts, first, last, period, 1)
    past = leaves(dx, period) and leaves(dx, begin)
    for block in range(blocks(end - begin, period) - 1, -1, -1):
        start, to = block_of(block, period, begin, end)
        for at in range(start, to, period):
            stop = min(at + period, end)
            if past and stop - at == period:
                for j in range(0, period, lanes(dx)):
                    put_gradient(dx, dy, x, at + j, center, on_dy, on_x, constant, j)
                continue
            above, row, out = dy[at:stop], x[at:stop], dx[at:stop]
            for j in range(row.shape[0]):
                out[j] = on_dy[j] * above[j] + on_x[j] * (row[j] - center[j]) + constant[j]
    if past:
        settle_stores()
