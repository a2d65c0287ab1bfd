# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The backward pass of a whole layer in one compiled call; see `forward_loops`."""

import numpy as np

from anybatch.backends.numba.arrays import (
    activation_at,
    array_at,
    counts_at,
    cut_at,
    numbers_at,
    settings_at,
    valid_at,
)
from anybatch.backends.numba.bound_rules import CENTER, LENGTH, RESULTS, RULE
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.forward_loops import arguments
from anybatch.backends.numba.passes import (
    channel_sums,
    in_rows,
    plane_gradient,
    plane_sums,
    row_gradient,
    row_layout,
    row_sums,
)
from anybatch.backends.numba.passes_relu import (
    plane_masked_gradient,
    plane_masked_sums,
    row_kept_sums,
    row_masked_gradient,
    row_masked_sums,
)
from anybatch.backends.numba.passes_valid import plane_valid_gradient, row_valid_gradient
from anybatch.backends.numba.rules import MEMORY, SETTINGS, flow, keep_step, move_average, step_at
from anybatch.backends.numba.threads import fork


@inlined
def _backward_planes(part, parts, dy, x, dx, y, g_added, starts, shared):
    """Sums and gradient of some columns, each while it is in cache."""
    weight, relu, applied, centers, sums, on, eps, method, memory, numbers, wanted, scope = shared
    groups, num_statistics = applied.shape[1], applied.shape[2]
    width, values, found = x.shape[1] // num_statistics, numbers.copy(), np.empty(RESULTS)
    valid, room = scope[0], np.empty(x.shape[2], weight.dtype)
    begin, end = (
        groups * num_statistics * part // parts,
        groups * num_statistics * (part + 1) // parts,
    )
    for g in range(groups):
        first, last = starts[g], starts[g + 1]
        for k in range(
            max(begin - g * num_statistics, 0), min(end - g * num_statistics, num_statistics)
        ):
            center = centers[g, k]
            for c in range(k * width, (k + 1) * width):
                if relu:
                    total, product = plane_masked_sums(dy, y, x, g_added, c, first, last, center)
                else:
                    total, product = plane_sums(dy, x, c, first, last, center)
                sums[0, g, c], sums[1, g, c] = total, product
            state = (method, memory, weight, values, found)
            flow(*state, sums, applied, weight, on, eps, g, k, width, scope)
            if wanted:
                for c in range(k * width, (k + 1) * width):
                    on_dy, on_x, constant = on[0, g, c], on[1, g, c], on[2, g, c]
                    if valid.shape[0] > 0:
                        plane_valid_gradient(
                            dy, x, valid, dx, c, first, last, center, on_dy, on_x, constant, room
                        )
                    elif relu and g_added.shape[0] == 0:
                        plane_masked_gradient(
                            dy, y, x, dx, c, first, last, center, on_dy, on_x, constant
                        )
                    else:
                        above = g_added if relu else dy
                        plane_gradient(above, x, dx, c, first, last, center, on_dy, on_x, constant)


