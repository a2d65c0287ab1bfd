"""Names of kernels that serve a batch, and what they are made from."""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from anybatch.backends import rule
from anybatch.backends.protocol import Kernels, NormCall
from anybatch.backends.triton import steps
from anybatch.backends.triton.launch import plan_for, processors

_SOURCES = ("tile", "tiles", "parts")
_DRIVER = Path("/proc/driver/nvidia/version")


def kernels_of(call: NormCall, x: Tensor) -> Kernels:
    """The kernels that serve a batch; sizes, for which they are compiled anew, play no part."""
    spec = call.spec
    layouts = [layout for layout, _, _ in steps.steps_of(x, call)]
    plans = {plan_for(layout, processors(x.device)).source for layout in layouts}
    options = (*spec.kept.options, *spec.averages.options)
    words = [
        spec.method.name or "batch statistics",
        *(str(one) for one in options if isinstance(one, bool)),
        str(x.dtype).removeprefix("torch."),
        "channels last" if call.last else "channels first",
        *(_SOURCES[plan] for plan in sorted(plans)),
        *(["without a mean"] if not spec.centered else []),
        *(["groups of channels"] if layouts[0].width > 1 else []),
        *(["groups of examples"] if len(call.cut[0]) > 1 else []),
        *(["mean of all batches"] if call.update_weight == -1 else []),
        *(["momentum warms up"] if call.update_weight < -1 else []),
    ]
    return Kernels(", ".join(words), identity(x.device))


@lru_cache(maxsize=64)
def identity(device: torch.device) -> str | None:
    """Device, driver, versions and sources; None where the interpreter runs kernels."""
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    driver = _DRIVER.read_text() if _DRIVER.is_file() else str(torch.version.cuda)
    return repr((about.name, about.major, about.minor, driver, torch.__version__, *_made_from()))


@lru_cache(maxsize=1)
def _made_from() -> tuple[str, str]:
    """Version of Triton, and a digest of the kernels' sources."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(rule.__file__)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return triton.__version__, digest.hexdigest()
