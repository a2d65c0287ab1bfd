"""Every GPU kernel compiles for a Hopper GPU, wherever there is Triton, and keeps to registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.3")


@pytest.mark.slow
def test_every_kernel_compiles_and_spills_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("compilation.py")), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = done.stdout.splitlines()
    assert len({line.split()[0] for line in kernels}) == 7
    stacks = {line: int(line.split("STACK:")[1].split()[0]) for line in kernels}
    assert [line for line, size in stacks.items() if size > 32] == []
