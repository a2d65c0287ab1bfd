# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled passes where a mask says which positions contribute to the statistics.

``valid`` is the mask, ``(N, L)``; in rows it is flat, and a row is a position of all channels. What
is not valid may be anything, also nan: it is replaced, not multiplied by zero.
"""

import numpy as np

from anybatch.backends.numba.compile import inlined
from anybatch.backends.numba.low_precision import number
from anybatch.backends.numba.passes import CHUNK, block_of, blocks, settle, stretch
from anybatch.backends.numba.streaming_stores import (
    lanes,
    leaves,
    put_affine,
    put_gradient,
    settle_stores,
)


@inlined
def first_valid(valid, first, last):
    """The first valid position of some examples, counted from the start; there is one."""
    flat, at = valid.reshape(-1), first * valid.shape[1]
    while at < last * valid.shape[1] - 1 and not flat[at]:
        at += 1
    return at


@inlined
def plane_valid_moments(x, valid, c, first, last, start, count, centered):
    """Mean and biased variance of a channel's valid values, see `plane_moments`."""
    length, zero, away = x.shape[2], number(0.0, x), number(0.0, x)
    if centered:  # the mean of some values, as there
        example, place, many = start // length, start % length, 0
        for k in range(place, min(place + CHUNK, length)):
            away += x[example, c, k] if valid[example, k] else zero
            many += valid[example, k]
        away = number(np.float64(away) / many, x)
    total = squares = 0.0
    for i in range(first, last):
        for begin in range(0, length, CHUNK):
            one = two = zero
            for k in range(min(CHUNK, length - begin)):
                at = np.uintp(begin + k)
                offset = x[i, c, at] - away
                offset = offset if valid[i, at] else zero
                one += offset
                two += offset * offset
            total += one
            squares += two
    return settle(total, squares, count, np.float64(away), centered)


@inlined
def row_valid_moments(part, parts, x, valid, first, last, shift, sums):
    """Add up x - shift and its square over the valid positions, for each channel."""
    channels, zero = shift.shape[0], number(0.0, x)
    begin, end, length = stretch(part, parts, first, last, channels, 4)
    totals, squares = sums[part, 0], sums[part, 1]
    second, third, fourth = begin + length, begin + 2 * length, begin + 3 * length
    for at in range(0, length, channels):
        one, two = x[begin + at : begin + at + channels], x[second + at : second + at + channels]
        three, four = x[third + at : third + at + channels], x[fourth + at : fourth + at + channels]
        is_one, is_two = valid[(begin + at) // channels], valid[(second + at) // channels]
        is_three, is_four = valid[(third + at) // channels], valid[(fourth + at) // channels]
        for j in range(channels):
            away = shift[j]
            a, b, c, d = one[j] - away, two[j] - away, three[j] - away, four[j] - away
            a, b = a if is_one else zero, b if is_two else zero
            c, d = c if is_three else zero, d if is_four else zero
            totals[j] += (a + b) + (c + d)
            squares[j] += (a * a + b * b) + (c * c + d * d)
    for at in range(begin + 4 * length, end, channels):
        if valid[at // channels]:
            row = x[at : at + channels]
            for j in range(channels):
                a = row[j] - shift[j]
                totals[j] += a
                squares[j] += a * a


@inlined
def plane_valid_gradient(dy, x, valid, dx, c, first, last, center, on_dy, on_x, constant, through):
    """Write dx = on_dy * dy, and on_x * (x - center) + constant more where a position is valid.

    `through` has room for what is added in a plane.
    """
    center, constant, zero = number(center, x), number(constant, x), number(0.0, x)
    on_dy, on_x, one = number(on_dy, x), number(on_x, x), number(1.0, x)
    past = leaves(dx, dx.shape[2])
    for i in range(first, last):
        above, row, out = dy[i, c], x[i, c], dx[i, c]
        for k in range(x.shape[2]):
            more = on_x * (row[k] - center) + constant
            through[k] = more if valid[i, k] else zero
        if past:
            for k in range(0, x.shape[2], lanes(dx)):
                put_gradient(out, above, through, k, zero, on_dy, one, zero, k)
        else:
            for k in range(x.shape[2]):
                out[k] = on_dy * above[k] + through[k]
    if past:
        settle_stores()


@inlined
def row_valid_gradient(part, parts, dy, x, valid, dx, first, last, center, table):
    """Write the same, of all channels; `center` and `table` have a number for each."""
    on_dy, on_x, constant, zero = table[0], table[1], table[2], number(0.0, x)
    channels = center.shape[0]
    begin, end, _ = stretch(part, parts, first, last, channels, 1)
    past = leaves(dx, channels) and leaves(dx, begin)
    for block in range(blocks(end - begin, channels) - 1, -1, -1):
        start, to = block_of(block, channels, begin, end)
        for at in range(start, to, channels):
            is_valid = valid[at // channels]
            if past:
                for j in range(0, channels, lanes(dx)):
                    if is_valid:
                        put_gradient(dx, dy, x, at + j, center, on_dy, on_x, constant, j)
                    else:
                        put_affine(dx, dy, at + j, zero, on_dy, zero, j)
                continue
            above, row = dy[at : at + channels], x[at : at + channels]
            out = dx[at : at + channels]
            for j in range(channels):
                more = on_x[j] * (row[j] - center[j]) + constant[j]
                out[j] = on_dy[j] * above[j] + (more if is_valid else zero)
    if past:
        settle_stores()
