# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
"""The compiled loops of batch normalization sampling, for batches of any size.

Statistics come from a few values, so that forward is one pass over the data, and backward another
that writes the gradient as if statistics were constants and sums what passes through them; the
sample is written again at the end.

Tensors are given by their addresses (`anybatch.backends.numba.arrays`). Activations ``x``, ``y``,
``dy`` and ``dx`` are planes ``(N * C, L)`` of the contiguous format, or rows ``(N * L, C)`` where a
channel's values are not side by side. A sample is a table of runs ``(R, 3)``
of adjacent pixels: example, first pixel, length. A second, empty table is none.
"""

import math

import numpy as np

from anybatch.backends.numba.arrays import LIKE as LIKE
from anybatch.backends.numba.arrays import array_at, running_at
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.huge_pages import empty_like as empty_like
from anybatch.backends.numba.passes_relu import mask_gradient
from anybatch.backends.numba.rules import count_batch, track, unbiased
from anybatch.backends.numba.streaming_stores import lanes, leaves, put_affine, settle_stores
from anybatch.backends.numba.threads import fork, parts

_CHUNK = 2048  # values of a plane that are summed in the type of the data
_FEW = 64  # rows that are summed in the type of the data
_WIDE = 512  # rows of few channels are taken together, up to so many values


