"""Compiles the GPU kernels for a Hopper GPU, without having one, and prints what each takes.

A process of its own: the other tests interpret kernels, and Triton does either.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anybatch.backends import kinds
from anybatch.backends.triton import backward, forward, launch
from anybatch.backends.triton import constants as sources

DATA = {"x", "y", "dy", "dx"}
COUNTERS = {"tracked", "counter", "arrivals", "psi_counter"}
NUMBERS = ("eps", "pace", "first", "second")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(kernel: Any, values: str, table: str, constants: dict[str, Any], warps: int) -> str:
    """Compile a kernel; its machine code's use of registers and memory."""
    signature = {}
    pointers = {"weight", "bias", "used", "own", "partial", "on", "window", "keep", "slopes", "psi"}
    pointers |= {"running_mean", "running_var", "old_mean", "old_var"}
    for parameter in kernel.params:
        name = parameter.name
        tables = constants.get("SOURCE") == sources.PARTS and name in ("x", "y", "dx")
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith(NUMBERS):
            signature[name] = "fp32"
        elif name in COUNTERS:
            signature[name] = "*i64"
        elif name in DATA and not tables:
            signature[name] = f"*{values}"
        elif name in DATA or name in pointers:
            signature[name] = f"*{table}"
        else:
            signature[name] = "i32"
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in constants.items()},
        {places[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if "*" in kind},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+", answer)
    assert found is not None
    return found.group()


def rules() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Constants of every rule forward, and of what goes with it backward."""
    for kind in (kinds.PLAIN, kinds.RENORM, kinds.MOMENTUM, kinds.WINDOW):
        window = 16 if kind == kinds.WINDOW else 0
        averages = kinds.SMA if window else kinds.BATCH
        for free in (False, True):  # running statistics and limits in their other form
            first = {"KIND": kind, "SMOOTH": free, "CUMULATIVE": free, "BLOCK_W": window}
            if window and free:
                averages = kinds.EMA
            second = {"KIND": kind, "AVERAGES": averages, "CUMULATIVE": free and window > 0}
            yield first, {**second, "BLOCK_W": window or 1}


def every(layout: launch.Layout) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Every kernel that a layout takes."""
    plan = launch.plan_for(layout, 132)
    shape = launch._shape(plan, layout)
    warps = shape.pop("num_warps")
    for first, second in rules():
        if layout.width == 1 or first["KIND"] == kinds.PLAIN:
            yield forward.forward_columns, {**shape, **first, "UPDATE": True}, warps
            more = {"UPDATE": True, "WANTED": True}
            yield backward.backward_columns, {**shape, **second, **more}, warps
    if plan.source == sources.PARTS:
        names = {"BLOCK_M": plan.part_block[0], "BLOCK_C": plan.part_block[1]}
        part = {"LAST": layout.last, "LONG": layout.long, "ALIGN": plan.align, **names}
        warps = launch._warps(plan.part_block[0] * plan.part_block[1])
        accurate = tl.float64 if layout.itemsize == 8 else tl.float32
        for kind in (kinds.PLAIN, kinds.MOMENTUM, kinds.WINDOW):
            yield forward.forward_parts, {**part, "KIND": kind, "ACC": accurate}, warps
            yield backward.backward_parts, {**part, "KIND": kind, "WIDTH": layout.width}, warps
        yield forward.forward_write, part, warps
        yield backward.backward_write, part, warps
    if layout.itemsize > 2:
        tile = {"BLOCK_M": 16, "BLOCK_C": 16, "LAST": layout.last, "ALIGN": plan.align}
        for free in (False, True):
            yield forward.forward_track, {**tile, "CUMULATIVE": free}, 2


LAYOUTS = [
    (launch.Layout(False, 64, 56 * 56, 4, (2,), 1, False), "fp32"),
    (launch.Layout(True, 64, 56 * 56, 2, (32,), 1, False), "bf16"),
    (launch.Layout(False, 64, 56 * 56, 2, (32,), 1, True), "fp16"),
    (launch.Layout(True, 512, 49, 4, (2,), 8, False), "fp32"),
    (launch.Layout(False, 6, 35, 8, (3,), 3, False), "fp64"),
    (launch.Layout(True, 256, 100 * 152, 8, (4,), 1, True), "fp64"),
]

if __name__ == "__main__":
    for layout, values in LAYOUTS[:: int(sys.argv[1])]:
        table = "fp64" if values == "fp64" else "fp32"
        for kernel, constants, warps in every(layout):
            use = build(kernel, values, table, constants, warps)
            print(kernel.fn.__name__, values, f"LAST:{layout.last}", use, constants, flush=True)
