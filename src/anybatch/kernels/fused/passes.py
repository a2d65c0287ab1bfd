# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled passes over an activation.

In *planes*, arrays are ``(N, C, L)`` and a pass is over one channel, so that a channel is read,
decided on and written while it is in cache. In *rows*, arrays are flat and a pass is over all
channels: sums are kept for each place of a row, a few positions of all channels side by side.

Sums are float64; rows add up four values in the input's type first, which halves their time.
"""

import numpy as np
from numba import njit

# Arrays are taken out of tuples before the loops: doing so counts references.
# Sums may be reordered, so that they run in vector registers; nan and inf keep their meaning.
jit = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@jit
def settle(total, squares, count, shift, centered):
    """Mean and biased variance from the sums of x - shift and its square; or 0 and mean square."""
    if not centered:
        return 0.0, squares / count
    offset = total / count
    var = squares / count - offset * offset
    return shift + offset, 0.0 if var < 0 else var


# --- planes -----------------------------------------------------------------


@jit
def plane_moments(x, c, first, last, centered):
    """Mean and biased variance of a channel in some examples, or 0 and its mean square.

    In one pass: with a value of the channel subtracted, float64 loses nothing by it.
    """
    shift = np.float64(x[first, c, 0]) if centered else 0.0
    total = squares = 0.0
    for i in range(first, last):
        row = x[i, c]
        for k in range(row.shape[0]):
            offset = row[k] - shift
            total += offset
            squares += offset * offset
    return settle(total, squares, (last - first) * x.shape[2], shift, centered)


@jit
def plane_write(x, y, c, first, last, mean, scale, shift):
    """Write y = (x - mean) * scale + shift."""
    dtype = x.dtype.type
    mean, scale, shift = dtype(mean), dtype(scale), dtype(shift)
    for i in range(first, last):
        row, out = x[i, c], y[i, c]
        for k in range(row.shape[0]):
            out[k] = (row[k] - mean) * scale + shift


@jit
def plane_sums(dy, x, c, first, last, center):
    """Return sum(dy) and sum(dy * (x - center))."""
    total = product = 0.0
    for i in range(first, last):
        above, row = dy[i, c], x[i, c]
        for k in range(row.shape[0]):
            total += above[k]
            product += above[k] * (row[k] - center)
    return total, product


@jit
def plane_gradient(dy, x, dx, c, first, last, center, on_dy, on_x, constant):
    """Write dx = on_dy * dy + on_x * (x - center) + constant."""
    dtype = x.dtype.type
    center, on_dy, on_x, constant = dtype(center), dtype(on_dy), dtype(on_x), dtype(constant)
    for i in range(first, last):
        above, row, out = dy[i, c], x[i, c], dx[i, c]
        for k in range(row.shape[0]):
            out[k] = on_dy * above[k] + on_x * (row[k] - center) + constant


# --- rows -------------------------------------------------------------------


@jit
def row_range(part, parts, first, last, period):
    """Where a part of a stretch begins and ends, in whole rows."""
    rows = -(-(last - first) // period)
    return (
        first + period * (rows * part // parts),
        min(last, first + period * (rows * (part + 1) // parts)),
    )


@jit
def _rows(x, at, period):
    """Four rows: indices into one array of all four would keep loops out of vector registers."""
    middle = at + 2 * period
    return (
        x[at : at + period],
        x[at + period : middle],
        x[middle : middle + period],
        x[middle + period : middle + 2 * period],
    )


@jit
def row_moments(part, parts, x, first, last, shift, sums):
    """Add up x - shift and its square for each place of a row."""
    period = shift.shape[0]
    at, end = row_range(part, parts, first, last, period)
    totals, squares = sums[part, 0], sums[part, 1]
    while at + 4 * period <= end:
        one, two, three, four = _rows(x, at, period)
        for j in range(period):
            away = shift[j]
            a, b, c, d = one[j] - away, two[j] - away, three[j] - away, four[j] - away
            totals[j] += (a + b) + (c + d)
            squares[j] += (a * a + b * b) + (c * c + d * d)
        at += 4 * period
    while at < end:
        row = x[at : min(at + period, end)]
        for j in range(row.shape[0]):
            offset = np.float64(row[j] - shift[j])
            totals[j] += offset
            squares[j] += offset * offset
        at += period


@jit
def row_write(part, parts, x, y, first, last, table):
    """Write y = (x - mean) * scale + shift, from the end, which is still in cache."""
    means, scales, shifts = table[0], table[1], table[2]
    period = means.shape[0]
    begin, end = row_range(part, parts, first, last, period)
    for at in range(begin + (end - begin - 1) // period * period, begin - 1, -period):
        row, out = x[at : min(at + period, end)], y[at : min(at + period, end)]
        for j in range(row.shape[0]):
            out[j] = (row[j] - means[j]) * scales[j] + shifts[j]


@jit
def row_sums(part, parts, dy, x, first, last, center, sums):
    """Add up dy and dy * (x - center) for each place of a row."""
    period = center.shape[0]
    at, end = row_range(part, parts, first, last, period)
    totals, products = sums[part, 0], sums[part, 1]
    while at + 4 * period <= end:
        one, two, three, four = _rows(x, at, period)
        first_dy, second_dy, third_dy, fourth_dy = _rows(dy, at, period)
        for j in range(period):
            middle = center[j]
            a, b, c, d = first_dy[j], second_dy[j], third_dy[j], fourth_dy[j]
            totals[j] += (a + b) + (c + d)
            a, b = a * (one[j] - middle), b * (two[j] - middle)
            c, d = c * (three[j] - middle), d * (four[j] - middle)
            products[j] += (a + b) + (c + d)
        at += 4 * period
    while at < end:
        above, row = dy[at : min(at + period, end)], x[at : min(at + period, end)]
        for j in range(row.shape[0]):
            totals[j] += above[j]
            products[j] += above[j] * (row[j] - center[j])
        at += period


@jit
def row_gradient(part, parts, dy, x, dx, first, last, center, table):
    """Write dx = on_dy * dy + on_x * (x - center) + constant, from the end."""
    on_dy, on_x, constant = table[0], table[1], table[2]
    period = center.shape[0]
    begin, end = row_range(part, parts, first, last, period)
    for at in range(begin + (end - begin - 1) // period * period, begin - 1, -period):
        stop = min(at + period, end)
        above, row, out = dy[at:stop], x[at:stop], dx[at:stop]
        for j in range(row.shape[0]):
            out[j] = on_dy[j] * above[j] + on_x[j] * (row[j] - center[j]) + constant[j]
