# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The rules of the methods, a column of statistics at a time, and what they remember.

``own`` ``(2, G, C)`` holds the mean and variance of each group of examples and channel; ``applied``
``(rows, G, K)`` mean and variance to normalize by, and what else a rule gives. A column is a
channel, or a group of ``C / K`` channels. While columns are decided on, side by side in threads,
state is only read; it moves afterwards.

A `method` is described by `anybatch.backends.numba.bound_rules.described`. Its `memory` is
addresses: the running statistics, rows, windows, counters, and between these the windows' lengths.
"""

import math

import numpy as np

from anybatch.backends.numba.arrays import array_at, counter_at, row_or_none
from anybatch.backends.numba.bound_rules import (
    BATCH_WEIGHT,
    CENTER,
    CENTERED,
    COMPLETE,
    HAS_COUNTERS,
    HAS_ROWS,
    HAS_WINDOWS,
    RULE,
    TAKES,
    USE_BATCH_STATS,
    WEIGHTS,
    WINDOW_TAKES,
    D,
    R,
    run_rule,
)
from anybatch.backends.numba.compile import inlined
from anybatch.backends.rule import (
    APPLIED_MEAN,
    BATCH_MEAN,
    BATCH_VAR,
    COUNTER,
    COUNTERS,
    FULL,
    NUMBERS,
    OPTIONS,
    PATIENCE,
    ROW,
    ROWS,
    WINDOW,
    WINDOWS,
)

IN_WINDOWS = 2 + ROWS  # places in a memory
IN_LENGTHS = IN_WINDOWS + WINDOWS
IN_COUNTERS = IN_LENGTHS + WINDOWS
MEMORY = IN_COUNTERS + COUNTERS
SETTINGS = NUMBERS + OPTIONS

# --- a rule -----------------------------------------------------------------


@inlined
def row_at(address, k, like):
    """A number of a row of state."""
    return np.float64(array_at(address, k + 1, like)[k])


@inlined
def read_state(method, memory, like, values, k, channels):
    """Write what a rule reads of the state of a column beside its first two arguments."""
    for i in range(method[HAS_ROWS]):
        values[ROW + i] = row_at(memory[2 + i], k, like)
    for i in range(method[HAS_WINDOWS]):
        length = memory[IN_LENGTHS + i]
        window = array_at(memory[IN_WINDOWS + i], (length, channels), like)
        total = values[0] if method[WINDOW_TAKES + i] == BATCH_MEAN else values[1]
        for step in range(1, length):
            total += window[step, k]
        values[WINDOW + i] = total / min(values[COUNTER], length)
        # The oldest place is empty where a step was not finite: no average yet.
        values[FULL + i] = 1.0 if length < 2 or window[1, k] != 0 else 0.0


@inlined
def count_steps(method, memory, values):
    """Write the number of this step beside a rule's arguments, as each counter has it."""
    for i in range(method[HAS_COUNTERS]):
        values[COUNTER + i] = counter_at(memory[IN_COUNTERS + i])[()] + 1


@inlined
def step_at(step, width, like):
    """Values seen so far in an optimizer step, and their mean and variance if there are any."""
    done, steps, seen, mean, var = step
    before = 0.0
    if done != 0:
        number = counter_at(done)[()]
        begins = number % steps == 0 if steps > 0 else number == 0
        before = 0.0 if begins else np.float64(array_at(seen, 1, like)[0])
    some = before > 0
    rows = (
        row_or_none(mean if some else 0, width, like),
        row_or_none(var if some else 0, width, like),
    )
    return before, rows


@inlined
def keep_step(step, before, count, means, variances, like):
    """Store the pooled statistics of an optimizer step after a micro-batch, if they are finite."""
    _, _, seen, mean, var = step
    width, finite = variances.shape[0], True
    seen, mean, var = (
        array_at(seen, 1, like),
        row_or_none(mean, width, like),
        row_or_none(var, width, like),
    )
    for c in range(width):
        finite = finite and fits(variances[c], var)
    seen[0] = before + count if finite else before
    if finite:
        for c in range(width):
            var[c] = variances[c]
        for c in range(means.shape[0]):
            mean[c] = means[c]


@inlined
def join(own, g, c, earlier, share):
    """Pool a channel's mean and variance with those of earlier micro-batches, if there are any."""
    old_mean, old_var = earlier
    if old_mean.shape[0] > 0:
        old, apart = np.float64(old_var[c]), own[0, g, c] - old_mean[c]
        own[0, g, c] = old_mean[c] + share * apart
        own[1, g, c] = old + share * (own[1, g, c] - old) + share * (1 - share) * apart * apart


@inlined
def is_outlier(method, own, g, c, mean, var, guard):
    """True if a channel's variance about its running mean exceeds the limit of `guard`."""
    limit, _, eps = guard
    apart = own[0, g, c] - mean if method[CENTERED] != 0 else 0.0
    return own[1, g, c] + apart * apart > (var + eps) * limit


