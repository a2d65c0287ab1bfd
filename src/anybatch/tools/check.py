"""Every method, type and memory format on a device: agreement with torch's operators, and speed."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anybatch.backends import BACKENDS
from anybatch.core.dispatch import choices_made
from anybatch.core.files import write_json
from anybatch.core.kernel_trial import try_kernels
from anybatch.core.norm_layer import NormLayer
from anybatch.registry import METHODS, get_method
from anybatch.tools.bench import Show, steady_options
from anybatch.tools.measurements import surroundings
from anybatch.tools.report_files import output_folder, terminal_table
from anybatch.tools.timing import interleaved, summaries

if TYPE_CHECKING:
    from rich.table import Table

PRECISIONS = ("float32", "float64", "bfloat16", "float16")
FORMATS = ("contiguous", "channels_last")
KEPT = tuple(name for name, method in METHODS.items() if method.builder is None)
CHANNELS = 16
SIDES = {"cpu": (7,), "cuda": (8, 32, 128)}  # of maps; on a GPU each takes other kernels
TIMED = (8, 64, 28, 28)


@dataclass(frozen=True)
class Checked:
    """One method in one type and format on a device: its backend, agreement and speed.

    Attributes:
        device: Device.
        method: Short name.
        precision: Type of the activations.
        format: "contiguous" or "channels_last".
        backend: What serves it; "aten" is torch's operators.
        fault: What disagrees or fails in the backend's kernels; None if nothing does.
        error: The largest error of the kernels as a share of what it may be; None for torch's
            operators, with which kernels are compared.
        ratio: Time of forward and backward relative to nn.BatchNorm2d; None if not measured.
    """

    device: str
    method: str
    precision: str
    format: str
    backend: str
    fault: str | None
    error: float | None
    ratio: float | None


def devices() -> tuple[str, ...]:
    """The CPU, and every CUDA device."""
    return ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))


def check(
    names: Sequence[str] = KEPT,
    places: Sequence[str] | None = None,
    rounds: int = 5,
    show: Show | None = None,
) -> list[Checked]:
    """Try the kernels of methods in every type and format, and time the layers.

    `places` None stands for all devices, `rounds` 0 for no timing. `show` is called with what is
    under way, how much is done, and of how much.
    """
    places = devices() if places is None else places
    cases, found = list(product(places, names, PRECISIONS, FORMATS)), []
    for number, case in enumerate(cases, 1):
        found.append(_check(*case, rounds))
        if show is not None:
            show("checks", number, len(cases))
    return found


def _check(device: str, name: str, precision: str, form: str, rounds: int) -> Checked:
    """Check one case; kernels are tried though a layer would not take them after a failure."""
    like = torch.empty(0, device=device, dtype=getattr(torch, precision))
    layer, last, backend = _layer(name, CHANNELS, like), form == FORMATS[1], BACKENDS[-1]
    fault, error = None, None
    for side in SIDES[like.device.type]:
        shape = (4, CHANNELS, side, side - 1)
        serving = _serving(layer, shape, like, last)
        if serving is BACKENDS[-1]:
            continue
        tried = try_kernels(partial(copy.deepcopy, layer), serving, shape, like, last)
        shares = [error / most for error, most in tried.errors.values()]
        backend, fault = serving, fault or tried.fault
        error = max([*shares, *([] if error is None else [error])], default=None)
    ratio = _ratio(name, like, last, rounds) if rounds else None
    return Checked(device, name, precision, form, backend.name, fault, error, ratio)


def _layer(name: str, channels: int, like: Tensor) -> NormLayer:
    """A layer of a method that does what it does in most of a training."""
    options = dict(steady_options(name))
    if name == "cbn":
        options |= {"window": 4, "order": 0}  # which needs no convolution
    if get_method(name).wraps:
        options |= {"num_virtual": 1}
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    layer = get_method(name).build(channels, 2, device=like.device, dtype=exact, **options)
    assert isinstance(layer, NormLayer)
    layer.set_progress(2, 3)
    return layer


def _batch(shape: tuple[int, ...], like: Tensor, last: bool) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape).to(like).contiguous(memory_format=form)


def _serving(layer: NormLayer, shape: tuple[int, ...], like: Tensor, last: bool) -> Any:
    """The backend that serves a batch, if its kernels are faultless."""
    asking = copy.deepcopy(layer)
    asking.asked = BACKENDS[:-1]  # as on trial: untried kernels too
    # What kernels raise the trial reports.
    with choices_made() as choices, contextlib.suppress(RuntimeError):
        asking(_batch(shape, like, last))
    named = {backend.name: backend for backend in BACKENDS}
    return named[choices[-1][0]]


def _ratio(name: str, like: Tensor, last: bool, rounds: int) -> float | None:
    """Time of forward and backward relative to nn.BatchNorm2d in the same type and format."""
    x, dy = (_batch(TIMED, like, last) for _ in range(2))
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    torchs = nn.BatchNorm2d(TIMED[1], device=like.device, dtype=exact)

    def step(layer: nn.Module) -> None:
        layer(x.requires_grad_()).backward(dy)

    calls = {"ours": partial(step, _layer(name, TIMED[1], like)), "torch": partial(step, torchs)}
    times = interleaved(calls, rounds, device=like.device, block_seconds=0.01)
    return summaries(times, "torch")["ours"].ratio


def check_table(rows: Sequence[Checked]) -> "Table":
    """A table for the terminal."""
    columns = ("device", "method", "precision", "format", "backend", "agrees", "error", "time")
    lines = []
    for row in rows:
        agrees = "is torch" if row.error is None and row.fault is None else "yes"
        cells = (row.device, row.method, row.precision, row.format, row.backend)
        error, ratio = ("" if one is None else f"{one:.2f}" for one in (row.error, row.ratio))
        lines.append((*cells, agrees if row.fault is None else "NO", error, ratio))
    return terminal_table(
        columns,
        lines,
        caption="error: largest, relative to what is allowed. time: relative to nn.BatchNorm2d",
        left=columns[:6],
    )


def write(rows: Sequence[Checked], folder: Path) -> Path:
    """Write the rows as JSON, with the devices and versions that they are of."""
    path = output_folder(folder) / "check.json"
    places = {row.device: surroundings(row.device) for row in rows}
    write_json(path, {"schema": 1, "machines": places, "rows": [asdict(row) for row in rows]})
    return path