@inlined
def _backward_groups(part, parts, within, dy, x, dx, y, g_added, starts, layout, shared):
    """Sums and gradient of some groups of examples, each by one thread, or several `within`."""
    weight, relu, applied, centers, sums, on, eps, method, memory, numbers, wanted, scope = shared
    period, inner, example = layout
    groups, channels, num_statistics = sums.shape[1], sums.shape[2], applied.shape[2]
    valid, width = scope[0].reshape(-1), channels // num_statistics
    places = np.empty((4, period // (channels * inner), channels, inner), weight.dtype)
    center, table = places[0], places[1:]
    middle, rows = center.reshape(-1), table.reshape(3, -1)
    values, found = numbers.copy(), np.empty(RESULTS)
    for g in range(groups * part // parts, groups * (part + 1) // parts):
        first, last = starts[g] * example, starts[g + 1] * example
        for c in range(channels):
            center[:, c] = centers[g, c // width]
        partial = np.zeros((within, 2, period))
        if relu and g_added.shape[0] == 0:
            fork(row_masked_sums, within, (dy, y, x, first, last, middle, partial))
        elif relu:
            fork(row_kept_sums, within, (dy, y, x, g_added, first, last, middle, partial))
        else:
            fork(row_sums, within, (dy, x, first, last, middle, partial))
        total = channel_sums(partial, center.shape)
        for c in range(channels):
            rounded = np.float64(center[0, c, 0]) - centers[g, c // width]
            sums[0, g, c], sums[1, g, c] = total[0, c], total[1, c] + rounded * total[0, c]
        for k in range(num_statistics):
            state = (method, memory, weight, values, found)
            flow(*state, sums, applied, weight, on, eps, g, k, width, scope)
        if not wanted:
            continue
        for kind in range(3):
            for c in range(channels):
                table[kind, :, c] = on[kind, g, c]
        if valid.shape[0] > 0:
            one = rows[:, :channels].copy()
            some = (dy, x, valid, dx, first, last, middle[:channels], one)
            fork(row_valid_gradient, within, some)
        elif relu and g_added.shape[0] == 0:
            fork(row_masked_gradient, within, (dy, y, x, dx, first, last, middle, rows))
        else:
            above = g_added if relu else dy
            fork(row_gradient, within, (above, x, dx, first, last, middle, rows))


@inlined
def _gradients(dy, x, dx, y, g_added, last, starts, parts, shared, slopes, update):
    """Write the gradients of one normalization batch, and update averages if `update`."""
    weight, _, applied, _, sums, _, _, method, memory, numbers, _, scope = shared
    (dw, db), (valid, _, psis, _, _), groups = slopes, scope, applied.shape[1]
    if not in_rows(x, last) or (valid.shape[0] > 0 and not last):
        fork(_backward_planes, parts, (dy, x, dx, y, g_added, starts, shared))
    else:
        flat = (dy.reshape(-1), x.reshape(-1), dx.reshape(-1), y.reshape(-1), g_added.reshape(-1))
        across, within = (parts, 1) if groups >= parts else (1, parts)
        some = (within, *flat, starts, row_layout(x, last, starts), shared)
        fork(_backward_groups, across, some)
    for c in range(weight.shape[0]):
        first = second = 0.0
        for g in range(groups):
            first += sums[0, g, c]
            second += sums[1, g, c]
        db[c], dw[c] = first, second
    if update and method[RULE] != 0:
        move_average(method, memory, weight, numbers, np.empty(RESULTS), psis[0])


@jit
def backward(method, kept, data, applied, memory, settings, update_weight, eps, update, scope):
    """Gradients of `forward`.

    Args:
        method: Where it is described, see `anybatch.backends.numba.bound_rules`.
        kept: An empty array of the type of parameters and state.
        data: The first of the normalization batches, see `BackwardData`; gradients of scale and
            shift are rows, one for each batch.
        applied: Statistics that they were normalized by, ``(B, rows, G, K)``.
        memory: Where the state of the method's averages is told, see
            `anybatch.backends.numba.rules`.
        settings: Where its numbers are.
        update_weight: Weight of the newest in exponential averages.
        eps: Added to the variance.
        update: Whether averages may change.
        scope: What contributes to the statistics, see `anybatch.backends.numba.scopes`.
    """
    like, cut, dy, x, dx, weight, dw, db, wanted, parts, relu, y, g_added = data
    shape, last, starts = cut_at(cut)
    channels, size = shape[2] if last else shape[1], shape[0] * shape[1] * shape[2] * like.itemsize
    groups, num_statistics, row = applied.shape[2], applied.shape[3], channels * kept.itemsize
    weight, method = array_at(weight, channels, kept), numbers_at(method, LENGTH)
    memory, settings = numbers_at(memory, MEMORY), settings_at(settings, SETTINGS)
    sums, on = np.empty((2, groups, channels)), np.empty((3, groups, channels))
    (valid, given, step), psis = scope, np.empty((groups, num_statistics))
    counts = counts_at(given, starts, shape[1] if last else shape[2])
    for b in range(applied.shape[0]):
        at = b * size
        above, inputs = array_at(dy + at, shape, like), array_at(x + at, shape, like)
        slope = array_at(dx + at, shape, like)
        after_relu = activation_at(y + at if y != 0 else 0, shape, like)
        of_added = activation_at(g_added + at if g_added != 0 else 0, shape, like)
        numbers = arguments(method, memory, settings, update_weight, eps)
        before, (_, earlier) = step_at(step, num_statistics, kept)
        count = counts[0]
        share = count / (before + count)
        narrowed = (valid_at(valid, inputs, last), counts, psis, earlier, share)
        centers = applied[b, max(method[CENTER], 0)]  # of the groups' own variances
        used = (weight, relu, applied[b], centers, sums, on, eps)
        shared = (*used, method, memory, numbers, wanted, narrowed)
        slopes = array_at(dw + b * row, channels, kept), array_at(db + b * row, channels, kept)
        how = (last, starts, parts, shared, slopes, update)
        _gradients(above, inputs, slope, after_relu, of_added, *how)
        if step[0] != 0:
            keep_step(step, before, count, psis[0, :0], psis[0], kept)
