"""Comparing methods from Python."""

import math
import random
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import anybatch
from anybatch.tools.compare import Comparison, Line
from anybatch.tools.compare_report import FinishedComparison, advice
from anybatch.tools.run import Run


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def examples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 6, generator=generator) + y[:, None], y)


def test_methods_are_compared_on_a_users_network_and_data(tmp_path: Path) -> None:
    told = []
    state = torch.get_rng_state()
    found = anybatch.compare(
        network,
        examples(64, 0),
        examples(32, 1),
        ["gn", "mabn"],
        options={"mabn": {"window": 4}},
        epochs=2,
        seeds=2,
        timing=False,
        progress=lambda done, total: told.append((done, total)),
    )
    assert torch.equal(state, torch.get_rng_state())
    assert told == [(k, 16) for k in range(1, 17)]
    assert {line.row for line in found.lines[2:]} == {"gn", "mabn"}
    assert found.lines[2].mean >= found.lines[3].mean  # the best first
    assert dict(next(line for line in found.lines if line.row == "mabn").run.options) == {
        "window": 4
    }
    assert found.to_dict()["seeds"] == [0, 1]
    assert "mabn" in str(found)
    assert max(map(len, str(found).splitlines())) <= 100
    assert found.report(tmp_path / "new" / "folder").is_file()

    again = anybatch.compare(
        network(), examples(64, 0), examples(32, 1), ["mabn"], epochs=1, seeds=[5], progress=False
    )
    assert again.times["mabn"].ratio > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": 3}, "model=3: give a function"),
        ({"model": lambda: 3}, "model: it gave int"),
        ({"methods": ["mabm"]}, "did you mean 'mabn'"),
        ({"seeds": 0}, "seeds=0"),
        ({"options": {"mabn": {"windou": 3}}}, "windou"),
        ({"options": {"gn": {"num_groups": 2}}}, "options='gn': it is none of the methods mabn"),
        ({"methods": "mabn"}, r"methods='mabn': give a list of names, as in \['mabn'\]"),
        ({"target_batch_size": 65}, "target_batch_size=65: give a number from 1 to 64"),
        ({"model": anybatch.convert(network(), "mabn")}, "is a layer of anybatch already"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4096}, "batch_size=4096"),
        ({"methods": ["mabn", "Frozen"]}, "methods: frozen keeps the statistics of a trained"),
        ({"model": nn.Linear(8, 3)}, "model: Linear has no batch norm"),
        ({"model": nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))}, r"not fit .* shape \(6,\)"),
    ],
)
def test_a_wrong_argument_of_compare_is_named(settings: dict, words: str) -> None:
    given = {"model": network, "methods": ["mabn"], "epochs": 1, "seeds": 1, "timing": False}
    with pytest.raises((ValueError, TypeError), match=words):
        anybatch.compare(train=examples(64, 0), test=examples(8, 1), **{**given, **settings})


