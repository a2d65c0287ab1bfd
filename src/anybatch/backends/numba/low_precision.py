# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
"""Activations of 16 bits: bfloat16 and float16 as compiled code reads and writes them.

Numba has neither on a CPU. An activation is an array of 16-bit words whose elements become float32
where they are read, and are rounded to the nearest, to even at a tie, where they are written. A
bfloat16 is the upper half of a float32, so both ways are integer arithmetic; for float16 processors
have instructions. Either runs in vector registers.
"""

import platform
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.core.typeconv import Conversion
from numba.extending import intrinsic, lower_cast, models, register_model

_WORD, _WHOLE, _HALF, _SINGLE = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


class LowFloat(types.Type):
    """The type of an element; `name` is torch's name of it."""

    def can_convert_to(self, typingctx, other):
        if other == types.float32:
            return Conversion.promote
        return Conversion.safe if other == types.float64 else None

    def can_convert_from(self, typingctx, other):
        return Conversion.unsafe if isinstance(other, types.Float) else None


_KINDS = {types.uint16: LowFloat("bfloat16"), types.int16: LowFloat("float16")}


@register_model(LowFloat)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _WORD)


def converts_float16() -> bool:
    """Whether this processor converts float16; elsewhere code for it cannot be loaded."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("f16c")) or platform.machine().lower() in ("arm64", "aarch64")


def _like(kind, value):
    """A type for each of a vector's lanes, or for a number."""
    many = isinstance(value.type, ir.VectorType)
    return ir.VectorType(kind, value.type.count) if many else kind


def _constant(number, value):
    kind = _like(_WHOLE, value)
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def widen(builder, kind, value):
    """Words of a kind as float32, a number or a vector."""
    if kind.name == "float16":
        return builder.fpext(builder.bitcast(value, _like(_HALF, value)), _like(_SINGLE, value))
    upper = builder.shl(builder.zext(value, _like(_WHOLE, value)), _constant(16, value))
    return builder.bitcast(upper, _like(_SINGLE, value))


def narrow(builder, kind, value):
    """Float32 as words of a kind, a number or a vector; NaN stays NaN."""
    if kind.name == "float16":
        half = builder.fptrunc(value, _like(_HALF, value))
        return builder.bitcast(half, _like(_WORD, value))
    bits, sixteen = builder.bitcast(value, _like(_WHOLE, value)), _constant(16, value)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(1, value))
    rounded = builder.add(bits, builder.add(odd, _constant(0x7FFF, value)))
    quiet = builder.or_(bits, _constant(0x400000, value))
    found = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(found, sixteen), _like(_WORD, value))


@lower_cast(LowFloat, types.Float)
def _to_float(context, builder, fromty, toty, value):
    single = widen(builder, fromty, value)
    return context.cast(builder, single, types.float32, toty)


@lower_cast(types.Float, LowFloat)
def _from_float(context, builder, fromty, toty, value):
    single = context.cast(builder, value, fromty, types.float32)
    return narrow(builder, toty, single)


@intrinsic
def _as_numbers(typingctx, array):
    """An array whose 16-bit words are activations; any other as it is."""
    kind = _KINDS.get(array.dtype, array.dtype)

    def codegen(context, builder, signature, values):
        return impl_ret_borrowed(context, builder, signature.return_type, values[0])

    return array.copy(dtype=kind)(array), codegen


@intrinsic
def _number(typingctx, value, like):
    """A number in the type that arithmetic on an array has."""
    kind = types.float32 if isinstance(like.dtype, LowFloat) else like.dtype

    def codegen(context, builder, signature, values):
        return context.cast(builder, values[0], signature.args[0], kind)

    return kind(value, like), codegen


as_numbers: Any = _as_numbers  # their signatures are those of compiled code
number: Any = _number
