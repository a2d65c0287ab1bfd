# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The rules of the methods on a block of channels, and what they remember.

Programs run side by side and in any order. Each owns the memory of its channels: it reads all of it
first, and writes after a barrier. A counter is read by every program, so the last one to arrive
writes it: `block_counter` is a number on the device that is zero between launches.

What state takes in is told by one number, MOVES, see `moves_of`.
"""

import triton
import triton.language as tl

from anybatch.backends import rule as places
from anybatch.backends.triton.tiles import pool

_BAD: tl.constexpr = tl.constexpr(2**32)  # what a channel that may not be kept adds to that
_BATCH_VAR: tl.constexpr = tl.constexpr(places.BATCH_VAR)
_BATCH_MEAN: tl.constexpr = tl.constexpr(places.BATCH_MEAN)
_APPLIED_MEAN: tl.constexpr = tl.constexpr(places.APPLIED_MEAN)


def moves_of(part: places.Part, numbers: int, tracks_applied: bool) -> int:
    """Encode as one number what the state of a method takes in.

    From the lowest bit on: rows (3 bits) and what each of four takes in (3 each), windows (2) and
    what each of two takes in (3 each), counters (2) and which of two count complete steps alone (1
    each), numbers (2), and whether running statistics take in what was used (1).
    """
    fields = [(len(part.rows), 3)]
    takes = [take for take, _ in part.rows]
    fields += [(take, 3) for take in (takes + [0] * places.ROWS)[: places.ROWS]]
    fields += [(len(part.windows), 2)]
    fields += [(take, 3) for take in (*part.windows, 0, 0)[: places.WINDOWS]]
    fields += [(len(part.counters), 2)]
    fields += [(int(one), 1) for one in (*part.counters, False, False)[: places.COUNTERS]]
    fields += [(numbers, 2), (int(tracks_applied), 1)]
    moves = at = 0
    for value, bits in fields:
        moves, at = moves | value << at, at + bits
    return moves


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
def arrive(block_counter, bad):
    """Whether this program is the last one, and how many channels of all were bad."""
    tl.debug_barrier()  # all threads have read the counters
    ticket = tl.atomic_add(block_counter, bad.to(tl.int64) * _BAD + 1, sem="acq_rel")
    last = ticket % _BAD == tl.num_programs(0) - 1
    tl.store(block_counter, ticket * 0, mask=last)
    return last, ticket // _BAD + bad


# --- forward ----------------------------------------------------------------


@triton.jit
def choose(
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15, v16, v17, v18, v19, v20,
    v21, v22, v23,
):  # fmt: skip
    """The batch's own statistics, where a method has no rule of its own."""
    return v0, v1, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0


@triton.jit
def average(
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15, v16, v17, v18, v19, v20,
    v21, v22, v23,
):  # fmt: skip
    """The batch's own backward statistics, where a method does not average them."""
    return v1


@triton.jit
def read_row(row, c, inside, READ: tl.constexpr, ACC: tl.constexpr):
    """A row of state; zeros if it is not to be read."""
    value = (c * 0).to(ACC)
    if READ:
        value = tl.load(row + c, mask=inside, other=0.0)
    return value


@triton.jit
def read_window(
    window, c, inside, channels, rows, READ: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr
):
    """A window's rows, the sum of those that stay, and whether the oldest is filled."""
    table = (c * 0).to(ACC)
    total = table
    full = inside
    if READ:
        table, total, full = earlier(window, c, inside, channels, rows, BLOCK_W)
    return table, total, full


@triton.jit
def read_counter(counter, READ: tl.constexpr):
    """The number of this step; 0 if it is not to be read."""
    now = tl.zeros((1,), tl.int64)
    if READ:
        now += tl.load(counter) + 1
    return now


@triton.jit
def read_number(place, READ: tl.constexpr, ACC: tl.constexpr):
    """A number on the device; 0 if it is not to be read."""
    value = tl.zeros((1,), ACC)
    if READ:
        value += tl.load(place)
    return value


@triton.jit
def taken(mean, var, applied_mean, applied_var, TAKE: tl.constexpr):
    """The value that state takes in, and the variance that must be finite for it."""
    if TAKE <= _BATCH_VAR:
        gate = var
        if TAKE == _BATCH_MEAN:
            value = mean
        else:
            value = var
    else:
        gate = applied_var
        if TAKE == _APPLIED_MEAN:
            value = applied_mean
        else:
            value = applied_var
    return value, gate


@triton.jit
def move_row(row, old, weight, now, c, inside, whole, value, gate):
    """Let a row take in a value where its gate is finite; where all rows did."""
    fits = finite(gate)
    speed = tl.where(now == 1, 1.0, weight)
    value = tl.where(speed == 1, value, old + speed * (value - old))
    tl.store(row + c, value, mask=inside & fits)
    return whole & fits


@triton.jit
def factors(mean, var, r, d, weight, bias, eps, USES: tl.constexpr):
    """Scale and shift of ``(x - mean) * scale + shift``."""
    scale = weight / tl.sqrt(var + eps)
    shift = bias
    if USES & 1:
        scale *= r
    if USES & 2:
        shift += weight * d
    return scale, shift


@triton.jit
def newest_weight(update_weight, batches, BEGIN: tl.constexpr):
    """The weight of the newest of so many batches, see `NormCall`."""
    if BEGIN:
        first = BEGIN / (update_weight * 0 + (batches - 1 + BEGIN))
        update_weight = tl.maximum(update_weight, first)
    return update_weight


@triton.jit
def track(c, inside, mean, var, update_weight, running_mean, running_var, MEAN: tl.constexpr):
    """Move running statistics towards finite ones."""
    kept = inside & finite(var)
    old = tl.load(running_var + c, mask=kept, other=0.0)
    tl.store(running_var + c, old + update_weight * (var - old), mask=kept)
    if MEAN:
        old = tl.load(running_mean + c, mask=kept, other=0.0)
        tl.store(running_mean + c, old + update_weight * (mean - old), mask=kept)


# --- backward ---------------------------------------------------------------


@triton.jit
def products(sum_dy, sum_dyx, weight, mean, var, r, d, center, eps, USES: tl.constexpr):
    """From the two sums: the scale's gradient, the factor of dy, mean(g z) of a channel times n."""
    inverse = 1 / tl.sqrt(var + eps)
    if USES & 4:  # sums are about the batch's own mean
        sum_dyx += (center - mean) * sum_dy
    product = sum_dyx * inverse
    slope = weight
    dw = product
    if USES & 1:
        dw = r * product
        slope = weight * r
    if USES & 2:
        dw = dw + d * sum_dy
    return dw, slope, slope * product, inverse


@triton.jit
def on_input(
    sum_dy,
    slope,
    psi,
    batch_weight,
    inverse,
    lane,
    count,
    USES: tl.constexpr,
    CENTERED: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The factor of x and the constant of dx."""
    part = tl.full((1,), 1.0, psi.dtype)
    if USES & 4:
        part = batch_weight
    on_x = -part * psi * inverse * inverse
    constant = tl.zeros_like(on_x)
    if CENTERED:
        constant = -part * inverse * pool(slope * sum_dy, lane, WIDTH, SPAN) / count
    return on_x, constant
