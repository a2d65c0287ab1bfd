# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""A whole layer in one compiled call: passes, rule and state, forward and backward.

Tensors are given by their addresses (`anybatch.backends.numba.arrays`). Activations ``x``, ``y``,
``dy`` and ``dx`` are ``(N, C, L)``, or ``(N, L, C)`` where channels are `last`. Groups of examples
begin at ``starts``. One function serves all methods, so that one is compiled.
"""

import numpy as np

from anybatch.backends.kinds import BATCH, EMA, MOMENTUM, PLAIN, RENORM, SMA, WINDOW
from anybatch.backends.numba.arrays import LIKE, activation_at, array_at, counter_at, running_at
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
    factors,
    fits,
    flow,
    keep,
    track,
    track_groups,
    unbiased,
)
from anybatch.backends.numba.threads import fork, is_small, parts, without_threads

__all__ = [
    "BATCH",
    "LIKE",
    "MOMENTUM",
    "NONE",
    "NO_COUNT",
    "NO_SETTINGS",
    "PLAIN",
    "RENORM",
    "WINDOW",
    "backward",
    "empty_like",
    "forward",
    "is_small",
    "parts",
    "table",
    "without_threads",
]

table = np.empty  # room for statistics, of a shape
_ZERO = np.zeros((), np.int64)
NO_COUNT = _ZERO.ctypes.data  # of a method that counts nothing
NONE = (0, 0)  # a window without rows
NO_SETTINGS = (0.0, 0.0, 0.0, 0.0)


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
    rule,
    old_mean,
    old_var,
    window,
):
    """Statistics and output of some columns, each while it is in cache."""
    groups, columns = used.shape[1], used.shape[2]
    width, eps, centered = x.shape[1] // columns, rule[1], rule[0] != WINDOW
    begin, end = groups * columns * part // parts, groups * columns * (part + 1) // parts
    for g in range(groups):
        first, last = starts[g], starts[g + 1]
        for k in range(max(begin - g * columns, 0), min(end - g * columns, columns)):
            for c in range(k * width, (k + 1) * width):
                own[0, g, c], own[1, g, c] = plane_moments(x, c, first, last, centered)
            choose(rule, old_mean, old_var, window, own, used, g, k, width)
            for c in range(k * width, (k + 1) * width):
                mean, scale, shift = factors(used, g, k, c, weight, bias, eps)
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
    rule,
    old_mean,
    old_var,
    window,
):
    """Statistics and output of a group of examples."""
    period, inner, example = layout
    first, last = starts[g] * example, starts[g + 1] * example
    channels, eps, centered = own.shape[2], rule[1], rule[0] != WINDOW
    repeats = period // (channels * inner)
    shift = np.zeros((repeats, channels, inner), x.dtype)
    if centered:
        for c in range(channels):
            shift[:, c] = x[first + c * inner]
    sums = np.zeros((parts, 2, period))
    fork(row_moments, parts, (x, first, last, shift.reshape(-1), sums))
    count, total = (last - first) // channels, channel_sums(sums, shift.shape)
    for c in range(channels):
        away = np.float64(shift[0, c, 0])
        own[0, g, c], own[1, g, c] = settle(total[0, c], total[1, c], count, away, centered)
    on, width = np.empty((3, *shift.shape), x.dtype), channels // used.shape[2]
    for k in range(used.shape[2]):
        choose(rule, old_mean, old_var, window, own, used, g, k, width)
        for c in range(k * width, (k + 1) * width):
            mean, scale, constant = factors(used, g, k, c, weight, bias, eps)
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
    rule,
    old_mean,
    old_var,
    window,
):
    """Some groups of examples, each by one thread."""
    groups, rest = starts.shape[0] - 1, (own, used, rule, old_mean, old_var, window)
    for g in range(groups * part // parts, groups * (part + 1) // parts):
        _forward_group(g, 1, x, y, added, starts, layout, weight, bias, relu, *rest)


@jit
def forward(
    kind,
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
    running,
    memory,
    counter,
    settings,
    pace,
    eps,
    update,
):
    """Normalize a batch, and remember it if it is to `update`.

    Args:
        kind: How statistics are chosen.
        like: An empty array of the type of all tensors.
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
        own: Takes the groups' own statistics, ``(2, G, C)``; it may be `used`.
        used: Takes those to normalize by, ``(2 or 4, G, K)``.
        running: Running mean, running variance, batches tracked.
        memory: Mean and variance of the method, its window and how many rows that has.
        counter: Steps of the method's memory.
        settings: RENORM's (max_r, max_d, warm-up steps, smooth), MOMENTUM's weight of the old
            averages, WINDOW's (length, warm-up steps, renorm warm-up steps, clip or 0).
        pace: Weight of the new running statistics; below 0 for the mean of all.
        eps: Added to the variance.
        update: Whether state may change.

    Returns:
        MOMENTUM's weight of the old averages in what was used; for WINDOW, 1 where the statistics
        are the batch's own; else 0.
    """
    channels = shape[2] if last else shape[1]
    x, y, added = (
        array_at(x, shape, like),
        array_at(y, shape, like),
        activation_at(added, shape, like),
    )
    weight, bias = array_at(weight, channels, like), array_at(bias, channels, like)
    running_mean, running_var, tracked = running_at(running, channels, like)
    old_mean, old_var = array_at(memory[0], channels, like), array_at(memory[1], channels, like)
    window, counter = array_at(memory[2], (memory[3], channels), like), counter_at(counter)
    now = counter[()] + 1
    first = second = result = 0.0
    if kind == RENORM:
        if settings[3] > 0 and settings[2] > 0:
            opened = min(now / settings[2], 1.0)
        else:
            opened = 1.0 if now > settings[2] else 0.0
        first, second = 1 + opened * (settings[0] - 1), opened * settings[1]
    elif kind == MOMENTUM:
        first = result = settings[0] if counter[()] > 0 else 0.0
    elif kind == WINDOW:
        warming = now < max(settings[0] + 1, settings[1])
        first = 0.0 if warming or window.shape[0] == 0 else settings[0]
        second = settings[3] if now > max(settings[2], settings[1]) else 0.0
        result = 1.0 if warming else 0.0
    rule = (kind, eps, first, second)
    groups, values = used.shape[1], x.shape[1] if last else x.shape[2]
    rest = (weight, bias, relu, own, used, rule, old_mean, old_var, window)
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
        return result
    if kind == PLAIN:
        track_groups(own, starts, values, pace, running_mean, running_var, tracked)
        return result
    pace, count, whole = count_batch(tracked, pace), (starts[1] - starts[0]) * values, 1
    for c in range(running_mean.shape[0]):
        if kind == WINDOW:
            if fits(used[1, 0, c], running_var):  # the uncentred form has no mean
                running_var[c] += pace * (used[1, 0, c] - running_var[c])
        else:
            var = unbiased(own[1, 0, c], count)
            track(c, own[0, 0, c], var, pace, running_mean, running_var)
        if kind == MOMENTUM:
            if fits(used[1, 0, c], old_var):
                old_mean[c], old_var[c] = used[0, 0, c], used[1, 0, c]
            else:
                whole = 0
    if kind == WINDOW and window.shape[0] > 0:
        keep(window, own[1, 0])
    counter[()] += whole
    return result


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
    rule,
    memory,
    wanted,
):
    """Sums and gradient of some columns, each while it is in cache."""
    groups, columns = used.shape[1], used.shape[2]
    width = x.shape[1] // columns
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
            flow(rule, memory, sums, used, centers, weight, on, g, k, width, count)
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
    rule,
    memory,
    wanted,
):
    """Sums and gradient of a group of examples."""
    period, inner, example = layout
    first, last = starts[g] * example, starts[g + 1] * example
    channels, columns = sums.shape[2], used.shape[2]
    width = channels // columns
    center = np.empty((period // (channels * inner), channels, inner), x.dtype)
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
    for k in range(columns):
        flow(rule, memory, sums, used, centers, weight, on, g, k, width, (last - first) // columns)
    if wanted:
        table = np.empty((3, *center.shape), x.dtype)
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
    rule,
    memory,
    wanted,
):
    """Some groups of examples, each by one thread."""
    groups, rest = starts.shape[0] - 1, (used, centers, sums, on, rule, memory, wanted)
    for g in range(groups * part // parts, groups * (part + 1) // parts):
        _backward_group(g, 1, dy, x, dx, y, g_added, starts, layout, weight, relu, *rest)


@jit
def backward(
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
    centers,
    share,
    centered,
    eps,
    kind,
    memory,
    counter,
    old,
    own,
    update,
):
    """Gradients of `forward`.

    Args:
        like: An empty array of the type of all tensors.
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
        centers: Centres of the groups' own variances, ``(G, K)``.
        share: Part of the groups' own statistics in `used`.
        centered: Whether a mean was subtracted.
        eps: Added to the variance.
        kind: Which averages of Psi, BATCH for none.
        memory: A window of them, or an exponential average as a window of one, and its rows.
        counter: Steps in them.
        old: Weight of the old exponential average.
        own: Whether the batch's own Psi is used whatever is remembered.
        update: Whether averages may change.
    """
    groups, channels = used.shape[1], shape[2] if last else shape[1]
    dy, x, dx = array_at(dy, shape, like), array_at(x, shape, like), array_at(dx, shape, like)
    y, g_added = activation_at(y, shape, like), activation_at(g_added, shape, like)
    weight = array_at(weight, channels, like)
    dw, db = array_at(dw, channels, like), array_at(db, channels, like)
    memory, counter = array_at(memory[0], (memory[1], channels), like), counter_at(counter)
    sums, on = np.empty((2, groups, channels)), np.empty((3, groups, channels))
    steps = min(counter[()] + 1, memory.shape[0]) if kind == SMA and not own else 0
    old_weight = old if kind == EMA and not own and counter[()] > 0 else 0.0
    rule = (eps, share, centered, steps, old_weight)
    rest = (weight, relu, used, centers, sums, on, rule, memory, wanted)
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
    if update and kind != BATCH:
        values = x.size // channels
        psi = np.empty(channels)
        for c in range(channels):
            psi[c] = weight[c] * sums[1, 0, c] / values
        if kind == SMA:
            keep(memory, psi)
        else:
            weight_of_old = old if counter[()] > 0 else 0.0
            for c in range(channels):
                if fits(psi[c], memory):
                    memory[0, c] = psi[c] + weight_of_old * (memory[0, c] - psi[c])
        counter[()] += 1
