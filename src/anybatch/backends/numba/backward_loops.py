# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The backward pass of a whole layer in one compiled call; see `forward_loops`."""

import numpy as np

from anybatch.backends.numba.arrays import (
    activation_at,
    array_at,
    numbers_at,
)
from anybatch.backends.numba.bound_rules import (
    CENTER,
    LENGTH,
    RESULTS,
    RULE,
    D,
)
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
from anybatch.backends.numba.rules import (
    flow,
    given,
    move_average,
)
from anybatch.backends.numba.threads import fork


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
    numbers = arguments(method, memory, settings, pace, eps)
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
