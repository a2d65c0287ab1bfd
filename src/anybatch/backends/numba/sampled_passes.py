# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
"""Passes over planes and rows of batch normalization sampling; see `sampled`."""

import numpy as np

from anybatch.backends.numba.compile import inlined
from anybatch.backends.numba.low_precision import number
from anybatch.backends.numba.passes import CHUNK, NEAR
from anybatch.backends.numba.passes_relu import mask_gradient
from anybatch.backends.numba.streaming_stores import lanes, leaves, put_affine, settle_stores
from anybatch.backends.numba.threads import fork

_FEW = 64  # rows that are summed in the type of the data
WIDE = 512  # rows of few channels are taken together, up to so many values


@inlined
def _plane_moments(x, c, channels, runs):
    """Count, mean and biased variance of a channel's sampled values, in a pass about the first."""
    count, total, squares = 0, 0.0, 0.0
    away = np.float64(number(x[runs[0, 0] * channels + c, runs[0, 1]], x))
    for r in range(runs.shape[0]):
        some = x[runs[r, 0] * channels + c, runs[r, 1] : runs[r, 1] + runs[r, 2]]
        for k in range(some.shape[0]):
            offset = some[k] - away
            total += offset
            squares += offset * offset
        count += runs[r, 2]
    offset = total / count
    var = squares / count - offset * offset
    return count, away + offset, 0.0 if var < 0.0 else var  # by rounding; nan stays nan


