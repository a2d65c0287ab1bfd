"""Diagnoses of fresh networks beside the losses of stored trainings."""

from pathlib import Path

import pytest

from anybatch.tools.data import load
from papers.paper_run import PaperRun
from papers.reproduction.pages import stored
from papers.studies.diagnosis import DOCS, Case, cases, lost, measured

RUN = PaperRun(data="digits", model="mlp", epochs=1)


def test_a_fresh_network_of_each_seed_is_diagnosed() -> None:
    data = load(RUN)
    row = measured(RUN.but(batch_size=2), data, seeds=2, batches=12)
    assert row["problem"] == "yes"
    assert row["noisy"] == "4"
    assert row["all norms act as"] < 1
    assert row["spread"] > 0
    assert measured(RUN.but(batch_size=64), data, seeds=1, batches=12)["problem"] == "no"


def test_what_stored_trainings_lost_is_against_the_target_and_needs_two_seeds() -> None:
    case, rows = Case(RUN, (2, 4), target=8), []

    def add(norm_batch: int | None, seed: int, accuracy: float, **other: object) -> None:
        settings = {
            **{"data": "digits", "model": "mlp", "epochs": 1, "options": [], "train_size": None},
            **{"batch_size": 8, "norm_batch_size": norm_batch, "method": "bn", **other},
        }
        rows.append({"settings": settings, "seed": seed, "result": {"accuracy": accuracy}})

    for seed, accuracy in enumerate((0.9, 0.8)):
        add(None, seed, accuracy)
        add(2, seed, accuracy - 0.25)
        add(2, seed, 0.1, method="mabn")
        add(2, seed, 0.2, centralize=True)
        add(2, seed, 0.3, options=[["eps", 1.0]])
    add(4, 0, 0.5)
    assert lost(case, 2, rows) == pytest.approx(25.0)
    assert lost(case, 4, rows) is None
    assert lost(case, 8, rows) == 0


def test_the_trainings_it_is_compared_with_are_there() -> None:
    rows = stored(DOCS).values()
    by_model = {case.run.model: case for case in cases(Path("data"))}
    assert lost(by_model["resnet8"], 2, rows) > 5
    assert lost(by_model["resnet20"], 2, rows) > 5
    assert lost(by_model["unet"], 2, rows) < 2