@inlined
def _plane_moments(x, c, channels, runs):
    """Count, mean and biased variance of a channel's sampled values, in a pass about the first."""
    count, total, squares = 0, 0.0, 0.0
    away = np.float64(x[runs[0, 0] * channels + c, runs[0, 1]])
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
def _planes_statistics(part, parts, x, channels, length, first, second, table):
    """Write each channel's (mean, variance) of both samples into `table`."""
    for c in range(channels * part // parts, channels * (part + 1) // parts):
        _, table[0, c], table[1, c] = _plane_moments(x, c, channels, first)
        if second.shape[0] > 0:
            _, table[2, c], table[3, c] = _plane_moments(x, c, channels, second)


@inlined
def _rows_sums(part, parts, x, length, runs, count, shift, sums):
    """Add up x - shift and its square over a part of a sample."""
    begin, end, width = count * part // parts, count * (part + 1) // parts, x.shape[1]
    one, two = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
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
def _rows_moments(parts, x, length, runs, row_mean, row_var):
    """Write mean and variance of a sample, from rows, in one pass about its first values."""
    count = 0
    for r in range(runs.shape[0]):
        count += runs[r, 2]
    shift = x[runs[0, 0] * length + runs[0, 1]].copy()
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
def _planes_affine(part, parts, x, y, relu, added, means, scales, shifts):
    """Write y = (x - mean) * scale + shift, or the `relu` of it, with what is `added`."""
    planes, length = x.shape
    channels, zero = means.shape[0], x.dtype.type(0)
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
def _rows_affine(part, parts, x, y, relu, added, scales, shifts):
    """Write y = x * scale + shift: a third row of numbers to load would cost a third more."""
    rows, width = x.shape
    zero, past = x.dtype.type(0), not relu and leaves(y, width)
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
    one, two = dy.dtype.type(0), dy.dtype.type(0)
    for k in range(dy.shape[0]):  # from 0 on: no check for negative indices
        d = dy[k]
        one += d
        two += d * (x[k] - mean)
        dx[k] = d * scale
    return one, two


@inlined
def _sums_only(dy, x, mean):
    """The same two sums."""
    one, two = dy.dtype.type(0), dy.dtype.type(0)
    for k in range(dy.shape[0]):
        one += dy[k]
        two += dy[k] * (x[k] - mean)
    return one, two


@inlined
def _planes_backward(part, parts, dy, x, dx, relu, y, g, means, scales, sums):
    """Write dx = scale * dy, and (sum(dy), sum(dy * (x - mean))) of each plane into `sums`.

    Behind a `relu` with output `y` this is the gradient before it, which `g` takes, if it is there.
    """
    planes, length = x.shape
    channels = means.shape[0]
    made, zero = np.empty(min(length, _CHUNK), x.dtype), x.dtype.type(0)
    past = not relu and leaves(dx, length)
    for p in range(planes * part // parts, planes * (part + 1) // parts):
        mean, scale = means[p % channels], scales[p % channels]
        total, moment = 0.0, 0.0
        for begin in range(0, length, _CHUNK):
            end = min(begin + _CHUNK, length)
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
def _rows_backward(part, parts, dy, x, dx, relu, y, g, means, scales, sums):
    """The same of rows; `sums` has a row a block of them."""
    rows, width = x.shape
    blocks = sums.shape[0]
    share = (rows + blocks - 1) // blocks
    made, zero, past = np.empty(width, x.dtype), x.dtype.type(0), not relu and leaves(dx, width)
    for b in range(blocks * part // parts, blocks * (part + 1) // parts):
        one, two = np.empty(width, x.dtype), np.empty(width, x.dtype)
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
        sums[b, 0] = total
        sums[b, 1] = moment
    if past:
        settle_stores()


@inlined
def _planes_correct(part, parts, dy, x, dx, relu, y, length, runs, rows):
    """Write dx = scale * dy + on_x * (x - center) + constant in a sample."""
    centers, scales, on_x, constants = rows[0], rows[1], rows[2], rows[3]
    channels, zero = centers.shape[0], x.dtype.type(0)
    for c in range(channels * part // parts, channels * (part + 1) // parts):
        center, scale, factor, constant = centers[c], scales[c], on_x[c], constants[c]
        for r in range(runs.shape[0]):
            p, begin, end = runs[r, 0] * channels + c, runs[r, 1], runs[r, 1] + runs[r, 2]
            some_dy, some_x, some_dx = dy[p, begin:end], x[p, begin:end], dx[p, begin:end]
            for k in range(end - begin):
                d = some_dy[k]
                if relu and y[p, begin + k] <= zero:
                    d = zero
                some_dx[k] = scale * d + factor * (some_x[k] - center) + constant


@inlined
def _rows_correct(part, parts, dy, x, dx, relu, y, length, runs, rows):
    centers, scales, on_x, constants = rows[0], rows[1], rows[2], rows[3]
    zero, count, seen = x.dtype.type(0), 0, 0
    for r in range(runs.shape[0]):
        count += runs[r, 2]
    begin, end = count * part // parts, count * (part + 1) // parts
    for r in range(runs.shape[0]):
        start, some = runs[r, 0] * length + runs[r, 1] - seen, runs[r, 2]
        for i in range(start + max(begin, seen), start + min(end, seen + some)):
            above, row, out = dy[i], x[i], dx[i]
            for c in range(centers.shape[0]):
                d = above[c]
                if relu and y[i, c] <= zero:
                    d = zero
                out[c] = scales[c] * d + on_x[c] * (row[c] - centers[c]) + constants[c]
        seen += some


@inlined
def _decide(table, shares, count, weight, bias, running, pace, eps, update, stats, scales, shifts):
    """The rule of all channels: statistics, running statistics, scale and shift."""
    running_mean, running_var, tracked = running
    pace = count_batch(tracked, pace) if update else pace
    for c in range(weight.shape[0]):
        mean, var = table[0, c], table[1, c]
        if shares[1] > 0:  # bn-sampling eq. 4
            mean = shares[0] * mean + shares[1] * table[2, c]
            var = shares[0] * var + shares[1] * table[3, c]
        stats[0, c], stats[1, c] = mean, var
        if update:
            track(c, mean, unbiased(var, count), pace, running_mean, running_var)
        scales[c], shifts[c] = weight[c] / math.sqrt(var + eps), bias[c]


@inlined
def _combine(sums, planes, weight, stats, table, shares, counts, eps, dw, db, work):
    """Sums over everything, and the factors of both samples' correction, into `work`."""
    channels = weight.shape[0]
    for c in range(channels):
        first = second = 0.0
        if planes:
            for p in range(c, sums.shape[0], channels):
                first += sums[p, 0, 0]
                second += sums[p, 1, 0]
        else:
            for b in range(sums.shape[0]):
                for w in range(c, sums.shape[2], channels):
                    first += sums[b, 0, w]
                    second += sums[b, 1, w]
        inverse = 1 / math.sqrt(stats[1, c] + eps)
        # Means are rounded to the type of the data where they are subtracted: so are the sums'.
        second += (work[0, c] - stats[0, c]) * first
        dw[c], db[c] = second * inverse, first
        for s in range(2):
            if shares[s] > 0:
                factor = -weight[c] * inverse * shares[s] / counts[s]
                work[1 + 3 * s, c] = table[2 * s, c]
                work[2 + 3 * s, c] = factor * inverse * dw[c]
                work[3 + 3 * s, c] = factor * db[c]


@inlined
def _wide(channels, rows):
    """How many rows of few channels are taken as one."""
    take = max(_WIDE // channels, 1)
    while rows % take:
        take -= 1
    return take


@inlined
def _wider(rows, take):
    """Rows, so many taken as one."""
    return rows.reshape(rows.shape[0] // take, take * rows.shape[1])


@inlined
def _cast(row, take, like):
    """A number a channel, so many times over, in the type of the data."""
    channels = row.shape[0]
    table = np.empty(take * channels, like.dtype)
    for t in range(take):
        for c in range(channels):
            table[t * channels + c] = row[c]
    return table


@inlined
def _map_at(address, shape, like):
    """Planes or rows; none of them at address 0."""
    return array_at(address, (0 if address == 0 else shape[0], shape[1]), like)


@jit
def _forward(
    like,
    x,
    y,
    shape,
    planes,
    relu,
    added,
    runs,
    shares,
    counts,
    length,
    weight,
    bias,
    running,
    pace,
    eps,
    update,
    parts,
    table,
    stats,
):
    """`forward`, into `table` and `stats`."""
    channels, (first, second) = stats.shape[1], runs
    x, y, added = array_at(x, shape, like), array_at(y, shape, like), _map_at(added, shape, like)
    weight, bias = array_at(weight, channels, like), array_at(bias, channels, like)
    running = running_at(running, channels, like)
    if planes:
        fork(_planes_statistics, parts, (x, channels, length, first, second, table))
    else:
        _rows_moments(parts, x, length, first, table[0], table[1])
        if second.shape[0] > 0:
            _rows_moments(parts, x, length, second, table[2], table[3])
    scales, shifts, count = np.empty(channels), np.empty(channels), counts[0] + counts[1]
    _decide(table, shares, count, weight, bias, running, pace, eps, update, stats, scales, shifts)
    if planes:
        on = _cast(stats[0], 1, x), _cast(scales, 1, x), _cast(shifts, 1, x)
        fork(_planes_affine, parts, (x, y, relu, added, *on))
    else:
        take = _wide(channels, x.shape[0])
        for c in range(channels):
            shifts[c] -= stats[0, c] * scales[c]
        wide = _wider(x, take), _wider(y, take), relu, _wider(added, take)
        fork(_rows_affine, parts, (*wide, _cast(scales, take, x), _cast(shifts, take, x)))


@jit
def _backward(
    like,
    dy,
    x,
    dx,
    shape,
    planes,
    relu,
    y,
    g,
    length,
    weight,
    dw,
    db,
    runs,
    shares,
    counts,
    stats,
    table,
    eps,
    parts,
):
    """`backward`, of what `forward` kept."""
    channels, work = stats.shape[1], np.zeros((7, stats.shape[1]))
    dy, x, dx = array_at(dy, shape, like), array_at(x, shape, like), array_at(dx, shape, like)
    y, g, weight = (
        _map_at(y, shape, like),
        _map_at(g, shape, like),
        array_at(weight, channels, like),
    )
    dw, db = array_at(dw, channels, like), array_at(db, channels, like)
    wanted = np.empty(channels)
    for c in range(channels):
        wanted[c] = weight[c] / math.sqrt(stats[1, c] + eps)
    mean, scales = _cast(stats[0], 1, x), _cast(wanted, 1, x)
    work[0] = mean
    if planes:
        sums = np.empty((x.shape[0], 2, 1))
        fork(_planes_backward, parts, (dy, x, dx, relu, y, g, mean, scales, sums))
    else:
        take = _wide(channels, x.shape[0])
        rows = x.shape[0] // take
        sums = np.empty((min(8 * parts, rows) if parts > 1 else 1, 2, take * channels))
        wide = _wider(dy, take), _wider(x, take), _wider(dx, take), relu, _wider(y, take)
        tiled = _cast(mean, take, x), _cast(scales, take, x)
        fork(_rows_backward, parts, (*wide, _wider(g, take), *tiled, sums))
    _combine(sums, planes, weight, stats, table, shares, counts, eps, dw, db, work)
    for s in range(2):
        if shares[s] > 0:
            factors = np.empty((4, channels), x.dtype)
            for c in range(channels):
                factors[0, c], factors[1, c] = work[1 + 3 * s, c], scales[c]
                factors[2, c], factors[3, c] = work[2 + 3 * s, c], work[3 + 3 * s, c]
            if planes:
                fork(_planes_correct, parts, (dy, x, dx, relu, y, length, runs[s], factors))
            else:
                fork(_rows_correct, parts, (dy, x, dx, relu, y, length, runs[s], factors))


def box_runs(first, sides, spatial):
    """The runs of a box of examples and pixels.

    Args:
        first: Where it begins, in examples and each spatial dimension.
        sides: How far it reaches.
        spatial: Shape of a map.
    """
    pixels = np.arange(math.prod(spatial)).reshape(spatial)
    patch = pixels[tuple(slice(a, a + n) for a, n in zip(first[1:], sides[1:], strict=True))]
    patch = patch.reshape(-1)
    breaks = np.flatnonzero(np.diff(patch) != 1) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(patch)])))
    examples = np.arange(first[0], first[0] + sides[0])
    table = np.empty((len(examples), len(starts), 3), np.int64)
    table[:, :, 0], table[:, :, 1], table[:, :, 2] = examples[:, None], patch[starts], lengths
    return table.reshape(-1, 3)


def point_runs(where, spatial):
    """The runs of single values, of the example and the pixel of each."""
    rows, *pixels = where
    flat = np.ravel_multi_index(tuple(pixels), spatial) if pixels else np.zeros_like(rows)
    return np.stack([rows, flat, np.ones_like(rows)], 1).astype(np.int64)


NO_RUNS = np.empty((0, 3), np.int64)


class Kept:
    """What one forward leaves for its backward."""

    __slots__ = ("counts", "runs", "shares", "stats", "table")

    def __init__(self, runs, shares, counts, stats, table) -> None:
        self.runs, self.shares, self.counts = runs, shares, counts
        self.stats, self.table = stats, table


def forward(
    like,
    x,
    y,
    shape,
    planes,
    relu,
    added,
    sample,
    channels,
    weight,
    bias,
    running,
    pace,
    eps,
    update,
):
    """The whole forward.

    Args:
        like: An empty array of the type of all tensors.
        x: Planes ``(N * C, L)`` or rows ``(N * L, C)``.
        y: The same, to be written.
        shape: Of both.
        planes: Whether they are planes.
        relu: Whether a ReLU follows.
        added: What is added before it, like `x`; 0 for nothing.
        sample: Tables of runs, their shares, their counts, and L.
        channels: C.
        weight: Scale.
        bias: Shift.
        running: Running mean, variance and number of batches.
        pace: Momentum, -1 for the mean of all batches.
        eps: Added to the variance.
        update: Whether state may change.

    Returns:
        What `backward` needs.
    """
    runs, shares, counts, length = sample
    table, stats, threads = (
        np.empty((4, channels)),
        np.empty((2, channels)),
        parts(math.prod(shape)),
    )
    how = (length, weight, bias, running, pace, eps, update, threads, table, stats)
    _forward(like, x, y, shape, planes, relu, added, runs, shares, counts, *how)
    return Kept(runs, shares, counts, stats, table)


def backward(like, dy, x, dx, shape, planes, relu, y, g, length, weight, dw, db, kept, eps):
    """The whole backward; tensors as in `forward`.

    Args:
        like: An empty array of the type of all tensors.
        dy: Gradient of the output.
        x: Input.
        dx: Takes the gradient of the input.
        shape: Of the three.
        planes: Whether they are planes.
        relu: Whether a ReLU followed.
        y: Its output; 0 without one.
        g: Takes the gradient of what was added before it; 0 where none is wanted.
        length: Pixels of a map.
        weight: Scale.
        dw: Takes the gradient of the scale.
        db: Takes the gradient of the shift.
        kept: What `forward` returned.
        eps: Added to the variance.
    """
    of_forward = (kept.runs, kept.shares, kept.counts, kept.stats, kept.table)
    given = (like, dy, x, dx, shape, planes, relu, y, g, length, weight, dw, db)
    _backward(*given, *of_forward, eps, parts(math.prod(shape)))