@inlined
def choose(method, memory, like, values, found, own, applied, g, k, width, guard):
    """Decide how a column, of so many channels, is normalized.

    `values` holds the rule's arguments, those of the layer already; `found` takes its results.
    Of a column with an outlier the batch's own statistics are used, see `anybatch.core.outliers`.
    """
    mean, var = own[0, g, k], own[1, g, k]
    if width > 1:
        mean = var = 0.0
        for c in range(k * width, (k + 1) * width):
            mean += own[0, g, c] / width
        for c in range(k * width, (k + 1) * width):
            apart = own[0, g, c] - mean
            var += (own[1, g, c] + apart * apart) / width
    applied[0, g, k], applied[1, g, k] = mean, var
    if method[RULE] == 0:
        return
    values[0], values[1] = mean, var
    values[2], values[3] = row_at(memory[0], k, like), row_at(memory[1], k, like)
    read_state(method, memory, like, values, k, own.shape[2])
    run_rule(method[RULE], values, found)
    for c in range(k * width, (k + 1) * width):
        old_mean, old_var = row_at(memory[0], c, like), row_at(memory[1], c, like)
        if is_outlier(method, own, g, c, old_mean, old_var, guard) and guard[1][c] < PATIENCE:
            found[0], found[1], found[2], found[3], found[4] = mean, var, 1.0, 0.0, 1.0
    applied[0, g, k], applied[1, g, k] = found[0], found[1]
    if method[R] > 0:
        applied[method[R], g, k] = found[2]
    if method[D] > 0:
        applied[method[D], g, k] = found[3]
    if method[BATCH_WEIGHT] > 0:
        applied[method[CENTER], g, k], applied[method[BATCH_WEIGHT], g, k] = mean, found[4]
    if method[USE_BATCH_STATS] > 0:
        applied[method[USE_BATCH_STATS], g, k] = found[5]


@inlined
def given(applied, row, g, k, otherwise):
    """The value of a column in a row of the table that a rule gave; below 0 for no row."""
    return applied[row, g, k] if row > 0 else otherwise


@inlined
def factors(method, applied, g, k, c, weight, bias, eps):
    """Mean, scale and shift of a channel of a column."""
    scale, shift = np.float64(weight[c]), np.float64(bias[c])
    shift += scale * given(applied, method[D], g, k, 0.0)
    scale *= given(applied, method[R], g, k, 1.0)
    return applied[0, g, k], scale / math.sqrt(applied[1, g, k] + eps), shift


# --- backward ---------------------------------------------------------------


@inlined
def flow(method, memory, like, values, found, sums, applied, weight, on, eps, g, k, width, scope):
    """From the two sums of a column's channels: their gradients, and the factors of dx.

    `sums` ``(2, G, C)`` become the gradients of bias and weight; `on` ``(3, G, C)`` takes the
    factors of dy and x, and the constant. `psis` ``(G, K)`` takes mean(g z), before its average
    over steps.
    """
    _, counts, psis, earlier, step_share = scope
    inverse = 1 / math.sqrt(applied[1, g, k] + eps)
    r, d = given(applied, method[R], g, k, 1.0), given(applied, method[D], g, k, 0.0)
    batch_weight = given(applied, method[BATCH_WEIGHT], g, k, 1.0)
    apart = given(applied, method[CENTER], g, k, applied[0, g, k]) - applied[0, g, k]
    count, mean_g, psi = counts[g] * width, 0.0, 0.0
    for c in range(k * width, (k + 1) * width):
        sum_dy = sums[0, g, c]
        sum_dyz = (sums[1, g, c] + apart * sum_dy) * inverse
        sums[1, g, c] = r * sum_dyz + d * sum_dy
        mean_g += weight[c] * r * sum_dy
        psi += weight[c] * r * sum_dyz
        on[0, g, c] = weight[c] * r * inverse
    mean_g, psi = mean_g / count, psi / count
    if earlier.shape[0] > 0:
        psi = earlier[k] + step_share * (psi - earlier[k])
    psis[g, k] = psi
    if method[RULE] != 0 and given(applied, method[USE_BATCH_STATS], g, k, 0.0) == 0:
        psi = averaged(method, memory, like, values, found, psi, k, weight.shape[0])
    centered = method[CENTERED] != 0
    for c in range(k * width, (k + 1) * width):
        on[1, g, c] = -batch_weight * psi * inverse * inverse
        on[2, g, c] = -batch_weight * mean_g * inverse if centered else 0.0


@inlined
def averaged(method, memory, like, values, found, psi, k, channels):
    """The backward rule's average in place of mean(g z) of a column."""
    values[1] = psi
    read_state(method, memory, like, values, k, channels)
    run_rule(method[RULE], values, found)
    return found[0]


# --- how a method's state moves ---------------------------------------------


@inlined
def enters(value, own_var, state, guarded):
    """True if a channel enters the state: finite there and, `guarded`, not barred before."""
    return fits(value, state) and not (guarded and math.isnan(own_var))