def test_what_only_the_last_method_refuses_is_said_before_a_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("anybatch.tools.training.train", train)
    state = random.getstate(), torch.get_rng_state().tolist(), repr(numpy.random.get_state())
    for options, words in (
        ({"window": 0}, "window=0"),
        ({"backward_stats": "x"}, "backward_stats='x'"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            anybatch.compare(
                network,
                examples(64, 0),
                examples(32, 1),
                ["mbn", "mabn"],
                options={"mabn": options},
                timing=False,
                progress=False,
            )
    assert state == (
        random.getstate(),
        torch.get_rng_state().tolist(),
        repr(numpy.random.get_state()),
    )


def test_frozen_norms_of_a_trained_network_are_compared() -> None:
    trained = network()
    trained(torch.randn(8, 6))
    how = {"epochs": 1, "seeds": 1, "timing": False}
    found = anybatch.compare(trained, examples(64, 0), examples(8, 1), ["frozen"], **how)
    assert [line.row for line in found.lines] == ["target", "baseline", "frozen"]


def test_methods_may_be_typed_in_capitals() -> None:
    how = {"epochs": 1, "seeds": 1, "timing": False}
    both = [
        anybatch.compare(network, examples(64, 0), examples(8, 1), [name], **how)
        for name in ("BRN", "brn")
    ]
    assert str(both[0]) == str(both[1])
    assert "step time" not in str(both[0])


def test_a_batch_of_one_is_compared_with_batch_norm_that_takes_it() -> None:
    how = {"epochs": 1, "seeds": 1, "timing": False, "batch_size": 1}
    found = anybatch.compare(network, examples(32, 0), examples(8, 1), ["mabn"], **how)
    assert [line.run.method for line in found.lines] == ["torch", "bn", "mabn"]


def test_a_comparison_leaves_random_states_alone() -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    anybatch.compare(network, examples(32, 0), examples(8, 1), ["mabn"], epochs=1, seeds=1)
    assert states() == before


def test_a_number_that_is_not_finite_is_in_the_table() -> None:
    how = {"epochs": 1, "seeds": 1, "timing": False, "score": lambda outputs, targets: math.nan}
    found = anybatch.compare(network, examples(32, 0), examples(8, 1), ["mabn"], **how)
    assert "nan %" in str(found)


def finished(**accuracies: tuple[float, ...]) -> FinishedComparison:
    seeds = tuple(range(len(accuracies["baseline"])))
    options = (("mbn", (("ideal_decay", 0.9),)),) if "mbn" in accuracies else ()
    comparison = Comparison(Run(), tuple(accuracies)[2:], seeds, options=options)
    from anybatch.tools.compare import table

    results = {
        one.key: {"accuracy": accuracies[row][k]}
        for row, runs in comparison.groups().items()
        for k, one in enumerate(runs)
    }
    return FinishedComparison(comparison, table(comparison, results), results, {}, "", 0.0)


def test_the_advice_of_a_comparison_is_what_its_numbers_say() -> None:
    target, base = (0.97, 0.98), (0.40, 0.44)
    sentence, call = advice(finished(target=target, baseline=base, mabn=(0.9, 0.92), gn=(0.8, 0.8)))
    assert sentence == "Best at 2: mabn."
    assert call == 'model = anybatch.convert(model, "mabn")'
    sentence, call = advice(finished(target=target, baseline=base, mbn=(0.9, 0.92)))
    assert "NormScheduler" in sentence
    assert call == 'model = anybatch.convert(model, "mbn", batch_size=2, ideal_decay=0.9)'
    sentence, call = advice(finished(target=target, baseline=base, mabn=(0.40, 0.46)))
    assert (sentence.split(":")[1], call) == (" keep it.", "")
    sentence, _ = advice(finished(target=(0.41, 0.42), baseline=base, gn=(0.9, 0.9)))
    assert sentence.startswith("Batch norm loses nothing at 2")
    none = finished(target=(0.41, 0.42), baseline=base, gn=(0.9, 0.9))
    assert none.lines[2].recovered is None  # of a loss smaller than the spread
    sentence, call = advice(finished(target=(0.9,), baseline=(0.4,), mabn=(0.9,)))
    assert (sentence.split(":")[0], call) == ("One seed per method is no evidence", "")


def test_rows_are_named_as_they_are_typed() -> None:
    from anybatch.tools.compare_report import row_name

    run = Run()
    names = [row_name(Line(row, run, (1.0,), 1.0, 0.0, None)) for row in ("target", "in", "mabn")]
    assert names == ["batch norm (target)", "in", "mabn"]


class InADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(x)}


def test_outputs_in_a_dict_reach_ones_own_loss_and_score() -> None:
    data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    found = anybatch.compare(
        InADict,
        data,
        data,
        ["bn"],
        epochs=1,
        seeds=1,
        loss=lambda o, t: nn.functional.cross_entropy(o["logits"], t),
        score=lambda o, t: (o["logits"].argmax(1) == t).float().mean(),
    )
    assert all(0 <= line.mean <= 1 for line in found.lines)
