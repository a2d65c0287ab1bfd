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
    counts_at,
    cut_at,
    numbers_at,
    settings_at,
    valid_at,
)
from anybatch.backends.numba.bound_rules import CENTERED, LENGTH, RESULTS, RULE, TRACKS_APPLIED
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
    write_shifts,
)
from anybatch.backends.numba.passes_relu import plane_activate, row_activate
from anybatch.backends.numba.passes_valid import first_valid, plane_valid_moments, row_valid_moments
from anybatch.backends.numba.rules import (
    MEMORY,
    SETTINGS,
    bar_outliers,
    choose,
    count_batch,
    count_steps,
    enters,
    factors,
    join,
    keep_step,
    move_state,
    step_at,
    track,
    track_groups,
    unbiased,
)
from anybatch.backends.numba.threads import fork
from anybatch.backends.rule import EPS, NUMBER, PLACES, SETTLED, UPDATE_WEIGHT


@inlined
def _forward_planes(part, parts, x, y, added, starts, shared):
    """Statistics and output of some columns, each while it is in cache."""
    weight, bias, relu, own, applied, eps, method, memory, numbers, scope = shared
    groups, num_statistics = applied.shape[1], applied.shape[2]
    width, centered = x.shape[1] // num_statistics, method[CENTERED] != 0
    values, found = numbers.copy(), np.empty(RESULTS)
    valid, counts, earlier, share, guard = scope
    begin, end = (
        groups * num_statistics * part // parts,
        groups * num_statistics * (part + 1) // parts,
    )
    for g in range(groups):
        first, last = starts[g], starts[g + 1]
        start = first_valid(valid, first, last) if valid.shape[0] > 0 else 0
        for k in range(
            max(begin - g * num_statistics, 0), min(end - g * num_statistics, num_statistics)
        ):
            for c in range(k * width, (k + 1) * width):
                if valid.shape[0] > 0:
                    own[0, g, c], own[1, g, c] = plane_valid_moments(
                        x, valid, c, first, last, start, counts[g], centered
                    )
                else:
                    own[0, g, c], own[1, g, c] = plane_moments(x, c, first, last, centered)
                join(own, g, c, earlier, share)
            choose(method, memory, weight, values, found, own, applied, g, k, width, guard)
            for c in range(k * width, (k + 1) * width):
                mean, scale, shift = factors(method, applied, g, k, c, weight, bias, eps)
                if relu:
                    plane_activate(x, added, y, c, first, last, mean, scale, shift)
                else:
                    plane_write(x, y, c, first, last, mean, scale, shift)


