"""`plan` decides norm by norm, shows why, and does nothing."""

import copy
import json
import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from anybatch.conversion import Plan, convert, plan
from anybatch.conversion.decisions import is_fresh
from conversion.networks import Tabular, convnet
from zoo.listing import randomize


def test_a_plan_is_a_table() -> None:
    assert "a linear layer's are with centralize=True only" in str(plan(Tabular(), "mabn"))
    lines = str(plan(Tabular(), "mabn", centralize=True)).splitlines()
    assert lines[0].split() == ["norm", "kind", "fed", "by", "decision", "becomes", "why"]
    assert lines[2].split()[:2] == ["first", "BatchNorm1d"]
    assert "fed by the input" in lines[2]
    assert "weights of 'body.0' centralized" in lines[3]
    assert lines[-1] == (
        "3 of 3 norms converted; the model is fresh (no batch seen); weights of 2 layers "
        "centralized."
    )


def test_a_plan_is_data() -> None:
    made = plan(Tabular(), {"body.*": "mabn", "first": "bn"})
    again = json.loads(json.dumps(made.to_dict()))
    assert again == made.to_dict()
    assert again["method"] == {"body.*": "mabn", "first": "bn"}
    assert [row["becomes"] for row in again["rows"]] == [
        "BatchNorm1d",
        "MovingAverageBatchNorm1d",
        "MovingAverageBatchNorm1d",
    ]


def test_a_plan_of_conversion_changes_nothing() -> None:
    model = randomize(convnet())
    before = copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    plan(model, "mabn", centralize=True)
    assert types == [type(module) for module in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_network_without_norms_has_an_empty_plan() -> None:
    made = plan(nn.Sequential(nn.Linear(2, 2)), "bn")
    assert made == Plan("bn", (), made.notes)
    assert "0 of 0 norms" in str(made)


# Which weights are centralized


def reasons(model: nn.Module, method: str = "mabn", **arguments: object) -> dict[str, str]:
    return {row.name: row.reason for row in plan(model, method, **arguments).rows}


def test_a_fresh_network_has_its_weights_centralized() -> None:
    made = plan(convnet(), "mabn")
    assert [row.centralizes for row in made.rows] == ["0", "3"]
    assert made.rows[0].reason == "eval output changes: weights of '0' centralized"


def test_trained_weights_are_left_alone_unless_asked() -> None:
    model = randomize(convnet())
    assert "left alone: trained" in reasons(model)["1"]
    assert [row.centralizes for row in plan(model, "mabn", centralize=True).rows] == ["0", "3"]
    assert "trained, as far as its statistics tell" in str(plan(model, "mabn"))


def test_nothing_is_centralized_where_it_is_not_wanted() -> None:
    for made in (
        plan(convnet(), "mabn", centralize=False),
        plan(convnet(), "mabn", centered=True),
        plan(convnet(), "brn"),
    ):
        assert [row.centralizes for row in made.rows] == [None, None]
    assert [row.centralizes for row in plan(convnet(), "brn", centralize=True).rows] == ["0", "3"]


class Padded(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))


class Named(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 1, groups=4), "one weight an output channel"),
        (Padded(4, 4, 3), "computes its weight or output in its own way"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "in its own way"),
        (Named(4, 4, 3), "of a class of its own, Named"),
    ],
)
def test_weights_that_cannot_be_centralized_are_said_why(conv: nn.Module, reason: str) -> None:
    made = plan(nn.Sequential(conv, nn.BatchNorm2d(4)), "mabn")
    assert made.rows[0].centralizes is None
    assert reason in made.rows[0].reason


def test_fresh_is_what_the_statistics_say() -> None:
    assert is_fresh(convnet())
    assert not is_fresh(randomize(convnet()))
    assert not is_fresh(nn.Linear(2, 2))
    assert not is_fresh(nn.BatchNorm1d(3, track_running_stats=False))
    trained = convnet()
    trained[1](torch.randn(2, 8, 4, 4))
    assert not is_fresh(trained)


# What is kept and what is refused


def test_norms_that_are_no_batch_norm_are_kept() -> None:
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    model = nn.Sequential(
        nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4), DetrFrozenBatchNorm2d(4)
    )
    made = plan(model, "bn")
    assert [row.decision for row in made.rows] == ["keep"] * 3 + ["convert"]
    assert {row.reason for row in made.rows[:3]} == {"no batch norm"}
    assert "frozen until now" in made.rows[3].reason


def test_where_leaves_norms_out_of_a_plan() -> None:
    by_name = plan(Tabular(), "bn", where="body.*")
    by_module = plan(Tabular(), "bn", where=lambda name, module: module.num_features > 6)
    for made in (by_name, by_module):
        assert [row.decision for row in made.rows] == ["keep", "convert", "convert"]
        assert made.rows[0].reason == "left out by where"


def test_the_first_pattern_that_matches_counts() -> None:
    made = plan(Tabular(), {"body.4": "gn", "body.*": "brn"})
    assert [row.becomes for row in made.rows] == ["BatchNorm1d", "BatchRenorm1d", "GroupNorm"]
    assert made.rows[0].reason == "matches no pattern of method"


@pytest.mark.parametrize("method", ["bgn", "gn", "ln"])
def test_methods_that_change_the_output_say_so(method: str) -> None:
    assert "eval output changes" in reasons(convnet(), method)["1"]
    assert ("dropped" in reasons(convnet(), method)["1"]) == (method != "bgn")


def test_a_shared_norm_is_one_row_with_all_its_names() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)
    (row,) = plan(model, "bn").rows
    assert (row.name, row.also, row.feeder) == ("1", ("3",), "called twice")
    assert str(plan(model, "bn")).splitlines()[2].startswith("1, 3")


class Caching(nn.Module):
    """Draws a number of Python's, and keeps what it computed in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.cache: dict[str, list[Any]] = {"a": []}

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        numpy.random.random()
        y: Tensor = self.norm(self.conv(x))
        self.cache["a"].append(y)
        return y


def test_random_states_and_nested_containers_are_left_alone() -> None:
    model = Caching()
    states = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()
    plan(model, "mabn")
    assert model.cache == {"a": []}
    after = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()
    assert after == states


@pytest.mark.parametrize("method", ["mabn", "cbn"])
def test_a_recomputed_weight_is_not_computed(method: str) -> None:
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(conv, nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["bn", "l1", "range", "mabn"])
def test_the_plan_says_whether_the_output_in_evaluation_stays(method: str) -> None:
    torch.manual_seed(0)
    tracks = method == "mabn"
    norm = nn.BatchNorm2d(4, track_running_stats=tracks)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval(), torch.randn(4, 3, 8, 8)
    before = model(x)
    (row,) = plan(model, method).rows
    same = torch.allclose(convert(model, method)(x), before, atol=1e-5)
    assert ("eval output unchanged" in row.reason) is same
