"""Networks and their example weights: the experiment runs, resumes, and keeps its halves apart."""

from pathlib import Path

import pytest

from anybatch.evaluation.example_weight_search import ExampleWeightTuning
from anybatch.evaluation.figures import png
from anybatch.tools.run import Run
from papers.studies.example_weight import Weighed, _row, as_table, figure, image_arrays, weigh


@pytest.mark.exhaustive
def test_a_row_a_network_and_a_value_a_seed(tmp_path: Path) -> None:
    base = Run(epochs=1, train_size=64, batch_size=16)
    runs = {"batch": base, "group": base.but(method="gn")}
    seen: list[tuple[str, int, tuple[float, ...]]] = []

    def note(label: str, seed: int, alphas: tuple[float, ...]) -> None:
        seen.append((label, seed, alphas))

    rows = weigh(runs, tmp_path, seeds=(0, 1), on_run=note)
    assert [(row.label, row.plain) for row in rows] == [("batch", 0.0), ("group", 1.0)]
    names = [("batch", 0), ("batch", 1), ("group", 0), ("group", 1)]
    assert [(label, seed) for label, seed, _ in seen] == names
    for row in rows:
        assert len(row.plain_loss) == len(row.tuned_top1) == 2
        assert row.alphas == sum((alphas for label, _, alphas in seen if label == row.label), ())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert weigh(runs, tmp_path, seeds=(0, 1)) == rows
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert png(figure(rows)).startswith(b"\x89PNG")


def test_the_table_gives_means_and_spreads_of_the_seeds() -> None:
    alphas, losses = (0.1, 0.05, 0.1, 0.1), ((0.3, 0.5), (0.2, 0.4))
    row = Weighed("four", 0.0, alphas, *losses, (0.9, 0.8), (0.92, 0.82), {0.0: 0.4})
    line = as_table([row]).splitlines()[-1]
    cells = ["four", "0.05, 0.1 (3)", "0.400 ± 0.141", "0.300 ± 0.141", "-0.1000 ± 0.0000"]
    assert line == "| " + " | ".join([*cells, "85.0 ± 7.1", "+2.00 ± 0.00"]) + " |"


def test_a_weight_is_judged_on_examples_it_was_not_tuned_on() -> None:
    def curve(losses: tuple[float, ...], best: float, examples: int) -> ExampleWeightTuning:
        curves = {"loss": losses, "top1": (0.5, 0.6)}
        return ExampleWeightTuning("loss", (0.0, 0.1), losses, best, 0.0, examples, curves)

    row = _row("eight", [(curve((1.0, 2.0), 0.0, 3), curve((5.0, 3.0), 0.1, 1))])
    assert row.plain_loss == ((3 * 1.0 + 5.0) / 4,)
    assert row.tuned_loss == ((3 * 2.0 + 5.0) / 4,)
    assert row.tuned_top1 == pytest.approx(((3 * 0.6 + 0.5) / 4,))
    assert row.alphas == (0.0, 0.1)
    assert row.curves == {0.0: 3.0, 0.1: 2.5}


def test_digits_become_images(tmp_path: Path) -> None:
    path = image_arrays(Run(), tmp_path / "data.npz", (1, 8, 8), size=100)
    base = Run(data="npz", root=str(path), model="resnet8", epochs=1, batch_size=50)
    (row,) = weigh({"images": base}, tmp_path, seeds=(0,))
    assert row.plain_loss[0] == pytest.approx(row.tuned_loss[0], rel=1)
