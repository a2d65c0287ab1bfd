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

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import anybatch
from anybatch.backends.triton import backward, forward, launch, method_kernels
from anybatch.backends.triton import constants as sources
from anybatch.core.grouping import partition

DATA = {"x", "y", "dy", "dx"}
COUNTERS = {"tracked", "counter0", "counter1", "arrivals"}
NUMBERS = ("eps", "pace", "option")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(kernel: Any, values: str, table: str, constants: dict[str, Any], warps: int) -> str:
    """Compile a kernel; its machine code's use of registers and memory."""
    signature = {}
    pointers = {"weight", "bias", "used", "own", "partial", "on", "slopes"}
    pointers |= {"running_mean", "running_var"}
    pointers |= {f"{kind}{i}" for kind in ("row", "window", "number") for i in range(4)}
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


def methods() -> Iterator[tuple[Any, dict[str, Any], Any, dict[str, Any]]]:
    """The kernels of every rule forward and backward, with their constants."""
    window = anybatch.MovingAverageBatchNorm2d
    layers = [
        anybatch.BatchNorm2d(8),
        anybatch.MomentumBatchNorm2d(8, batch_size=2),
        anybatch.BatchRenorm2d(8),
        anybatch.BatchRenorm2d(8, smooth=True),
        window(8),
        window(8, forward_stats="sma", backward_stats="ema"),
        window(8, forward_stats="batch", backward_stats="batch"),
    ]
    for layer in layers:
        spec = layer.method_spec(torch.ones(2, 8, 2, 2), partition(2))
        kernels = method_kernels.kernels_for(spec)
        both = {"CENTERED": spec.centered, "USES": kernels.uses}
        first = {"RULED": spec.method.forward.rule is not None, "MOVES": kernels.moves, **both}
        averaged = spec.method.backward.rule is not None
        second = {"AVERAGED": averaged, "MOVES": kernels.averages, **both}
        for free in (False, True):  # running statistics in their other form
            first |= {"CUMULATIVE": free, "BLOCK_W": 16 if spec.kept.windows else 0}
            second |= {"CUMULATIVE": free and averaged}
            second |= {"BLOCK_W": 16 if spec.averages.windows else 1}
            yield kernels.forward, first, kernels.backward, second


def every(layout: launch.Layout) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Every kernel that a layout takes."""
    plan = launch.plan_for(layout, 132)
    shape = launch._shape(plan, layout)
    warps = shape.pop("num_warps")
    for ahead, first, behind, second in methods():
        if layout.width == 1 or not first["RULED"]:
            yield ahead, {**shape, **first, "UPDATE": True}, warps
            more = {"UPDATE": True, "WANTED": True}
            yield behind, {**shape, **second, **more}, warps
    if plan.source == sources.PARTS:
        names = {"BLOCK_M": plan.part_block[0], "BLOCK_C": plan.part_block[1]}
        part = {"LAST": layout.last, "LONG": layout.long, "ALIGN": plan.align, **names}
        warps = launch._warps(plan.part_block[0] * plan.part_block[1])
        accurate = tl.float64 if layout.itemsize == 8 else tl.float32
        for center in (0, 2):
            constants = {**part, "CENTERED": center == 0, "ACC": accurate}
            yield forward.forward_parts, constants, warps
            constants = {**part, "AT_CENTER": center, "WIDTH": layout.width}
            yield backward.backward_parts, constants, warps
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
