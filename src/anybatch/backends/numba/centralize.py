# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled loop of weight centralization (moving-average-bn, equation 18)."""

from anybatch.backends.numba.arrays import LIKE as LIKE
from anybatch.backends.numba.arrays import array_at
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.threads import fork
from anybatch.backends.numba.threads import parts as parts


@inlined
def _centre(part, parts, source, target):
    """Some rows."""
    rows, dtype = source.shape[0], source.dtype.type
    for i in range(rows * part // parts, rows * (part + 1) // parts):
        row, out, total = source[i], target[i], 0.0
        for k in range(row.shape[0]):
            total += row[k]
        mean = dtype(total / row.shape[0])
        for k in range(row.shape[0]):
            out[k] = row[k] - mean


@jit
def centre(like, source, target, shape, parts):
    """Write rows minus their means.

    Args:
        like: An empty array of the type of both.
        source: Address of the rows.
        target: Address of what takes them.
        shape: Number and length of rows.
        parts: Threads.
    """
    fork(_centre, parts, (array_at(source, shape, like), array_at(target, shape, like)))
