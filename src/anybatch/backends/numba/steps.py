"""A layer's batch by its recipe: the loops' calls for its normalization batches, in tensors."""

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.numba import loops
from anybatch.backends.protocol import EMA, MOMENTUM, PLAIN, RENORM, WINDOW, Course


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    course: Course,
) -> tuple[Tensor, Tensor]:
    """Normalize a batch, and remember it.

    Args:
        x: Input, dense, channels first or last.
        weight: Scale.
        bias: Shift.
        running: Running mean, running variance, batches tracked.
        course: How.

    Returns:
        The output, and the statistics used, ``(rows, groups, K)`` of float64, see `Recipe`.
    """
    recipe, y = course.recipe, loops.empty_like(x)
    like, parts = loops.LIKE[x.dtype], loops.parts(x.numel())
    w, b, addresses = weight.data_ptr(), bias.data_ptr(), tuple(t.data_ptr() for t in running)
    memory, count = _memory(course, addresses)
    tables = []
    for first, shape, starts, groups in loops.steps_of(x, course.cut, course.last):
        places = [t.data_ptr() + first for t in (x, y)]
        data = (like, *places, shape, course.last, starts, w, b, parts, False, 0)
        rows = 4 if recipe.kind in (RENORM, WINDOW) else 2
        used = np.empty((rows, groups, course.columns))
        whole = recipe.kind in (PLAIN, RENORM) and course.columns == x.shape[1]
        own = used if whole else np.empty((2, groups, x.shape[1]))
        state = (addresses, memory, count, _settings(course))
        constants = (course.pace, course.eps, course.update)
        result = loops.forward(recipe.kind, *data, own, used, *state, *constants)
        if recipe.kind == MOMENTUM:
            share = np.full_like(own[:1], 1 - result)
            used = np.concatenate([used, own[:1], share])
        elif recipe.kind == WINDOW:
            used[3] = result  # there is no d
        tables.append(used)
    table = tables[0] if len(tables) == 1 else np.concatenate(tables, 1)
    return y, torch.from_numpy(table)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    used: Tensor,
    tracked: Tensor,
    course: Course,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        dy: Gradient of the output, as ``x`` in type and memory.
        x: Input.
        weight: Scale.
        used: Statistics of the forward.
        tracked: Batches tracked.
        course: How.
        wanted: Whether the input needs a gradient.

    Returns:
        Gradients of the input, empty where it is not wanted, and of shift and scale, ``(2, C)``.
    """
    recipe, steps = course.recipe, loops.steps_of(x, course.cut, course.last)
    dx = loops.empty_like(x) if wanted else x.new_empty(0)
    like, parts, tables, group = loops.LIKE[x.dtype], loops.parts(x.numel()), used.numpy(), 0
    slopes, row = weight.new_empty(2, len(steps), *weight.shape), weight.nbytes
    db, dw = (slope.data_ptr() for slope in slopes)
    average, count = loops.NONE, loops.NO_COUNT
    if recipe.psi is not None and recipe.psi_counter is not None:
        length = recipe.psi.numel() // x.shape[1]
        average, count = (recipe.psi.data_ptr(), length), recipe.psi_counter.data_ptr()
    pace = 1 / max(int(tracked), 1) if course.pace < 0 and recipe.averages == EMA else course.pace
    for step, (first, shape, starts, groups) in enumerate(steps):
        places = [t.data_ptr() + first for t in (dy, x, dx)]
        slope = (dw + step * row, db + step * row)
        data = (like, *places, shape, course.last, starts, weight.data_ptr(), *slope, wanted)
        table = np.ascontiguousarray(tables[:, group : group + groups])
        centers, share, own = table[0], 1.0, True
        if recipe.kind == MOMENTUM:
            table, centers, share = table[:2], table[2], float(table[3, 0, 0])
        elif recipe.kind == WINDOW:
            own = bool(table[3, 0, 0] > 0)
            table = np.concatenate([table[:3], np.zeros_like(table[:1])])
        how = (parts, False, 0, 0, table, centers, share, recipe.kind != WINDOW, course.eps)
        kept = (recipe.averages, average, count, 1.0 - pace, own, course.update)
        loops.backward(*data, *how, *kept)
        group += groups
    return dx, slopes[:, 0] if len(steps) == 1 else slopes.sum(1)


def _memory(course: Course, running: tuple[int, ...]) -> tuple[tuple[int, int, int, int], int]:
    """Addresses of the memory of a method, rows of its window, and the address of its counter."""
    recipe, (mean, var, _) = course.recipe, running
    if recipe.mean is not None and recipe.var is not None:
        mean, var = recipe.mean.data_ptr(), recipe.var.data_ptr()
    window = loops.NONE
    if recipe.window is not None:
        window = recipe.window.data_ptr(), len(recipe.window)
    count = loops.NO_COUNT if recipe.counter is None else recipe.counter.data_ptr()
    return (mean, var, *window), count


def _settings(course: Course) -> tuple[float, float, float, float]:
    """Numbers of a method, as the loops take them."""
    recipe = course.recipe
    first, second = recipe.numbers
    if recipe.kind == RENORM:
        return first, second, float(recipe.steps[1]), float(recipe.smooth)
    if recipe.kind == WINDOW:
        length, warmup, renorm_warmup = recipe.steps
        return float(length), float(warmup), float(renorm_warmup), first
    return 0.0 if recipe.keep is None else recipe.keep.item(), 0.0, 0.0, 0.0
