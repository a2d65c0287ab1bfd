"""Time of a layer alone, forward and backward, relative to torch.nn.BatchNorm2d.

Every method beside torch's layers; then, with the baseline again, a ghost batch norm as trainers
ship it (a loop over chunks) and batch normalizations written in tensor operators, one of them
compiled by torch.compile. All of a group in turn in one process, in another order each round, so
that other work on the machine and what the others leave in memory meet them alike; medians of the
times, and of the ratios by round. The second group is apart since it leaves much in memory.

    python benchmarks/layers.py [--shapes 2x64x56x56 ...] [--format contiguous channels_last]
        [--precision float32 bfloat16] [--mode eager graph] [--layers bn mabn "eager BN" ...]
        [--rounds 15] [--block 0.0] [--device cpu] [--threads 2] [--cpu-time] [--csv layers.csv]

Ratios are to the first layer. On a machine that does other work, ``--cpu-time --threads 1`` is
steadier: with threads, each waits for the one that has to share its core.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from harness import DTYPES, FORMATS, SHAPES, arguments, finish, reason, sizes, start
from peers import peers
from torch import Tensor, nn

from anybatch.registry import METHODS
from anybatch.tools.bench import compiled, steady_options
from anybatch.tools.measurements import Measurement, Setting, timed
from anybatch.tools.timing import Call, graphed, interleaved

BASELINE = "nn.BatchNorm2d"
METHOD_NAMES = (
    "bn",
    "mbn",
    "mabn",
    "brn",
    "ghost",
    "bgn",
    "ns",
    "bs",
    "fs",
    "points",
    "l1",
    "range",
)
PEERS = tuple(peers(1, 1, torch.device("cuda"), torch.float32))
LIGHT = (*METHODS, "nn.GroupNorm", "nn.SyncBatchNorm")
BLOCK = 0.003  # seconds of a block on a CUDA device, many calls of which are under way at a time


def method_layer(name: str, batch: int, channels: int, **common: object) -> nn.Module:
    """A method's layer as it is in most of a training; ghost batch norm has up to 16 groups."""
    options: dict[str, object] = {
        "mbn": {"batch_size": batch, "ideal_batch_size": 4 * batch},
        "ghost": {"ghost_size": max(batch // 16, 1)},
        "bgn": {"num_groups": math.gcd(32, channels)},
    }.get(name, {})
    if "seed" in METHODS[name].options:
        options = {**options, "seed": 0}
    layer = METHODS[name].build(channels, 2, **steady_options(name), **options, **common)
    if hasattr(layer, "set_progress"):
        layer.set_progress(2, 3)
    return layer


def data(shape: str, form: str, precision: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch and the gradient of an output."""
    torch.manual_seed(0)
    pair = (
        torch.randn(sizes(shape), device=device)
        .to(DTYPES[precision])
        .contiguous(memory_format=FORMATS[form])
        for _ in range(2)
    )
    x, dy = pair
    return x.requires_grad_(), dy


def makers(
    names: Sequence[str], batch: int, channels: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], nn.Module]]:
    """What makes each layer that was asked for, the baseline first."""
    known = peers(channels, batch, device, dtype)
    found: dict[str, Callable[[], nn.Module]] = {BASELINE: lambda: nn.BatchNorm2d(channels)}
    for name in names:
        if name in METHODS:
            found[name] = lambda name=name: method_layer(name, batch, channels)
        elif name in known:
            found[name] = known[name]
    return found


def forward_of(name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer, compiled where its name says so."""
    return compiled(layer) if name.startswith("compiled") else layer


def call_of(layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Call:
    """Forward and backward of a layer."""

    def call() -> None:
        x.grad = None
        layer.zero_grad()
        forward(x).backward(dy)

    return call


def measure(
    setting: Setting,
    names: Sequence[str],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    block: float = 0.0,
) -> tuple[list[Measurement], dict[str, str]]:
    """Time layers on one shape; the rows, and why of those that could not be."""
    x, dy = data(setting.case, setting.format, setting.precision, device)
    calls, failed = {}, {}
    made = makers(names, x.shape[0], x.shape[1], device, x.dtype)
    for name, make in made.items():
        if setting.mode == "graph" and name.startswith("compiled"):
            continue  # eager replays are enough of it: each shape takes a compilation
        try:
            layer = make().to(device).train()
            call = call_of(layer, forward_of(name, layer), x, dy)
            call()
            calls[name] = graphed(call) if setting.mode == "graph" else call
        except Exception as error:  # one that cannot run here must not stop the others
            failed[f"{name} on {setting.case}, {setting.format}, {setting.mode}"] = reason(error)
    block = block or (BLOCK if device.type == "cuda" else 0.0)
    times = interleaved(calls, rounds, device=device, block_seconds=block, clock=clock)
    return timed(setting, times, BASELINE), failed


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--format", nargs="+", default=tuple(FORMATS), choices=FORMATS)
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=["eager", "graph"])
    parser.add_argument("--layers", nargs="+", default=(*METHOD_NAMES, *PEERS))
    parser.add_argument("--block", type=float, default=0.0, help="seconds; 0 is one call")
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args(typed)
    unknown = set(given.layers) - {*METHODS, *PEERS}
    if unknown:
        parser.error(f"layers={sorted(unknown)}: give of {', '.join((*METHODS, *PEERS))}")
    budget, device = start(given), torch.device(given.device)
    clock = time.process_time if given.cpu_time else time.perf_counter
    rows: list[Measurement] = []
    failed: dict[str, str] = {}
    for mode in given.mode:
        for precision in given.precision:
            for form in given.format:
                for shape in given.shapes:
                    setting = Setting("layer", shape, form, precision, mode)
                    if budget.over(f"{shape}, {form}, {precision}, {mode}"):
                        continue
                    for light in (True, False):
                        names = [name for name in given.layers if (name in LIGHT) == light]
                        if not names:
                            continue
                        more, why = measure(
                            setting, names, given.rounds, device, clock, given.block
                        )
                        known = {row.name for row in rows if row[:5] == setting}
                        rows += [row for row in more if row.name not in known]
                        failed |= why
    if dist.is_initialized():  # by a peer that synchronizes
        dist.destroy_process_group()
    return finish(rows, failed, given)


if __name__ == "__main__":
    sys.exit(main())
