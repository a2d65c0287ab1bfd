# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled passes where a ReLU, or an addition and a ReLU, follows the norm.

Beside `anybatch.backends.numba.passes`: ``added`` is what is added before the ReLU, an empty array
for nothing; ``g`` takes its gradient, an empty array where none is wanted. The ReLU's mask is the
sign of its output ``y``. As in torch, nan passes the ReLU, and its gradient. What a ReLU chooses
between is read first: vector registers hold no branches.
"""

import numpy as np

from anybatch.backends.numba.compile import inlined
from anybatch.backends.numba.low_precision import number
from anybatch.backends.numba.passes import CHUNK, block_of, blocks, stretch

# --- planes -----------------------------------------------------------------


@inlined
def plane_activate(x, added, y, c, first, last, mean, scale, shift):
    """Write y = relu((x - mean) * scale + shift + added)."""
    adds, zero = added.shape[0] > 0, number(0.0, x)
    mean, scale, shift = number(mean, x), number(scale, x), number(shift, x)
    for i in range(first, last):
        if adds:
            for k in range(x.shape[2]):
                value = (x[i, c, k] - mean) * scale + shift + added[i, c, k]
                y[i, c, k] = zero if value <= zero else value
        else:
            for k in range(x.shape[2]):
                value = (x[i, c, k] - mean) * scale + shift
                y[i, c, k] = zero if value <= zero else value


@inlined
def plane_masked_sums(dy, y, x, g, c, first, last, center):
    """Return sum(g) and sum(g * (x - center)), where g is dy behind the ReLU; write g.

    Two planes at a time, from three tensors each: more streams for the processor to fetch ahead of.
    """
    zero, writes, length = number(0.0, x), g.shape[0] > 0, x.shape[2]
    total, product, away = 0.0, 0.0, number(center, x)
    half = (last - first) // 2
    for i in range(first, first + half):
        far = i + half
        for begin in range(0, length, CHUNK):
            one = two = zero
            for k in range(min(CHUNK, length - begin)):
                at = np.uintp(begin + k)
                a, b = number(dy[i, c, at], x), number(dy[far, c, at], x)
                a, b = zero if y[i, c, at] <= zero else a, zero if y[far, c, at] <= zero else b
                if writes:
                    g[i, c, at], g[far, c, at] = a, b
                one += a + b
                two += a * (x[i, c, at] - away) + b * (x[far, c, at] - away)
            total += one
            product += two
    for i in range(first + 2 * half, last):
        for begin in range(0, length, CHUNK):
            one = two = zero
            for k in range(min(CHUNK, length - begin)):
                at = np.uintp(begin + k)
                a = number(dy[i, c, at], x)
                a = zero if y[i, c, at] <= zero else a
                if writes:
                    g[i, c, at] = a
                one += a
                two += a * (x[i, c, at] - away)
            total += one
            product += two
    return total, product + (np.float64(away) - center) * total


@inlined
def plane_masked_gradient(dy, y, x, dx, c, first, last, center, on_dy, on_x, constant):
    """Write dx = on_dy * g + on_x * (x - center) + constant."""
    center, constant = number(center, x), number(constant, x)
    on_dy, on_x, zero = number(on_dy, x), number(on_x, x), number(0.0, x)
    for i in range(first, last):
        for k in range(x.shape[2]):
            value = dy[i, c, k]
            value = zero if y[i, c, k] <= zero else value
            dx[i, c, k] = on_dy * value + on_x * (x[i, c, k] - center) + constant


# --- rows -------------------------------------------------------------------


@inlined
def _activate(x, y, means, scales, shifts):
    """Write y = relu((x - mean) * scale + shift), a row."""
    zero = number(0.0, x)
    for j in range(y.shape[0]):
        a = (x[j] - means[j]) * scales[j] + shifts[j]
        y[j] = zero if a <= zero else a


@inlined
def _add_and_activate(x, added, y, means, scales, shifts):
    """Write y = relu((x - mean) * scale + shift + added), a row."""
    zero = number(0.0, x)
    for j in range(y.shape[0]):
        a = (x[j] - means[j]) * scales[j] + shifts[j] + added[j]
        y[j] = zero if a <= zero else a


@inlined
def row_activate(part, parts, x, added, y, first, last, table):
    """Write y = relu((x - mean) * scale + shift + added)."""
    means, scales, shifts = table[0], table[1], table[2]
    period, adds = means.shape[0], added.shape[0] > 0
    begin, end, _ = stretch(part, parts, first, last, period, 1)
    for block in range(blocks(end - begin, period) - 1, -1, -1):
        start, to = block_of(block, period, begin, end)
        for at in range(start, to, period):
            stop = min(at + period, end)
            if adds:
                more = added[at:stop]
                _add_and_activate(x[at:stop], more, y[at:stop], means, scales, shifts)
            else:
                _activate(x[at:stop], y[at:stop], means, scales, shifts)


@inlined
def row_masked_sums(part, parts, dy, y, x, first, last, center, sums):
    """Add up g and g * (x - center) for each place of a row, where g is dy behind the ReLU."""
    period, zero = center.shape[0], number(0.0, x)
    begin, end, length = stretch(part, parts, first, last, period, 2)
    totals, products = sums[part, 0], sums[part, 1]
    for at in range(begin, begin + length, period):
        far = at + length
        one, two = x[at : at + period], x[far : far + period]
        above, above_two = dy[at : at + period], dy[far : far + period]
        out, out_two = y[at : at + period], y[far : far + period]
        for j in range(period):
            a, b, middle = above[j], above_two[j], center[j]
            a = zero if out[j] <= zero else a
            b = zero if out_two[j] <= zero else b
            totals[j] += a + b
            products[j] += a * (one[j] - middle) + b * (two[j] - middle)
    for at in range(begin + 2 * length, end, period):
        stop = min(at + period, end)
        above, row, out = dy[at:stop], x[at:stop], y[at:stop]
        for j in range(row.shape[0]):
            a = above[j]
            a = zero if out[j] <= zero else a
            totals[j] += a
            products[j] += a * (row[j] - center[j])


@inlined
def mask_gradient(dy, y, g):
    """Write what passes a ReLU backward into `g`; its mask is the sign of its output."""
    zero = number(0.0, g)
    for j in range(g.shape[0]):
        a = dy[j]
        g[j] = zero if y[j] <= zero else a


@inlined
def row_kept_sums(part, parts, dy, y, x, g, first, last, center, sums):
    """`row_masked_sums`, and write g."""
    period = center.shape[0]
    begin, end, length = stretch(part, parts, first, last, period, 2)
    totals, products = sums[part, 0], sums[part, 1]
    for at in range(begin, begin + length, period):
        far = at + length
        one, two = x[at : at + period], x[far : far + period]
        kept, kept_two = g[at : at + period], g[far : far + period]
        mask_gradient(dy[at : at + period], y[at : at + period], kept)
        mask_gradient(dy[far : far + period], y[far : far + period], kept_two)
        for j in range(period):
            a, b, middle = kept[j], kept_two[j], center[j]
            totals[j] += a + b
            products[j] += a * (one[j] - middle) + b * (two[j] - middle)
    for at in range(begin + 2 * length, end, period):
        stop = min(at + period, end)
        row, kept = x[at:stop], g[at:stop]
        mask_gradient(dy[at:stop], y[at:stop], kept)
        for j in range(row.shape[0]):
            totals[j] += kept[j]
            products[j] += kept[j] * (row[j] - center[j])


@inlined
def row_masked_gradient(part, parts, dy, y, x, dx, first, last, center, table):
    """Write dx = on_dy * g + on_x * (x - center) + constant."""
    on_dy, on_x, constant, zero = table[0], table[1], table[2], number(0.0, x)
    period = center.shape[0]
    begin, end, _ = stretch(part, parts, first, last, period, 1)
    for block in range(blocks(end - begin, period) - 1, -1, -1):
        start, to = block_of(block, period, begin, end)
        for at in range(start, to, period):
            stop = min(at + period, end)
            above, row, out, mask = dy[at:stop], x[at:stop], dx[at:stop], y[at:stop]
            for j in range(row.shape[0]):
                value = above[j]
                value = zero if mask[j] <= zero else value
                out[j] = on_dy[j] * value + on_x[j] * (row[j] - center[j]) + constant[j]
