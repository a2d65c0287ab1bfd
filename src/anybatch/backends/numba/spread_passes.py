# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Passes over planes and rows of norms by other spreads; see `anybatch.backends.numba.spread`."""

import numpy as np

from anybatch.backends.numba.compile import inlined
from anybatch.backends.numba.low_precision import number
from anybatch.backends.numba.passes import block_of, blocks, stretch
from anybatch.backends.numba.streaming_stores import lanes, leaves, put_gradient, settle_stores


@inlined
def _less(a, b):
    """The smaller of two values, the second where they have no order."""
    return a if a < b else b


@inlined
def _more(a, b):
    """The larger of two values, the second where they have no order."""
    return a if a > b else b


# --- planes -----------------------------------------------------------------


@inlined
def plane_deviation(x, c, mean):
    """Sum of abs(x - mean) of a channel."""
    mean, total = number(mean, x), 0.0
    for i in range(x.shape[0]):
        for k in range(x.shape[2]):
            total += abs(x[i, c, k] - mean)
    return total


@inlined
def plane_total(x, c, shift):
    """Sum of x - shift of a channel."""
    total = 0.0
    for i in range(x.shape[0]):
        for k in range(x.shape[2]):
            total += x[i, c, k] - shift
    return total


@inlined
def plane_ends(x, c, lows, highs):
    """Smallest and largest value of a channel, where all are finite.

    They are found for each of some places, side by side: in one number, vector registers would have
    to know an order of nan. Four values at a time come to a place.
    """
    lows[:], highs[:], places = np.inf, -np.inf, lows.shape[0]
    for i in range(x.shape[0]):
        plane, length = x[i, c], x.shape[2]
        step = 4 * places
        for at in range(0, length // step * step, step):
            one, two = plane[at : at + places], plane[at + places : at + 2 * places]
            three = plane[at + 2 * places : at + 3 * places]
            four = plane[at + 3 * places : at + step]
            for j in range(places):
                a, b = number(one[j], x), number(two[j], x)
                third, fourth = number(three[j], x), number(four[j], x)
                lows[j] = _less(lows[j], _less(_less(a, b), _less(third, fourth)))
                highs[j] = _more(highs[j], _more(_more(a, b), _more(third, fourth)))
        for at in range(length // step * step, length, places):
            one = plane[at : min(at + places, length)]
            for j in range(one.shape[0]):
                a = number(one[j], x)
                lows[j], highs[j] = _less(lows[j], a), _more(highs[j], a)
    return lows.min(), highs.max()


@inlined
def plane_sums(dy, x, c, center, low, high):
    """Sums of dy and dy * (x - center), and how many values are at most `low`, at least `high`."""
    total = product = 0.0
    below = above = 0
    for i in range(x.shape[0]):
        for k in range(x.shape[2]):
            value = number(x[i, c, k], x)
            total += dy[i, c, k]
            product += dy[i, c, k] * (value - center)
            below += value <= low
            above += value >= high
    return total, product, below, above


@inlined
def plane_gradient(dy, x, dx, c, on_dy, constant, low, high, on_low, on_high, like):
    """Write dx = on_dy * dy + constant, and on_low, on_high more for values at or beyond them."""
    on_dy, constant, zero = number(on_dy, x), number(constant, x), number(0, x)
    on_low, on_high = number(on_low, x), number(on_high, x)
    if leaves(dx, dx.shape[2]):
        one, beyond = number(1, x), np.empty(x.shape[2], like.dtype)
        for i in range(x.shape[0]):
            above, row, out = dy[i, c], x[i, c], dx[i, c]
            for k in range(x.shape[2]):
                value = number(row[k], x)
                down, up = on_low if value <= low else zero, on_high if value >= high else zero
                beyond[k] = down + up
            for k in range(0, x.shape[2], lanes(dx)):
                put_gradient(out, above, beyond, k, zero, on_dy, one, constant, k)
        settle_stores()
        return
    for i in range(x.shape[0]):
        for k in range(x.shape[2]):
            value = number(x[i, c, k], x)
            beyond = (on_low if value <= low else zero) + (on_high if value >= high else zero)
            dx[i, c, k] = on_dy * dy[i, c, k] + constant + beyond


# --- rows -------------------------------------------------------------------


@inlined
def row_deviations(part, parts, x, first, last, center, sums):
    """Add up abs(x - center) for each place of a row."""
    period, totals = center.shape[0], sums[part, 0]
    begin, end, length = stretch(part, parts, first, last, period, 2)
    for at in range(begin, begin + length, period):
        far = at + length
        one, two = x[at : at + period], x[far : far + period]
        for j in range(period):
            totals[j] += abs(one[j] - center[j]) + abs(two[j] - center[j])
    for at in range(begin + 2 * length, end, period):
        row = x[at : min(at + period, end)]
        for j in range(row.shape[0]):
            totals[j] += abs(row[j] - center[j])


@inlined
def row_ends(part, parts, x, first, last, shift, sums, ends):
    """Add up x - shift for each place of a row, and find its smallest and largest value."""
    period, totals, lows, highs = shift.shape[0], sums[part, 0], ends[part, 0], ends[part, 1]
    begin, end, length = stretch(part, parts, first, last, period, 2)
    for at in range(begin, begin + length, period):
        far = at + length
        one, two = x[at : at + period], x[far : far + period]
        for j in range(period):
            a, b, away = number(one[j], x), number(two[j], x), shift[j]
            totals[j] += (a - away) + (b - away)
            lows[j] = _less(_less(a, b), lows[j])
            highs[j] = _more(_more(a, b), highs[j])
    for at in range(begin + 2 * length, end, period):
        row = x[at : min(at + period, end)]
        for j in range(row.shape[0]):
            totals[j] += row[j] - shift[j]
            a = number(row[j], x)
            lows[j], highs[j] = _less(a, lows[j]), _more(a, highs[j])


@inlined
def row_sums(part, parts, dy, x, first, last, table, sums, counts):
    """Sum dy and dy * (x - center) for each place of a row, count values at or beyond the ends.

    Counts have the type of the sums' factors, which holds those of a place exactly.
    """
    center, lows, highs = table[0], table[1], table[2]
    totals, products, below, above = sums[part, 0], sums[part, 1], counts[part, 0], counts[part, 1]
    period, none, one_more = center.shape[0], number(0, x), number(1, x)
    begin, end, length = stretch(part, parts, first, last, period, 2)
    for at in range(begin, begin + length, period):
        far = at + length
        one, two = x[at : at + period], x[far : far + period]
        g, g_two = dy[at : at + period], dy[far : far + period]
        for j in range(period):
            a, b, low, high = number(one[j], x), number(two[j], x), lows[j], highs[j]
            totals[j] += g[j] + g_two[j]
            products[j] += g[j] * (a - center[j]) + g_two[j] * (b - center[j])
            below[j] += (one_more if a <= low else none) + (one_more if b <= low else none)
            above[j] += (one_more if a >= high else none) + (one_more if b >= high else none)
    for at in range(begin + 2 * length, end, period):
        stop = min(at + period, end)
        g, row = dy[at:stop], x[at:stop]
        for j in range(row.shape[0]):
            a = number(row[j], x)
            totals[j] += g[j]
            products[j] += g[j] * (a - center[j])
            below[j] += one_more if a <= lows[j] else none
            above[j] += one_more if a >= highs[j] else none


@inlined
def row_gradient(part, parts, dy, x, dx, first, last, table):
    """Write dx = on_dy * dy + constant, and on_low, on_high more for values at or beyond them."""
    lows, highs, on_dy, constant = table[1], table[2], table[3], table[4]
    on_low, on_high, zero = table[5], table[6], number(0, x)
    period, unit, made = lows.shape[0], number(1, x), np.empty(lows.shape[0], lows.dtype)
    begin, end, _ = stretch(part, parts, first, last, period, 1)
    past = leaves(dx, period) and leaves(dx, begin)
    for block in range(blocks(end - begin, period) - 1, -1, -1):
        start, to = block_of(block, period, begin, end)
        for at in range(start, to, period):
            stop = min(at + period, end)
            g, row, out = dy[at:stop], x[at:stop], dx[at:stop]
            if past and stop - at == period:
                for j in range(period):
                    value, down, up = number(row[j], x), on_low[j], on_high[j]
                    down, up = down if value <= lows[j] else zero, up if value >= highs[j] else zero
                    made[j] = down + up
                for j in range(0, period, lanes(dx)):
                    put_gradient(out, g, made, j, zero, on_dy, unit, constant, j)
                continue
            for j in range(row.shape[0]):
                value, down, up = number(row[j], x), on_low[j], on_high[j]
                beyond = (down if value <= lows[j] else zero) + (up if value >= highs[j] else zero)
                out[j] = on_dy[j] * g[j] + constant[j] + beyond
    if past:
        settle_stores()
