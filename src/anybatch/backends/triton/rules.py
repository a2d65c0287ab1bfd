# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The rules of the methods on a block of channels, and what they remember.

Programs run side by side and in any order. Each owns the memory of its channels: it reads all of it
first, and writes after a barrier. A counter is read by every program, so the last one to arrive
writes it: `arrivals` is a number on the device that is zero between launches.
"""

import triton
import triton.language as tl

from anybatch.backends import kinds
from anybatch.backends.triton.tiles import pool

_PLAIN: tl.constexpr = tl.constexpr(kinds.PLAIN)
_RENORM: tl.constexpr = tl.constexpr(kinds.RENORM)
_MOMENTUM: tl.constexpr = tl.constexpr(kinds.MOMENTUM)
_WINDOW: tl.constexpr = tl.constexpr(kinds.WINDOW)
_SMA: tl.constexpr = tl.constexpr(kinds.SMA)
_EMA: tl.constexpr = tl.constexpr(kinds.EMA)
_BAD: tl.constexpr = tl.constexpr(2**32)  # what a channel that may not be kept adds to arrivals


@triton.jit
def number(value, rest, ACC: tl.constexpr):
    """A number that came as two of float32, which hold what float64 needs."""
    return tl.zeros((1,), ACC) + value + rest


@triton.jit
def finite(value):
    """Where a number is neither infinite nor NaN."""
    return tl.abs(value) < float("inf")


# --- windows ----------------------------------------------------------------


@triton.jit
def earlier(window, c, inside, channels, rows, BLOCK_W: tl.constexpr):
    """The rows of a window, and of those that stay their sum and whether the oldest is filled."""
    row = tl.arange(0, BLOCK_W)[:, None]
    stays = inside[None, :] & (row >= 1) & (row < rows)
    table = tl.load(window + row * channels + c[None, :], mask=stays, other=0.0)
    oldest = tl.sum(tl.where(row == 1, table, 0.0), 0)
    return table, tl.sum(table, 0), (oldest != 0) | (rows < 2)


@triton.jit
def push(window, table, new, c, kept, channels, rows, BLOCK_W: tl.constexpr):
    """Let a window go a step on, where the new one may be kept."""
    row = tl.arange(0, BLOCK_W)[:, None]
    moves = kept[None, :] & (row >= 1) & (row < rows)
    tl.store(window + (row - 1) * channels + c[None, :], table, mask=moves)
    tl.store(window + (rows - 1) * channels + c, new, mask=kept)


@triton.jit
def arrive(arrivals, bad):
    """Whether this program is the last one, and how many channels of all were bad."""
    tl.debug_barrier()  # all threads have read the counters
    ticket = tl.atomic_add(arrivals, bad.to(tl.int64) * _BAD + 1, sem="acq_rel")
    last = ticket % _BAD == tl.num_programs(0) - 1
    tl.store(arrivals, ticket * 0, mask=last)
    return last, ticket // _BAD + bad


# --- forward ----------------------------------------------------------------


@triton.jit
def recall(
    c,
    inside,
    channels,
    running_mean,
    running_var,
    old_mean,
    old_var,
    window,
    counter,
    keep,
    window_rows,
    KIND: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    """What a rule reads: two rows, the window, the step, and the weight of old averages."""
    mean = (c * 0).to(ACC)
    var = mean
    table = mean
    sums = mean
    filled = inside
    now = tl.zeros((1,), tl.int64)
    weight = tl.zeros((1,), ACC)
    if KIND == _RENORM:
        mean = tl.load(running_mean + c, mask=inside, other=0.0)
        var = tl.load(running_var + c, mask=inside, other=1.0)
    elif KIND == _MOMENTUM:
        mean = tl.load(old_mean + c, mask=inside, other=0.0)
        var = tl.load(old_var + c, mask=inside, other=0.0)
        weight += tl.where(tl.load(counter) > 0, tl.load(keep), 0.0)
    elif KIND == _WINDOW:
        var = tl.load(running_var + c, mask=inside, other=1.0)
        if BLOCK_W > 0:
            table, sums, filled = earlier(window, c, inside, channels, window_rows, BLOCK_W)
    if KIND != _PLAIN:
        now += tl.load(counter) + 1
    return mean, var, table, sums, filled, now, weight


@triton.jit
def choose(
    mean,
    var,
    old_mean,
    old_var,
    sums,
    filled,
    now,
    weight,
    eps,
    first,
    second,
    window_rows,
    warmup,
    renorm_warmup,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Decide how a column is normalized: mean, variance, and the two rows of a method."""
    third = tl.zeros_like(mean)
    fourth = third
    if KIND == _RENORM:
        if SMOOTH:
            opened = tl.minimum(now.to(mean.dtype) / warmup, 1.0)
        else:
            opened = (now > warmup).to(mean.dtype)
        max_r = 1 + opened * (first - 1)
        max_d = opened * second
        sigma = tl.sqrt(old_var + eps)
        third = tl.minimum(tl.maximum(tl.sqrt(var + eps) / sigma, 1 / max_r), max_r)
        fourth = tl.minimum(tl.maximum((mean - old_mean) / sigma, -max_d), max_d)
    elif KIND == _MOMENTUM:  # momentum-bn eq. 8
        third = mean
        fourth += 1 - weight
        mean += weight * (old_mean - mean)
        var += weight * (old_var - var)
    elif KIND == _WINDOW:
        warming = now < tl.maximum(window_rows + 1, warmup)
        if BLOCK_W > 0:  # without its oldest step a window is no average yet
            var = tl.where(warming | (filled == 0), var, (var + sums) / window_rows)
        limited = (now > tl.maximum(renorm_warmup, warmup)) & (first > 0)
        ratio = tl.sqrt((var + eps) / (old_var + eps))  # moving-average-bn eq. 19
        most = tl.maximum(first, 1.0)
        ratio = tl.minimum(tl.maximum(ratio, 1 / most), most)
        third = tl.where(limited, ratio, 1.0)
        fourth += warming.to(mean.dtype)
    return mean, var, third, fourth


