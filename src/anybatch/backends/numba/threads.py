# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
"""Compiled loops on torch's own threads.

Numba brings thread pools of its own. Beside torch's OpenMP pool, whose idle threads
spin for a while before they sleep, a second pool has each core wanted by two threads.
So a loop is cut into parts that run in a parallel region of the OpenMP library that
torch itself has loaded.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_REGION, _NUMBER, _TEAM = "anybatch_region", "anybatch_thread_number", "anybatch_team_size"
_SYMBOLS = {_REGION: "GOMP_parallel", _NUMBER: "omp_get_thread_num", _TEAM: "omp_get_num_threads"}


def _find() -> bool:
    """Make torch's OpenMP library known to compiled code; whether there is one."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    try:
        loaded = ctypes.CDLL(str(library))  # symbols of what it depends on, too
        found = {
            name: ctypes.cast(getattr(loaded, symbol), ctypes.c_void_p).value
            for name, symbol in _SYMBOLS.items()
        }
    except (OSError, AttributeError):  # another platform, another OpenMP
        found = {name: ctypes.cast(_missing, ctypes.c_void_p).value for name in _SYMBOLS}
        usable = False
    else:
        usable = True
    for name, address in found.items():
        llvmlite.binding.add_symbol(name, address)
    return usable


def _do_nothing() -> None:
    """Stands for functions that are never called, so that compiled code can be loaded."""


_missing = ctypes.CFUNCTYPE(None)(_do_nothing)
_found = _find()
_forked = False
_GRAIN = 2**15  # values that are worth a thread


def _leave_pool() -> None:
    """An OpenMP pool does not survive a fork: a region of several threads would wait for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_pool)


def is_small(values: int) -> bool:
    """Whether so many values have one thread whatever there are, and few bytes."""
    return values < 2 * _GRAIN


def parts(values: int) -> int:
    """Threads for so many values: torch's number at most, one in the child of a fork."""
    if _forked or not _found or is_small(values):
        return 1
    return min(torch.get_num_threads(), values // _GRAIN)


def without_threads() -> bool:
    """Whether torch has threads that compiled loops cannot use."""
    return not _found and torch.get_num_threads() > 1


def _lent(context, builder, kind, value):
    """An argument whose arrays belong to nobody.

    References to an array are counted whenever a part of it is looked at, by threads that would
    wait for each other's count. The caller holds the arrays while the threads run.
    """
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value=value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        pieces = cgutils.unpack_tuple(builder, value)
        lent = [_lent(context, builder, *pair) for pair in zip(kind.types, pieces, strict=True)]
        return context.make_tuple(builder, kind, lent)
    return value


@intrinsic
def _fork(typingctx, kernel, parts, arguments):
    """Call ``kernel(part, parts, *arguments)`` for each part, in a region of so many threads.

    One part runs without a region. The kernel returns nothing and does not raise.
    """
    inner = (types.intp, types.intp, *arguments.types)
    kernel.get_call_type(typingctx, inner, {})  # compiles it
    signature = types.void(kernel, types.intp, arguments)

    def codegen(context, builder, signature, values):
        compiled = kernel.dispatcher.get_compile_result(types.none(*inner))
        context.active_code_library.add_linking_library(compiled.library)
        _, parts_value, packed = values
        pieces = cgutils.unpack_tuple(builder, _lent(context, builder, arguments, packed))
        i32, word, pointer = ir.IntType(32), parts_value.type, cgutils.voidptr_t
        struct = ir.LiteralStructType([word, *(piece.type for piece in pieces)])

        def outlined(name, *inputs):
            function = ir.Function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [pointer, *inputs]),
                builder.module.get_unique_name(f"{builder.function.name}.{name}"),
            )
            function.linkage = "internal"
            return function, ir.IRBuilder(function.append_basic_block())

        # Every so manieth part, from one on. The kernel is called here alone: it is inlined where
        # it is called, and a second place would be compiled as well.
        run, at = outlined("parts", word, word)
        run.attributes.add("noinline")
        total, *rest = cgutils.unpack_tuple(
            at, at.load(at.bitcast(run.args[0], struct.as_pointer()))
        )
        with cgutils.for_range_slice(at, run.args[1], total, run.args[2], word) as (part, _):
            inputs = [part, total, *rest]
            context.call_internal_no_propagate(at, compiled.fndesc, types.none(*inner), inputs)
        at.ret_void()

        # What each thread of a region runs.
        region, at = outlined("region")
        number_of = ir.FunctionType(i32, [])
        number, team = (
            at.zext(at.call(cgutils.get_or_insert_function(at.module, number_of, name), []), word)
            for name in (_NUMBER, _TEAM)
        )
        at.call(run, [region.args[0], number, team])
        at.ret_void()

        data = cgutils.alloca_once_value(
            builder, cgutils.pack_struct(builder, [parts_value, *pieces])
        )
        place = builder.bitcast(data, pointer)
        alone = builder.icmp_signed("<=", parts_value, word(1))
        with builder.if_else(alone) as (one, several):
            with one:
                builder.call(run, [place, word(0), word(1)])
            with several:
                parallel = cgutils.get_or_insert_function(
                    builder.module,
                    ir.FunctionType(ir.VoidType(), [region.type, pointer, i32, i32]),
                    _REGION,
                )
                count = builder.trunc(parts_value, i32)
                builder.call(parallel, [region, place, count, i32(0)])
        return context.get_dummy_value()

    return signature, codegen


fork: Any = _fork  # its signature is that of compiled code
