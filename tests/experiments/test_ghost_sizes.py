"""Ghost size and example weight: the experiment runs, resumes, and keeps its halves apart."""

from pathlib import Path

import pytest

from anybatch.evaluation.tuning import ExampleWeightTuning
from anybatch.experiments.config import Run
from anybatch.experiments.figures import png
from anybatch.experiments.ghost_sizes import (
    GhostSize,
    _row,
    as_table,
    figure,
    ghost_sizes,
    pictures,
)


def test_a_row_a_size_and_a_value_a_seed(tmp_path: Path) -> None:
    base = Run(epochs=1, train_size=64, batch_size=16)
    seen: list[tuple[int, int, tuple[float, ...]]] = []

    def note(size: int, seed: int, alphas: tuple[float, ...]) -> None:
        seen.append((size, seed, alphas))

    rows = ghost_sizes(base, tmp_path, sizes=(2, 8), seeds=(0, 1), on_run=note)
    assert [row.ghost_size for row in rows] == [2, 8]
    assert [(size, seed) for size, seed, _ in seen] == [(2, 0), (2, 1), (8, 0), (8, 1)]
    for row in rows:
        assert len(row.plain_loss) == len(row.tuned_top1) == 2
        assert row.alphas == sum((alphas for size, _, alphas in seen if size == row.ghost_size), ())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert ghost_sizes(base, tmp_path, sizes=(2, 8), seeds=(0, 1)) == rows
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert png(figure(rows)).startswith(b"\x89PNG")


def test_the_table_gives_means_and_spreads_of_the_seeds() -> None:
    row = GhostSize(
        4, (0.1, 0.05, 0.1, 0.1), (0.3, 0.5), (0.2, 0.4), (0.9, 0.8), (0.92, 0.82), {0.0: 0.4}
    )
    line = as_table([row]).splitlines()[-1]
    cells = ["4", "0.05, 0.1 (3)", "0.400 ± 0.141", "0.300 ± 0.141", "-0.1000 ± 0.0000"]
    assert line == "| " + " | ".join([*cells, "85.0 ± 7.1", "+2.00 ± 0.00"]) + " |"


def test_a_weight_is_judged_on_examples_it_was_not_tuned_on() -> None:
    def curve(losses: tuple[float, ...], best: float, examples: int) -> ExampleWeightTuning:
        curves = {"loss": losses, "top1": (0.5, 0.6)}
        return ExampleWeightTuning("loss", (0.0, 0.1), losses, best, 0.0, examples, curves)

    row = _row(8, [(curve((1.0, 2.0), 0.0, 3), curve((5.0, 3.0), 0.1, 1))])
    assert row.plain_loss == ((3 * 1.0 + 5.0) / 4,)
    assert row.tuned_loss == ((3 * 2.0 + 5.0) / 4,)
    assert row.tuned_top1 == pytest.approx(((3 * 0.6 + 0.5) / 4,))
    assert row.alphas == (0.0, 0.1)
    assert row.curves == {0.0: 3.0, 0.1: 2.5}


def test_digits_become_pictures(tmp_path: Path) -> None:
    path = pictures(Run(), tmp_path / "data.npz", (1, 8, 8), size=100)
    base = Run(data="npz", root=str(path), model="resnet8", epochs=1, batch_size=50)
    (row,) = ghost_sizes(base, tmp_path, sizes=(50,), seeds=(0,))
    assert row.plain_loss[0] == pytest.approx(row.tuned_loss[0], rel=1)