@inlined
def planes_statistics(part, parts, x, channels, length, first, second, table):
    """Write each channel's (mean, variance) of both samples into `table`."""
    for c in range(channels * part // parts, channels * (part + 1) // parts):
        _, table[0, c], table[1, c] = _plane_moments(x, c, channels, first)
        if second.shape[0] > 0:
            _, table[2, c], table[3, c] = _plane_moments(x, c, channels, second)


@inlined
def _rows_sums(part, parts, x, length, runs, count, shift, sums):
    """Add up x - shift and its square over a part of a sample."""
    begin, end, width = count * part // parts, count * (part + 1) // parts, x.shape[1]
    one, two = np.zeros(width, shift.dtype), np.zeros(width, shift.dtype)
    total, squares = sums[part, 0], sums[part, 1]
    seen = taken = 0
    for r in range(runs.shape[0]):
        start, some = runs[r, 0] * length + runs[r, 1] - seen, runs[r, 2]
        for i in range(start + max(begin, seen), start + min(end, seen + some)):
            row = x[i]
            for c in range(width):
                offset = row[c] - shift[c]
                one[c] += offset
                two[c] += offset * offset
            taken += 1
            if taken % _FEW == 0:
                for c in range(width):
                    total[c] += one[c]
                    squares[c] += two[c]
                one[:] = 0
                two[:] = 0
        seen += some
    for c in range(width):
        total[c] += one[c]
        squares[c] += two[c]


@inlined
def rows_moments(parts, x, length, runs, like, row_mean, row_var):
    """Write mean and variance of a sample, from rows, in one pass about its first values' mean."""
    count = 0
    for r in range(runs.shape[0]):
        count += runs[r, 2]
    first, shift = runs[0, 0] * length + runs[0, 1], np.zeros(x.shape[1], like.dtype)
    near = x[first : first + max(1, min(NEAR, runs[0, 2] // 8))]
    for i in range(near.shape[0]):
        for c in range(x.shape[1]):
            shift[c] += number(near[i, c], x) / near.shape[0]
    sums = np.zeros((parts, 2, x.shape[1]))
    fork(_rows_sums, parts, (x, length, runs, count, shift, sums))
    for c in range(x.shape[1]):
        total = squares = 0.0
        for part in range(parts):
            total += sums[part, 0, c]
            squares += sums[part, 1, c]
        mean = total / count
        var = squares / count - mean * mean
        row_mean[c] = mean + shift[c]
        row_var[c] = 0.0 if var < 0.0 else var  # by rounding; what is not a number stays so


@inlined
def planes_affine(part, parts, x, y, relu, added, means, scales, shifts):
    """Write y = (x - mean) * scale + shift, or the `relu` of it, with what is `added`."""
    planes, length = x.shape
    channels, zero = means.shape[0], number(0, x)
    past = not relu and leaves(y, length)
    for p in range(planes * part // parts, planes * (part + 1) // parts):
        c = p % channels
        mean, scale, shift = means[c], scales[c], shifts[c]
        if past:
            row, out = x[p], y[p]
            for k in range(0, length, lanes(y)):
                put_affine(out, row, k, mean, scale, shift, k)
        elif not relu:
            for k in range(length):
                y[p, k] = (x[p, k] - mean) * scale + shift
        elif added.shape[0] == 0:
            for k in range(length):
                value = (x[p, k] - mean) * scale + shift
                y[p, k] = zero if value <= zero else value
        else:
            for k in range(length):
                value = (x[p, k] - mean) * scale + shift + added[p, k]
                y[p, k] = zero if value <= zero else value
    if past:
        settle_stores()


@inlined
def rows_affine(part, parts, x, y, relu, added, scales, shifts):
    """Write y = x * scale + shift: a third row of numbers to load would cost a third more."""
    rows, width = x.shape
    zero, past = number(0, x), not relu and leaves(y, width)
    for i in range(rows * part // parts, rows * (part + 1) // parts):
        row_x, row_y = x[i], y[i]
        if past:
            for k in range(0, width, lanes(y)):
                put_affine(row_y, row_x, k, zero, scales, shifts, k)
        elif not relu:
            for c in range(width):
                row_y[c] = row_x[c] * scales[c] + shifts[c]
        elif added.shape[0] == 0:
            for c in range(width):
                value = row_x[c] * scales[c] + shifts[c]
                row_y[c] = zero if value <= zero else value
        else:
            more = added[i]
            for c in range(width):
                value = row_x[c] * scales[c] + shifts[c] + more[c]
                row_y[c] = zero if value <= zero else value
    if past:
        settle_stores()


@inlined
def _pass_through(dy, x, dx, mean, scale):
    """Write dx = scale * dy; sum(dy) and sum(dy * (x - mean)) of some values of a channel."""
    one, two = number(0, dy), number(0, dy)
    for k in range(dy.shape[0]):  # from 0 on: no check for negative indices
        d = dy[k]
        one += d
        two += d * (x[k] - mean)
        dx[k] = d * scale
    return one, two


@inlined
def _sums_only(dy, x, mean):
    """The same two sums."""
    one, two = number(0, dy), number(0, dy)
    for k in range(dy.shape[0]):
        one += dy[k]
        two += dy[k] * (x[k] - mean)
    return one, two


@inlined
def planes_backward(part, parts, dy, x, dx, relu, y, g, means, scales, sums):
    """Write dx = scale * dy, and (sum(dy), sum(dy * (x - mean))) of each plane into `sums`.

    Behind a `relu` with output `y` this is the gradient before it, which `g` takes, if it is there.
    """
    planes, length = x.shape
    channels = means.shape[0]
    made, zero = np.empty(min(length, CHUNK), means.dtype), number(0, x)
    past = not relu and leaves(dx, length)
    for p in range(planes * part // parts, planes * (part + 1) // parts):
        mean, scale = means[p % channels], scales[p % channels]
        total, moment = 0.0, 0.0
        for begin in range(0, length, CHUNK):
            end = min(begin + CHUNK, length)
            above, row, out = dy[p, begin:end], x[p, begin:end], dx[p, begin:end]
            # A call for each array: of one that may be either, the compiler makes slow loops.
            if past:
                one, two = _sums_only(above, row, mean)
                for k in range(0, end - begin, lanes(dx)):
                    put_affine(out, above, k, zero, scale, zero, k)
            elif not relu:
                one, two = _pass_through(above, row, out, mean, scale)
            elif g.shape[0] > 0:
                mask_gradient(above, y[p, begin:end], g[p, begin:end])
                one, two = _pass_through(g[p, begin:end], row, out, mean, scale)
            else:
                mask_gradient(above, y[p, begin:end], made[: end - begin])
                one, two = _pass_through(made[: end - begin], row, out, mean, scale)
            total += one
            moment += two
        sums[p, 0, 0] = total
        sums[p, 1, 0] = moment
    if past:
        settle_stores()


@inlined
def _pass_row_through(dy, x, dx, means, scales, one, two):
    """The same of a row, a value of each channel; adds to its sums."""
    for c in range(dy.shape[0]):
        d = dy[c]
        one[c] += d
        two[c] += d * (x[c] - means[c])
        dx[c] = d * scales[c]


@inlined
def _sum_row_only(dy, x, means, one, two):
    """Adds a row to the two sums."""
    for c in range(dy.shape[0]):
        d = dy[c]
        one[c] += d
        two[c] += d * (x[c] - means[c])


@inlined
def rows_backward(part, parts, dy, x, dx, relu, y, g, means, scales, sums):
    """The same of rows; `sums` has a row a block of them."""
    rows, width = x.shape
    blocks = sums.shape[0]
    share = (rows + blocks - 1) // blocks
    made, zero, past = np.empty(width, means.dtype), number(0, x), not relu and leaves(dx, width)
    for b in range(blocks * part // parts, blocks * (part + 1) // parts):
        one, two = np.empty(width, means.dtype), np.empty(width, means.dtype)
        total, moment = np.zeros(width), np.zeros(width)
        end = min(b * share + share, rows)
        for begin in range(b * share, end, _FEW):
            one[:] = 0
            two[:] = 0
            for i in range(begin, min(begin + _FEW, end)):
                if past:
                    _sum_row_only(dy[i], x[i], means, one, two)
                    above, out = dy[i], dx[i]
                    for k in range(0, width, lanes(dx)):
                        put_affine(out, above, k, zero, scales, zero, k)
                elif not relu:
                    _pass_row_through(dy[i], x[i], dx[i], means, scales, one, two)
                elif g.shape[0] > 0:
                    mask_gradient(dy[i], y[i], g[i])
                    _pass_row_through(g[i], x[i], dx[i], means, scales, one, two)
                else:
                    mask_gradient(dy[i], y[i], made)
                    _pass_row_through(made, x[i], dx[i], means, scales, one, two)
            for c in range(width):
                total[c] += one[c]
                moment[c] += two[c]
        for c in range(width):
            sums[b, 0, c], sums[b, 1, c] = total[c], moment[c]
    if past:
        settle_stores()


@inlined
def planes_correct(part, parts, dy, x, dx, relu, y, length, runs, rows):
    """Write dx = scale * dy + on_x * (x - center) + constant in a sample."""
    centers, scales, on_x, constants = rows[0], rows[1], rows[2], rows[3]
    channels, zero = centers.shape[0], number(0, x)
    for c in range(channels * part // parts, channels * (part + 1) // parts):
        center, scale, factor, constant = centers[c], scales[c], on_x[c], constants[c]
        for r in range(runs.shape[0]):
            p, begin, end = runs[r, 0] * channels + c, runs[r, 1], runs[r, 1] + runs[r, 2]
            some_dy, some_x, some_dx = dy[p, begin:end], x[p, begin:end], dx[p, begin:end]
            for k in range(end - begin):
                d = number(some_dy[k], x)
                if relu and y[p, begin + k] <= zero:
                    d = zero
                some_dx[k] = scale * d + factor * (some_x[k] - center) + constant


@inlined
def rows_correct(part, parts, dy, x, dx, relu, y, length, runs, rows):
    """Write the gradient of the sample again, in rows."""
    centers, scales, on_x, constants = rows[0], rows[1], rows[2], rows[3]
    zero, count, seen = number(0, x), 0, 0
    for r in range(runs.shape[0]):
        count += runs[r, 2]
    begin, end = count * part // parts, count * (part + 1) // parts
    for r in range(runs.shape[0]):
        start, some = runs[r, 0] * length + runs[r, 1] - seen, runs[r, 2]
        for i in range(start + max(begin, seen), start + min(end, seen + some)):
            above, row, out = dy[i], x[i], dx[i]
            for c in range(centers.shape[0]):
                d = number(above[c], x)
                if relu and y[i, c] <= zero:
                    d = zero
                out[c] = scales[c] * d + on_x[c] * (row[c] - centers[c]) + constants[c]
        seen += some
