"""The machine and the versions that numbers were made with."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from anybatch.version import __version__


def machine() -> dict[str, Any]:
    """Return the machine and the versions that numbers are made with."""
    return {
        "anybatch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), None
    )


def _commit() -> str | None:
    """The commit of the source tree this runs from, with a mark where it was changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
