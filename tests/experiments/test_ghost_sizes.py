"""Ghost size and example weight: the experiment runs, resumes, and keeps its halves apart."""

from pathlib import Path

import pytest

from anybatch.experiments.config import Run
from anybatch.experiments.figures import png
from anybatch.experiments.ghost_sizes import GhostSize, as_table, figure, ghost_sizes, pictures
from anybatch.experiments.tuning import Outcome


def test_a_row_a_size_and_a_value_a_seed(tmp_path: Path) -> None:
    base = Run(epochs=1, train_size=64, batch_size=16)
    seen: list[tuple[int, int, Outcome]] = []

    def note(size: int, seed: int, outcome: Outcome) -> None:
        seen.append((size, seed, outcome))

    rows = ghost_sizes(base, tmp_path, sizes=(2, 8), seeds=(0, 1), on_run=note)
    assert [row.ghost_size for row in rows] == [2, 8]
    assert [(size, seed) for size, seed, _ in seen] == [(2, 0), (2, 1), (8, 0), (8, 1)]
    assert all(outcome.run.options == (("ghost_size", size),) for size, _, outcome in seen)
    for row in rows:
        assert len(row.alphas) == len(row.plain_loss) == len(row.tuned_top1) == 2
    best = seen[0][2]
    assert rows[0].alphas[0] == best.tuned.best
    assert rows[0].plain_loss[0] == best.test.curves["loss"][0]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert ghost_sizes(base, tmp_path, sizes=(2, 8), seeds=(0, 1)) == rows
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert png(figure(rows)).startswith(b"\x89PNG")


def test_the_table_gives_means_and_spreads_of_the_seeds() -> None:
    row = GhostSize(4, (0.1, 0.05), (0.3, 0.5), (0.2, 0.4), (0.9, 0.8), (0.92, 0.82), {0.0: 0.4})
    line = as_table([row]).splitlines()[-1]
    cells = ["4", "0.05, 0.1", "0.400 ± 0.141", "0.300 ± 0.141", "-0.1000 ± 0.0000"]
    assert line == "| " + " | ".join([*cells, "85.0 ± 7.1", "+2.00 ± 0.00"]) + " |"


def test_digits_become_pictures(tmp_path: Path) -> None:
    path = pictures(Run(), tmp_path / "data.npz", (1, 8, 8), size=100)
    base = Run(data="npz", root=str(path), model="resnet8", epochs=1, batch_size=50)
    (row,) = ghost_sizes(base, tmp_path, sizes=(50,), seeds=(0,))
    assert row.plain_loss[0] == pytest.approx(row.tuned_loss[0], rel=1)
