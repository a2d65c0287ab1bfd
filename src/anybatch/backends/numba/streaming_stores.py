# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Output that goes to memory past the caches.

Before a processor writes a line of memory it reads the line. Of an output that the caches cannot
hold until it is used, this is a third of the traffic of a pass that reads one tensor, writes one.
Stores with a hint do without. A compiler makes them of whole, aligned vectors alone, so these are
written out here.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from anybatch.backends.numba.compile import inlined
from anybatch.backends.numba.low_precision import LowFloat, narrow, widen

_LINE = 64  # bytes of a line of the caches
_VECTOR = 32  # bytes of a store
_CACHE = 2**25  # bytes of the last cache, where the system does not tell
_OF_A_CORE = 2**24  # bytes of it for each core; processors have less
_REPORTED = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_FLAGS = ("reassoc", "contract", "nsz")


@lru_cache(maxsize=1)
def last_cache() -> int:
    """Bytes of the last cache.

    A virtual machine of a few cores reports the whole cache of its host, hundreds of megabytes
    that other machines fill as well. So it counts no larger than these cores would have.
    """
    try:
        text = _REPORTED.read_text("ascii").strip()
        size = int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):  # another system, or none of that level
        size = _CACHE
    return min(size, _OF_A_CORE * (os.cpu_count() or 1))


_ENOUGH = last_cache() // 2  # bytes of an output, beside whose input it does not stay


@intrinsic
def _address_of(typingctx, array):
    """Where an array is."""

    def codegen(context, builder, signature, values):
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.ptrtoint(data, cgutils.intp_t)

    return types.intp(array), codegen


@intrinsic
def _fence(typingctx):
    """Have all stores of this thread done before what comes after."""

    def codegen(context, builder, signature, values):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _vectors(context, builder, signature, values):
    """Vectors of values: give(k, place) loads from argument k at a place, or repeats a number."""
    kinds = [context.get_value_type(getattr(one, "dtype", one)) for one in signature.args]
    count = _VECTOR // context.get_abi_sizeof(kinds[0])

    def where(k, place):
        data = context.make_array(signature.args[k])(context, builder, values[k]).data
        vector = ir.VectorType(kinds[k], count)
        return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

    def give(k, place):
        kind, vector = signature.args[k], ir.VectorType(kinds[k], count)
        if isinstance(kind, types.Array):
            found = builder.load(where(k, place), align=context.get_abi_sizeof(kinds[k]))
            return widen(builder, kind.dtype, found) if isinstance(kind.dtype, LowFloat) else found
        zero, lanes = ir.IntType(32)(0), ir.VectorType(ir.IntType(32), vector.count)
        alone = builder.insert_element(ir.Constant(vector, ir.Undefined), values[k], zero)
        return builder.shuffle_vector(alone, ir.Constant(vector, ir.Undefined), lanes(None))

    def put(k, place, value):
        kind = signature.args[k].dtype
        value = narrow(builder, kind, value) if isinstance(kind, LowFloat) else value
        stored = builder.store(value, where(k, place), align=_VECTOR)
        hint = builder.module.add_metadata([ir.IntType(32)(1)])
        stored.set_metadata("nontemporal", hint)

    return give, put


@intrinsic
def _put_affine(typingctx, y, x, at, mean, scale, shift, place):
    """Store (x - mean) * scale + shift, a vector at `at`; rows are read at `place`."""
    signature = types.void(y, x, at, mean, scale, shift, place)

    def codegen(context, builder, signature, values):
        give, put = _vectors(context, builder, signature, values)
        at, place = values[2], values[6]
        apart = builder.fsub(give(1, at), give(3, place), flags=_FLAGS)
        scaled = builder.fmul(apart, give(4, place), flags=_FLAGS)
        put(0, at, builder.fadd(scaled, give(5, place), flags=_FLAGS))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _put_gradient(typingctx, dx, dy, x, at, center, on_dy, on_x, constant, place):
    """Store on_dy * dy + on_x * (x - center) + constant, a vector at `at`."""
    signature = types.void(dx, dy, x, at, center, on_dy, on_x, constant, place)

    def codegen(context, builder, signature, values):
        give, put = _vectors(context, builder, signature, values)
        at, place = values[3], values[8]
        apart = builder.fsub(give(2, at), give(4, place), flags=_FLAGS)
        of_x = builder.fmul(apart, give(6, place), flags=_FLAGS)
        of_dy = builder.fmul(give(1, at), give(5, place), flags=_FLAGS)
        both = builder.fadd(of_dy, of_x, flags=_FLAGS)
        put(0, at, builder.fadd(both, give(7, place), flags=_FLAGS))
        return context.get_dummy_value()

    return signature, codegen


_address: Any = _address_of  # their signatures are those of compiled code
put_affine: Any = _put_affine
put_gradient: Any = _put_gradient
settle_stores: Any = _fence


@inlined
def leaves(output, length):
    """Whether an output, written so many values at a time, is one to store past the caches."""
    size = output.itemsize
    return (
        output.size * size > _ENOUGH
        and _address(output) % _LINE == 0
        and length * size % _LINE == 0
    )


@inlined
def lanes(output):
    """Values of a store."""
    return _VECTOR // output.itemsize
