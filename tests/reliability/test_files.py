"""Files under adversity: a disk that is full, Ctrl-C at any moment; nothing broken, a way on."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TRAIN = ["train", "--method", "mabn", "--epochs", "4", "--train-size", "200", "--json"]


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "anybatch", *TRAIN, "--output", str(folder)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def check_whole(folder: Path) -> None:
    """What has its own name can be read; nothing else is left but the note of a stop."""
    for path in folder.rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text())
    for path in folder.rglob("*.pt"):
        if not path.name.startswith("."):
            torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The result of a run to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        command(folder), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return result(folder)


def result(folder: Path) -> dict[str, object]:
    (path,) = (p for p in (folder / "runs").glob("*.json") if not p.name.startswith("."))
    row = json.loads(path.read_text())
    epochs = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in row["epochs"]]
    return {"accuracy": row["accuracy"], "epochs": epochs}


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [0, 2_000, 40_000])
def test_a_disk_that_is_full(tmp_path: Path, size: int, whole: dict[str, object]) -> None:
    """No file may grow beyond a size: writes fail as on a full disk, at the same places."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(
        command(tmp_path), capture_output=True, text=True, timeout=300, env=environment(),
        preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr.replace("\n", "")
    assert not [p for p in tmp_path.rglob(".*") if p.is_file() and p.name != ".lock"]
    check_whole(tmp_path)
    again = subprocess.run(
        command(tmp_path), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert again.returncode == 0, again.stderr
    assert result(tmp_path) == whole


@pytest.mark.slow
def test_ctrl_c_at_any_moment(tmp_path: Path, whole: dict[str, object]) -> None:
    """Twelve runs stopped up to three times each: whole files, code 130, the same end."""
    chance = random.Random(0)
    for number in range(12):
        folder = tmp_path / str(number)
        for _ in range(3):
            process = subprocess.Popen(
                command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment(),
            )  # fmt: skip
            time.sleep(chance.uniform(1.5, 5.0))
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode in (0, 130, -signal.SIGINT), errors
            if folder.exists():
                check_whole(folder)
        done = subprocess.run(
            command(folder), capture_output=True, text=True, timeout=300, env=environment()
        )
        assert done.returncode == 0, done.stderr
        assert result(folder) == whole
        assert not [p for p in folder.rglob(".*") if p.is_file()]
