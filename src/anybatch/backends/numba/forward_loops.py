# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The forward pass of a whole layer in one compiled call: passes, rule and state.

Tensors are given by their addresses (`anybatch.backends.numba.arrays`). Activations ``x``, ``y``,
``dy`` and ``dx`` are ``(N, C, L)``, or ``(N, L, C)`` where channels are `last`. Groups of examples
begin at ``starts``. One function serves all methods, so that one is compiled.
"""

import numpy as np

from anybatch.backends.numba.arrays import (
    activation_at,
    array_at,
    counter_at,
    numbers_at,
)
from anybatch.backends.numba.bound_rules import (
    CENTERED,
    LENGTH,
    RESULTS,
    RULE,
    TRACKS_USED,
)
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.passes import (
    channel_sums,
    in_rows,
    plane_moments,
    plane_write,
    row_layout,
    row_moments,
    row_write,
    settle,
)
from anybatch.backends.numba.passes_relu import (
    plane_activate,
    row_activate,
)
from anybatch.backends.numba.rules import (
    choose,
    count_batch,
    count_steps,
    factors,
    fits,
    move_state,
    track,
    track_groups,
    unbiased,
)
from anybatch.backends.numba.threads import fork
from anybatch.backends.rule import EPS, NUMBER, PLACES, UPDATE_WEIGHT


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
def arguments(method, memory, settings, pace, eps):
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
    numbers = arguments(method, memory, settings, pace, eps)
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
