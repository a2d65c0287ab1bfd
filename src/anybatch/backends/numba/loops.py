# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""A whole layer in one compiled call: passes, rule and state, forward and backward.

Tensors are given by their addresses (`anybatch.backends.numba.arrays`). Activations ``x``, ``y``,
``dy`` and ``dx`` are ``(N, C, L)``, or ``(N, L, C)`` where channels are `last`. Groups of examples
begin at ``starts``. One function serves all methods, so that one is compiled.
"""

import numpy as np

from anybatch.backends.numba.arrays import (
    LIKE,
    activation_at,
    array_at,
    counter_at,
    numbers_at,
)
from anybatch.backends.numba.bound_rules import (
    CENTER,
    CENTERED,
    LENGTH,
    RESULTS,
    RULE,
    TRACKS_USED,
    D,
)
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.huge_pages import empty_like
from anybatch.backends.numba.passes import (
    channel_sums,
    in_rows,
    plane_gradient,
    plane_moments,
    plane_sums,
    plane_write,
    row_gradient,
    row_layout,
    row_moments,
    row_sums,
    row_write,
    settle,
)
from anybatch.backends.numba.passes_relu import (
    plane_activate,
    plane_masked_gradient,
    plane_masked_sums,
    row_activate,
    row_kept_sums,
    row_masked_gradient,
    row_masked_sums,
)
from anybatch.backends.numba.rules import (
    choose,
    count_batch,
    count_steps,
    factors,
    fits,
    flow,
    given,
    move_average,
    move_state,
    track,
    track_groups,
    unbiased,
)
from anybatch.backends.numba.threads import fork, is_small, parts, without_threads
from anybatch.backends.rule import EPS, NUMBER, PLACES, UPDATE_WEIGHT

__all__ = [
    "LIKE",
    "backward",
    "empty_like",
    "forward",
    "is_small",
    "parts",
    "table",
    "without_threads",
]

table = np.empty  # room for statistics, of a shape


# --- forward ----------------------------------------------------------------


@inlined
def _forward_planes(
    part,
    parts,
    x,
    y,
    added,
    starts,
    weight,
    bias,
    relu,
    own,
    used,
    eps,
    method,
    memory,
    numbers,
):
    """Statistics and output of some columns, each while it is in cache."""
    groups, columns = used.shape[1], used.shape[2]
    width, centered = x.shape[1] // columns, method[CENTERED] != 0
    values, found = numbers.copy(), np.empty(RESULTS)
    begin, end = groups * columns * part // parts, groups * columns * (part + 1) // parts
    for g in range(groups):
        first, last = starts[g], starts[g + 1]
        for k in range(max(begin - g * columns, 0), min(end - g * columns, columns)):
            for c in range(k * width, (k + 1) * width):
                own[0, g, c], own[1, g, c] = plane_moments(x, c, first, last, centered)
            choose(method, memory, weight, values, found, own, used, g, k, width)
            for c in range(k * width, (k + 1) * width):
                mean, scale, shift = factors(method, used, g, k, c, weight, bias, eps)
                if relu:
                    plane_activate(x, added, y, c, first, last, mean, scale, shift)
                else:
                    plane_write(x, y, c, first, last, mean, scale, shift)


@inlined
def _forward_group(
    g,
    parts,
    x,
    y,
    added,
    starts,
    layout,
    weight,
    bias,
    relu,
    own,
    used,
    eps,
    method,
    memory,
    numbers,
):
    """Statistics and output of a group of examples."""
    period, inner, example = layout
    first, last = starts[g] * example, starts[g + 1] * example
    channels, centered = own.shape[2], method[CENTERED] != 0
    repeats = period // (channels * inner)
    shift = np.zeros((repeats, channels, inner), weight.dtype)
    if centered:
        for c in range(channels):
            shift[:, c] = x[first + c * inner]
    sums = np.zeros((parts, 2, period))
    fork(row_moments, parts, (x, first, last, shift.reshape(-1), sums))
    count, total = (last - first) // channels, channel_sums(sums, shift.shape)
    for c in range(channels):
        away = np.float64(shift[0, c, 0])
        own[0, g, c], own[1, g, c] = settle(total[0, c], total[1, c], count, away, centered)
    on, width = np.empty((3, *shift.shape), weight.dtype), channels // used.shape[2]
    values, found = numbers.copy(), np.empty(RESULTS)
    for k in range(used.shape[2]):
        choose(method, memory, weight, values, found, own, used, g, k, width)
        for c in range(k * width, (k + 1) * width):
            mean, scale, constant = factors(method, used, g, k, c, weight, bias, eps)
            on[0, :, c], on[1, :, c], on[2, :, c] = mean, scale, constant
    if relu:
        fork(row_activate, parts, (x, added, y, first, last, on.reshape(3, -1)))
    else:
        fork(row_write, parts, (x, y, first, last, on.reshape(3, -1)))


@inlined
def _forward_groups(
    part,
    parts,
    x,
    y,
    added,
    starts,
    layout,
    weight,
    bias,
    relu,
    own,
    used,
    eps,
    method,
    memory,
    numbers,
):
    """Some groups of examples, each by one thread."""
    groups, rest = starts.shape[0] - 1, (own, used, eps, method, memory, numbers)
    for g in range(groups * part // parts, groups * (part + 1) // parts):
        _forward_group(g, 1, x, y, added, starts, layout, weight, bias, relu, *rest)


@inlined
def _arguments(method, memory, settings, pace, eps):
    """The numbers that a rule reads of its layer, each in its place."""
    values = np.zeros(PLACES)
    count_steps(method, memory, values)
    values[EPS], values[UPDATE_WEIGHT] = eps, pace
    for i in range(len(settings)):
        values[NUMBER + i] = settings[i]
    return values


@jit
def forward(
    method,
    kept,
    like,
    x,
    y,
    shape,
    last,
    starts,
    weight,
    bias,
    parts,
    relu,
    added,
    own,
    used,
    tracked,
    memory,
    settings,
    pace,
    eps,
    update,
):
    """Normalize a batch, and remember it if it is to `update`.

    Args:
        method: Where it is described, see `anybatch.backends.numba.bound_rules`.
        kept: An empty array of the type of parameters and state.
        like: One of the type of activations.
        x: Input.
        y: Output, to be written.
        shape: Of both.
        last: Whether channels are.
        starts: Where groups of examples begin, and the end.
        weight: Scale.
        bias: Shift.
        parts: Threads.
        relu: Whether a ReLU follows.
        added: What is added before it, like `x`; 0 for nothing.
        own: Takes the groups' own statistics, ``(2, G, C)``; without a rule it may be `used`.
        used: Takes those to normalize by, ``(rows, G, K)``.
        tracked: Batches that running statistics have seen.
        memory: The state of the method, see `anybatch.backends.numba.rules`.
        settings: Its numbers.
        pace: Weight of the new running statistics; below 0 for the mean of all.
        eps: Added to the variance.
        update: Whether state may change.
    """
    channels = shape[2] if last else shape[1]
    x, y, added = (
        array_at(x, shape, like),
        array_at(y, shape, like),
        activation_at(added, shape, like),
    )
    method = numbers_at(method, LENGTH)
    weight, bias = array_at(weight, channels, kept), array_at(bias, channels, kept)
    numbers = _arguments(method, memory, settings, pace, eps)
    groups, values = used.shape[1], x.shape[1] if last else x.shape[2]
    rest = (weight, bias, relu, own, used, eps, method, memory, numbers)
    if not in_rows(x, last):
        fork(_forward_planes, parts, (x, y, added, starts, *rest))
    else:
        flat = (x.reshape(-1), y.reshape(-1), added.reshape(-1))
        some = (*flat, starts, row_layout(x, last, starts), *rest)
        if groups >= parts:
            fork(_forward_groups, parts, some)
        else:
            for g in range(groups):
                _forward_group(g, parts, *some)
    if not update:
        return
    running_mean, running_var = (
        array_at(memory[0], channels, kept),
        array_at(memory[1], channels, kept),
    )
    tracked = counter_at(tracked)
    if method[RULE] == 0:
        track_groups(own, starts, values, pace, running_mean, running_var, tracked)
        return
    pace, count = count_batch(tracked, pace), (starts[1] - starts[0]) * values
    for c in range(channels):
        if method[TRACKS_USED] == 0:
            var = unbiased(own[1, 0, c], count)
            track(c, own[0, 0, c], var, pace, running_mean, running_var)
        elif method[CENTERED] != 0:
            track(c, used[0, 0, c], used[1, 0, c], pace, running_mean, running_var)
        elif fits(used[1, 0, c], running_var):  # the uncentred form has no mean
            running_var[c] += pace * (used[1, 0, c] - running_var[c])
    move_state(method, memory, weight, numbers, own, used)


# --- backward ---------------------------------------------------------------


@inlined
def _backward_planes(
    part,
    parts,
    dy,
    x,
    dx,
    y,
    g_added,
    starts,
    weight,
    relu,
    used,
    centers,
    sums,
    on,
    eps,
    method,
    memory,
    numbers,
    wanted,
):
    """Sums and gradient of some columns, each while it is in cache."""
    groups, columns = used.shape[1], used.shape[2]
    width, values, found = x.shape[1] // columns, numbers.copy(), np.empty(RESULTS)
    begin, end = groups * columns * part // parts, groups * columns * (part + 1) // parts
    for g in range(groups):
        first, last = starts[g], starts[g + 1]
        count = (last - first) * x.shape[2] * width
        for k in range(max(begin - g * columns, 0), min(end - g * columns, columns)):
            center = centers[g, k]
            for c in range(k * width, (k + 1) * width):
                if relu:
                    total, product = plane_masked_sums(dy, y, x, g_added, c, first, last, center)
                else:
                    total, product = plane_sums(dy, x, c, first, last, center)
                sums[0, g, c], sums[1, g, c] = total, product
            state = (method, memory, weight, values, found)
            flow(*state, sums, used, weight, on, eps, g, k, width, count)
            if wanted:
                for c in range(k * width, (k + 1) * width):
                    on_dy, on_x, constant = on[0, g, c], on[1, g, c], on[2, g, c]
                    if relu and g_added.shape[0] == 0:
                        plane_masked_gradient(
                            dy, y, x, dx, c, first, last, center, on_dy, on_x, constant
                        )
                    else:
                        above = g_added if relu else dy
                        plane_gradient(above, x, dx, c, first, last, center, on_dy, on_x, constant)


@inlined
def _backward_group(
    g,
    parts,
    dy,
    x,
    dx,
    y,
    g_added,
    starts,
    layout,
    weight,
    relu,
    used,
    centers,
    sums,
    on,
    eps,
    method,
    memory,
    numbers,
    wanted,
):
    """Sums and gradient of a group of examples."""
    period, inner, example = layout
    first, last = starts[g] * example, starts[g + 1] * example
    channels, columns = sums.shape[2], used.shape[2]
    width = channels // columns
    center = np.empty((period // (channels * inner), channels, inner), weight.dtype)
    for c in range(channels):
        center[:, c] = centers[g, c // width]
    partial = np.zeros((parts, 2, period))
    middle = center.reshape(-1)
    if relu and g_added.shape[0] == 0:
        fork(row_masked_sums, parts, (dy, y, x, first, last, middle, partial))
    elif relu:
        fork(row_kept_sums, parts, (dy, y, x, g_added, first, last, middle, partial))
    else:
        fork(row_sums, parts, (dy, x, first, last, middle, partial))
    total = channel_sums(partial, center.shape)
    for c in range(channels):
        rounded = np.float64(center[0, c, 0]) - centers[g, c // width]
        sums[0, g, c], sums[1, g, c] = total[0, c], total[1, c] + rounded * total[0, c]
    values, found, count = numbers.copy(), np.empty(RESULTS), (last - first) // columns
    for k in range(columns):
        state = (method, memory, weight, values, found)
        flow(*state, sums, used, weight, on, eps, g, k, width, count)
    if wanted:
        table = np.empty((3, *center.shape), weight.dtype)
        for kind in range(3):
            for c in range(channels):
                table[kind, :, c] = on[kind, g, c]
        rows = table.reshape(3, -1)
        if relu and g_added.shape[0] == 0:
            fork(row_masked_gradient, parts, (dy, y, x, dx, first, last, middle, rows))
        else:
            above = g_added if relu else dy
            fork(row_gradient, parts, (above, x, dx, first, last, middle, rows))


@inlined
def _backward_groups(
    part,
    parts,
    dy,
    x,
    dx,
    y,
    g_added,
    starts,
    layout,
    weight,
    relu,
    used,
    centers,
    sums,
    on,
    eps,
    method,
    memory,
    numbers,
    wanted,
):
    """Some groups of examples, each by one thread."""
    groups = starts.shape[0] - 1
    rest = (used, centers, sums, on, eps, method, memory, numbers, wanted)
    for g in range(groups * part // parts, groups * (part + 1) // parts):
        _backward_group(g, 1, dy, x, dx, y, g_added, starts, layout, weight, relu, *rest)


@jit
def backward(
    method,
    kept,
    like,
    dy,
    x,
    dx,
    shape,
    last,
    starts,
    weight,
    dw,
    db,
    wanted,
    parts,
    relu,
    y,
    g_added,
    used,
    memory,
    settings,
    pace,
    eps,
    update,
):
    """Gradients of `forward`.

    Args:
        method: Where it is described, see `anybatch.backends.numba.bound_rules`.
        kept: An empty array of the type of parameters and state.
        like: One of the type of activations.
        dy: Gradient of the output.
        x: Input.
        dx: Takes the gradient of the input.
        shape: Of the three.
        last: Whether channels are.
        starts: Where groups of examples begin, and the end.
        weight: Scale.
        dw: Takes the gradient of the scale.
        db: Takes the gradient of the shift.
        wanted: Whether to write `dx`.
        parts: Threads.
        relu: Whether a ReLU followed.
        y: Its output; 0 without one.
        g_added: Takes the gradient of what was added before it; 0 where none is wanted.
        used: Statistics that it was normalized by.
        memory: The state of the method's averages, see `anybatch.backends.numba.rules`.
        settings: Its numbers.
        pace: Weight of the newest in exponential averages.
        eps: Added to the variance.
        update: Whether averages may change.
    """
    groups, channels = used.shape[1], shape[2] if last else shape[1]
    dy, x, dx = array_at(dy, shape, like), array_at(x, shape, like), array_at(dx, shape, like)
    y, g_added = activation_at(y, shape, like), activation_at(g_added, shape, like)
    weight = array_at(weight, channels, kept)
    dw, db = array_at(dw, channels, kept), array_at(db, channels, kept)
    method = numbers_at(method, LENGTH)
    sums, on = np.empty((2, groups, channels)), np.empty((3, groups, channels))
    numbers = _arguments(method, memory, settings, pace, eps)
    centers = used[max(method[CENTER], 0)]  # of the groups' own variances
    rest = (weight, relu, used, centers, sums, on, eps, method, memory, numbers, wanted)
    if not in_rows(x, last):
        fork(_backward_planes, parts, (dy, x, dx, y, g_added, starts, *rest))
    else:
        flat = (dy.reshape(-1), x.reshape(-1), dx.reshape(-1), y.reshape(-1), g_added.reshape(-1))
        some = (*flat, starts, row_layout(x, last, starts), *rest)
        if groups >= parts:
            fork(_backward_groups, parts, some)
        else:
            for g in range(groups):
                _backward_group(g, parts, *some)
    for c in range(channels):
        first = second = 0.0
        for g in range(groups):
            first += sums[0, g, c]
            second += sums[1, g, c]
        db[c], dw[c] = first, second
    if update and method[RULE] != 0:
        values, psi = x.size // channels, np.empty(channels)
        for c in range(channels):
            d = given(used, method[D], 0, c, 0.0)
            psi[c] = weight[c] * (sums[1, 0, c] - d * sums[0, 0, c]) / values
        move_average(method, memory, weight, numbers, np.empty(RESULTS), psi)