@inlined
def bar_outliers(method, own, running_mean, running_var, guard):
    """Replace the variance of outliers by nan, which no state takes, and count them.

    The variance before it is in the third row of `own` then.
    """
    seen = guard[1]
    for c in range(seen.shape[0]):
        mean, var, out = np.float64(running_mean[c]), np.float64(running_var[c]), True
        for g in range(own.shape[1]):
            far = is_outlier(method, own, g, c, mean, var, guard)
            out, own[2, g, c] = out and far, own[1, g, c]
            if far and seen[c] < PATIENCE:
                own[1, g, c] = np.nan
        seen[c] = seen[c] + 1 if out else 0


@inlined
def move_state(method, memory, like, values, own, applied, guarded):
    """Take in a step, where its variance is finite: one group, a column a channel."""
    channels, complete = own.shape[2], True
    for i in range(method[HAS_ROWS]):
        take, weight = method[TAKES + i], method[WEIGHTS + i]
        table = own if take <= BATCH_VAR else applied
        source = 0 if take in (BATCH_MEAN, APPLIED_MEAN) else 1
        row = array_at(memory[2 + i], channels, like)
        speed = 1.0 if weight < 0 or values[COUNTER] == 1 else values[weight]
        for c in range(channels):
            if enters(table[1, 0, c], own[1, 0, c], row, guarded):
                if speed == 1:
                    row[c] = table[source, 0, c]
                else:
                    row[c] += speed * (table[source, 0, c] - row[c])
            else:
                complete = False
    for i in range(method[HAS_WINDOWS]):
        window = array_at(memory[IN_WINDOWS + i], (memory[IN_LENGTHS + i], channels), like)
        take = method[WINDOW_TAKES + i]
        table = own if take <= BATCH_VAR else applied
        source = 0 if take in (BATCH_MEAN, APPLIED_MEAN) else 1
        gate = own[1, 0] if guarded else table[1, 0]
        push(window, table[source, 0], gate)
    count_whole(method, memory, complete)


@inlined
def count_whole(method, memory, complete):
    """Count a step, where a counter counts it."""
    for i in range(method[HAS_COUNTERS]):
        if complete or method[COMPLETE + i] == 0:
            counter_at(memory[IN_COUNTERS + i])[()] += 1


@inlined
def move_average(method, memory, like, values, found, psi):
    """Take in mean(g z) of a step, where it is finite."""
    channels = psi.shape[0]
    for i in range(method[HAS_ROWS]):
        row = array_at(memory[2 + i], channels, like)
        for c in range(channels):
            if fits(psi[c], row):
                row[c] = averaged(method, memory, like, values, found, psi[c], c, channels)
    for i in range(method[HAS_WINDOWS]):
        window = array_at(memory[IN_WINDOWS + i], (memory[IN_LENGTHS + i], channels), like)
        push(window, psi, psi)
    count_whole(method, memory, True)


@inlined
def push(window, new, gate):
    """Push a step into a window where its gate is finite."""
    for k in range(window.shape[0] - 1):
        for c in range(new.shape[0]):
            if fits(gate[c], window):
                window[k, c] = window[k + 1, c]
    for c in range(new.shape[0]):
        if fits(gate[c], window):
            window[window.shape[0] - 1, c] = new[c]


# --- what is remembered -----------------------------------------------------


@inlined
def fits(value, state):
    """Whether a number is finite in the type of the state that is to hold it.

    ``math.isfinite`` is compiled to ``x - x == 0``; of an x that is itself a sum, reordering leaves
    0 of it.
    """
    return abs(state.dtype.type(value)) < np.inf


@inlined
def unbiased(var, count):
    """Bessel's correction."""
    return var * count / (count - 1) if count > 1 else var


@inlined
def count_batch(tracked, update_weight):
    """Count a batch; its weight in the running statistics, see `NormCall`."""
    tracked[()] += 1
    return newest_weight(update_weight, tracked[()])


@inlined
def newest_weight(update_weight, batches):
    """The weight of the newest of so many batches."""
    if update_weight >= 0:
        return update_weight
    start = np.floor(-update_weight)
    return max(-update_weight - start, start / (batches - 1 + start))


@inlined
def track(c, mean, var, update_weight, running_mean, running_var):
    """Move running statistics towards finite ones."""
    if fits(var, running_var):
        running_mean[c] += update_weight * (mean - running_mean[c])
        running_var[c] += update_weight * (var - running_var[c])


@inlined
def track_groups(own, counts, update_weight, running_mean, running_var, tracked):
    """Track groups of examples, each weighing by its values; those of one value count not."""
    total = 0.0
    for g in range(counts.shape[0]):
        total += counts[g] if counts[g] > 1 else 0.0
    if total == 0:
        return
    update_weight = count_batch(tracked, update_weight)
    pooled = np.zeros((2, running_mean.shape[0]))
    for g in range(counts.shape[0]):
        if counts[g] > 1:
            share = counts[g] / total
            of_var = unbiased(share, counts[g])
            for c in range(running_mean.shape[0]):
                pooled[0, c] += own[0, g, c] * share
                pooled[1, c] += own[1, g, c] * of_var
    for c in range(running_mean.shape[0]):
        track(c, pooled[0, c], pooled[1, c], update_weight, running_mean, running_var)