@inlined
def row_own(g, parts, x, starts, layout, valid, counts, centered, like, own):
    """Write the statistics of a group of examples into `own`, from rows."""
    period, inner, example = layout
    first, last, channels = starts[g] * example, starts[g + 1] * example, own.shape[2]
    shift, start = np.zeros((period // (channels * inner), channels, inner), like.dtype), first
    of_positions = valid.reshape(-1)
    if valid.shape[0] > 0:
        start = first_valid(valid, starts[g], starts[g + 1]) * channels
    if centered:
        write_shifts(x, of_positions, start, last, shift)
    sums, flat = np.zeros((parts, 2, period)), shift.reshape(-1)
    if valid.shape[0] > 0:
        some = (x, of_positions, first, last, flat[:channels], sums)
        fork(row_valid_moments, parts, some)
    else:
        fork(row_moments, parts, (x, first, last, flat, sums))
    total = channel_sums(sums, shift.shape)
    for c in range(channels):
        one, two, away = total[0, c], total[1, c], np.float64(shift[0, c, 0])
        own[0, g, c], own[1, g, c] = settle(one, two, counts[g], away, centered)


@inlined
def _forward_groups(part, parts, within, x, y, added, starts, layout, shared):
    """Statistics and output of some groups of examples, each by one thread, or several `within`."""
    weight, bias, relu, own, applied, eps, method, memory, numbers, scope = shared
    period, inner, example = layout
    groups, channels, centered = own.shape[1], own.shape[2], method[CENTERED] != 0
    valid, counts, earlier, share, guard = scope
    repeats, width = period // (channels * inner), channels // applied.shape[2]
    on = np.empty((3, repeats, channels, inner), weight.dtype)
    rows, values, found = on.reshape(3, -1), numbers.copy(), np.empty(RESULTS)
    for g in range(groups * part // parts, groups * (part + 1) // parts):
        first, last = starts[g] * example, starts[g + 1] * example
        row_own(g, within, x, starts, layout, valid, counts, centered, weight, own)
        for c in range(channels):
            join(own, g, c, earlier, share)
        for k in range(applied.shape[2]):
            choose(method, memory, weight, values, found, own, applied, g, k, width, guard)
            for c in range(k * width, (k + 1) * width):
                mean, scale, constant = factors(method, applied, g, k, c, weight, bias, eps)
                on[0, :, c], on[1, :, c], on[2, :, c] = mean, scale, constant
        if relu:
            fork(row_activate, within, (x, added, y, first, last, rows))
        else:
            fork(row_write, within, (x, y, first, last, rows))


@inlined
def arguments(method, memory, settings, update_weight, eps):
    """The numbers that a rule reads of its layer, each in its place."""
    values = np.zeros(PLACES)
    count_steps(method, memory, values)
    values[EPS], values[UPDATE_WEIGHT] = eps, update_weight
    for i in range(SETTINGS):
        values[NUMBER + i] = settings[i]
    return values


@inlined
def _normalize(x, y, added, last, starts, parts, shared, update, tracked, update_weight, counts):
    """Normalize one normalization batch, and update the state if `update`.

    `counts` are the values behind statistics, those of earlier micro-batches included.
    """
    weight, _, _, own, applied, _, method, memory, numbers, narrowed = shared
    valid, _, _, _, guard = narrowed
    channels, groups, limited = weight.shape[0], applied.shape[1], guard[1].shape[0] > 0
    if not in_rows(x, last) or (valid.shape[0] > 0 and not last):
        fork(_forward_planes, parts, (x, y, added, starts, shared))
    else:
        flat = (x.reshape(-1), y.reshape(-1), added.reshape(-1))
        across, within = (parts, 1) if groups >= parts else (1, parts)
        some = (within, *flat, starts, row_layout(x, last, starts), shared)
        fork(_forward_groups, across, some)
    if not update:
        return
    running_mean = array_at(memory[0], channels, weight)
    running_var = array_at(memory[1], channels, weight)
    if limited:
        bar_outliers(method, own, running_mean, running_var, guard)
    if method[RULE] == 0:
        track_groups(own, counts, update_weight, running_mean, running_var, tracked)
        return
    update_weight = count_batch(tracked, update_weight)
    for c in range(channels):
        if method[TRACKS_APPLIED] == 0:
            var = unbiased(own[1, 0, c], counts[0])
            track(c, own[0, 0, c], var, update_weight, running_mean, running_var)
        elif not enters(applied[1, 0, c], own[1, 0, c], running_var, limited):
            continue
        else:
            if method[CENTERED] != 0:  # the uncentred form has no mean
                running_mean[c] += update_weight * (applied[0, 0, c] - running_mean[c])
            running_var[c] += update_weight * (applied[1, 0, c] - running_var[c])
    move_state(method, memory, weight, numbers, own, applied, limited)


@jit
def forward(
    method, kept, data, own, applied, tracked, memory, settings, update_weight, eps, update, scope
):
    """Normalize equal normalization batches in turn; state is updated after each.

    Args:
        method: Where it is described, see `anybatch.backends.numba.bound_rules`.
        kept: An empty array of the type of parameters and state.
        data: The first of them, see `ForwardData`.
        own: Takes the groups' own statistics, ``(B, 2, G, C)``; without a rule it may be `applied`.
        applied: Takes those to normalize by, ``(B, rows, G, K)``.
        tracked: Batches that running statistics have seen.
        memory: Where the state of the method is told, see `anybatch.backends.numba.rules`.
        settings: Where its numbers are.
        update_weight: Of the newest batch in running statistics, see `NormCall`.
        eps: Added to the variance.
        update: Whether state may change.
        scope: What contributes to the statistics, see `anybatch.backends.numba.scopes`.
    """
    like, cut, x, y, weight, bias, parts, relu, added = data
    shape, last, starts = cut_at(cut)
    channels, size = shape[2] if last else shape[1], shape[0] * shape[1] * shape[2] * like.itemsize
    method, tracked = numbers_at(method, LENGTH), counter_at(tracked)
    memory, settings = numbers_at(memory, MEMORY), settings_at(settings, SETTINGS)
    weight, bias = array_at(weight, channels, kept), array_at(bias, channels, kept)
    valid, given, step, outliers, limit = scope
    seen = numbers_at(outliers, channels if outliers != 0 else 0)
    counts = counts_at(given, starts, shape[1] if last else shape[2])
    for b in range(applied.shape[0]):
        at = b * size
        inputs, outputs = array_at(x + at, shape, like), array_at(y + at, shape, like)
        before_relu = activation_at(added + at if added != 0 else 0, shape, like)
        numbers = arguments(method, memory, settings, update_weight, eps)
        guard = (limit if tracked[()] >= SETTLED else np.inf, seen, eps)
        before, earlier = step_at(step, channels, kept)
        count = counts[0]
        share = count / (before + count)
        narrowed = (valid_at(valid, inputs, last), counts, earlier, share, guard)
        used = (own[b], applied[b], eps, method, memory, numbers, narrowed)
        shared = (weight, bias, relu, *used)
        behind = counts.copy()
        behind[0] += before
        how = (shared, update, tracked, update_weight, behind)
        _normalize(inputs, outputs, before_relu, last, starts, parts, *how)
        if step[0] != 0:
            keep_step(step, before, count, own[b, 0, 0], own[b, own.shape[1] - 1, 0], kept)