@triton.jit
def factors(mean, var, third, fourth, weight, bias, eps, KIND: tl.constexpr):
    """Scale and shift of ``(x - mean) * scale + shift``."""
    scale = weight / tl.sqrt(var + eps)
    shift = bias
    if KIND == _RENORM:
        scale *= third
        shift += weight * fourth
    elif KIND == _WINDOW:
        scale *= third
    return scale, shift


@triton.jit
def track(c, inside, mean, var, pace, running_mean, running_var, MEAN: tl.constexpr):
    """Move running statistics towards finite ones."""
    kept = inside & finite(var)
    old = tl.load(running_var + c, mask=kept, other=0.0)
    tl.store(running_var + c, old + pace * (var - old), mask=kept)
    if MEAN:
        old = tl.load(running_mean + c, mask=kept, other=0.0)
        tl.store(running_mean + c, old + pace * (mean - old), mask=kept)


@triton.jit
def remember(
    c,
    inside,
    channels,
    mean,
    var,
    rows,
    used_mean,
    used_var,
    table,
    now,
    pace,
    running_mean,
    running_var,
    tracked,
    old_mean,
    old_var,
    window,
    counter,
    arrivals,
    window_rows,
    KIND: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Keep a batch's statistics: its own mean and variance, of so many rows, and those used."""
    tl.debug_barrier()  # all threads have read what changes now
    batches = tl.load(tracked) + 1
    if CUMULATIVE:
        pace = 1 / (pace * 0 + batches)
    whole = tl.zeros_like(mean) == 0
    if KIND == _WINDOW:
        track(c, inside, used_mean, used_var, pace, running_mean, running_var, False)
        if BLOCK_W > 0:
            kept = inside & finite(var)
            push(window, table, var, c, kept, channels, window_rows, BLOCK_W)
    else:
        bessel = tl.full((1,), 1.0, mean.dtype) * rows / tl.maximum(rows - 1, 1)
        track(c, inside, mean, var * bessel, pace, running_mean, running_var, True)
        if KIND == _MOMENTUM:
            whole = finite(used_var)
            tl.store(old_mean + c, used_mean, mask=inside & whole)
            tl.store(old_var + c, used_var, mask=inside & whole)
    if KIND != _PLAIN or CUMULATIVE:
        last, bad = arrive(arrivals, tl.sum((inside & (whole == 0)).to(tl.int32), 0))
        if KIND != _PLAIN:
            tl.store(counter, tl.sum(now, 0) - (bad > 0).to(tl.int64), mask=last)
    else:
        last = tl.program_id(0) == 0
    tl.store(tracked, batches, mask=last)


# --- backward ---------------------------------------------------------------


@triton.jit
def flow(
    sum_dy,
    sum_dyx,
    lane,
    weight,
    mean,
    var,
    third,
    fourth,
    count,
    eps,
    sums,
    steps,
    old_psi,
    old,
    KIND: tl.constexpr,
    AVERAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """From the two sums: the scale's gradient, Psi of the batch, and the factors of dx."""
    inverse = 1 / tl.sqrt(var + eps)
    if KIND == _MOMENTUM:  # sums are about the batch's own mean
        sum_dyx += (third - mean) * sum_dy
    product = sum_dyx * inverse
    slope = weight
    dw = product
    if KIND == _RENORM:
        dw = third * product + fourth * sum_dy
        slope = weight * third
    elif KIND == _WINDOW:
        dw = third * product
        slope = weight * third
    psi = pool(slope * product, lane, WIDTH, SPAN) / count
    used = psi
    if AVERAGES == _SMA:  # moving-average-bn eq. 13
        used = tl.where(fourth > 0, psi, (psi + sums) / steps)
    elif AVERAGES == _EMA:
        used = tl.where(fourth > 0, psi, psi + old * (old_psi - psi))
    share = tl.full((1,), 1.0, psi.dtype)
    if KIND == _MOMENTUM:
        share = fourth
    on_x = -share * used * inverse * inverse
    constant = tl.zeros_like(on_x)
    if KIND != _WINDOW:
        constant = -share * inverse * pool(slope * sum_dy, lane, WIDTH, SPAN) / count
    return dw, psi, slope * inverse, on_x, constant
