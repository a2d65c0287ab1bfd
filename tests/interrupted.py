"""Trainings that are stopped again and again."""

from pathlib import Path
from typing import Any

import pytest

from anybatch.tools.run import Run
from anybatch.tools.training import train


class _Stopped(Exception):
    pass


def train_stopped_after_each_epoch(run: Run, folder: Path) -> dict[str, Any]:
    """The result of a run that is stopped after each epoch and goes on from its checkpoint."""

    def stop(epoch: int, _: object) -> None:
        raise _Stopped

    for _ in range(run.epochs - 1):
        with pytest.raises(_Stopped):
            train(run, folder, stop)
    return train(run, folder)
