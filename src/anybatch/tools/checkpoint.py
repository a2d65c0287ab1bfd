"""Checkpoints: trained networks in files, read without unpickling anything but plain data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.tools.run import Run

_NAMES = ("model", "state_dict", "model_state_dict")


def read_checkpoint(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read a checkpoint without unpickling anything but tensors and plain data.

    Args:
        path: What ``anybatch train`` wrote, or any file of `torch.save` with a
            ``state_dict``, by itself or under "model", "state_dict" or "model_state_dict".

    Returns:
        The run as plain data (None where the file has none), and the weights.

    Raises:
        ValueError: If it cannot be read or holds no weights.
    """
    if path.suffix == ".json":
        raise ValueError(f"checkpoint={str(path)!r}: the weights are in the .pt file beside it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint={str(path)!r}: there is nothing of that name") from error
    except Exception as error:  # torch, pickle and zipfile raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint={str(path)!r}: cannot be read ({reason})") from error
    if isinstance(content, dict):
        run = content.get("run")
        for state in (*(content.get(name) for name in _NAMES), content):
            if isinstance(state, dict) and state and all(map(torch.is_tensor, state.values())):
                return run if isinstance(run, dict) else None, state
    raise ValueError(
        f"checkpoint={str(path)!r}: there are no weights in it; give a file that anybatch train "
        "wrote, or one of torch.save(model.state_dict(), path)"
    )


def load_weights(model: nn.Module, state: dict[str, Tensor], run: Run) -> None:
    """Load a checkpoint's weights into the network of a run.

    Raises:
        ValueError: If the weights are another network's.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]
        raise ValueError(
            f"checkpoint: its weights are not those of model={run.model!r} with "
            f"method={run.method!r} on {run.data_name} ({' '.join(lines)[:300]}); give --model and "
            "--method as in the training"
        ) from error
