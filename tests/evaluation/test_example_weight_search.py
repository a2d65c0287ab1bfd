"""The tuned example weight: its curve against float64, its choice, its refusals."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch
import reference
from anybatch.evaluation.example_weight_search import CANDIDATES, tune_example_weight
from processes import spawn

ALPHAS = (0.0, 0.1, 0.4, 1.0)
METHODS = ["torch", "bn", "ghost", "bgn", "gn"]


def network(method: str = "torch", classes: int = 7) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes)
    )
    if method != "torch":
        anybatch.convert(model, method, **({"num_groups": 4} if method in ("bgn", "gn") else {}))
    model = model.double()
    anybatch.recalibrate(model, [torch.randn(40, 2, 5, 5).double() * 3])
    return model


def data(examples: int = 23, classes: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, 2, 5, 5).double(), torch.randint(classes, (examples,))


def slow_curves(model: nn.Sequential, x: Tensor, y: Tensor, alphas: tuple[float, ...]) -> dict:
    """Every metric at every alpha, all examples at once, by the reference's norm."""
    curves: dict[str, list[float]] = {"loss": [], "top1": [], "top5": []}
    conv, norm, _, _, head = model
    for alpha in alphas:
        with torch.no_grad():
            z = conv(x)
            flat = z.flatten(2)
            groups = getattr(norm, "num_groups", 8)
            scores = head(reference.weighed(flat, norm, groups, alpha).relu().flatten(1))
        log = scores - scores.exp().sum(1, keepdim=True).log()
        curves["loss"].append(float(-sum(log[i, y[i]] for i in range(len(y))) / len(y)))
        ranks = [int((scores[i] > scores[i, y[i]]).sum()) for i in range(len(y))]
        curves["top1"].append(sum(rank < 1 for rank in ranks) / len(y))
        curves["top5"].append(sum(rank < 5 for rank in ranks) / len(y))
    return curves


@pytest.mark.few(6)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", ["loss", "top1", "top5"])
@pytest.mark.parametrize("in_one_pass", [True, False])
def test_curves_are_those_of_the_reference(method: str, metric: str, in_one_pass: bool) -> None:
    model, (x, y) = network(method), data()
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    result = tune_example_weight(
        model, loader, metric, candidates=ALPHAS[::-1], in_one_pass=in_one_pass
    )
    expected = slow_curves(model, x, y, ALPHAS)
    assert result.alphas == ALPHAS
    for name, curve in expected.items():
        assert result.curves[name] == pytest.approx(curve, rel=1e-6), name
    assert result.values == result.curves[metric]
    best = min(expected["loss"]) if metric == "loss" else max(expected[metric])
    assert result.best_value == pytest.approx(best, rel=1e-6)
    assert result.plain == {"gn": 1.0, "bgn": 0.5}.get(method, 0.0)
    assert result.examples == 23
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_candidate_is_plain_inference_to_the_bit(method: str) -> None:
    model, (x, y) = network(method), data()
    result = tune_example_weight(model, [(x, y)], candidates=[0.0, 1.0])
    if method != "bgn":
        with torch.no_grad():
            expected = F.cross_entropy(model.eval()(x).float(), y, reduction="sum").double() / 23
        assert result.plain_value == float(expected)


@pytest.mark.parametrize("method", METHODS)
def test_apply_sets_the_best_example_weight(method: str) -> None:
    model, (x, y) = network(method).eval(), data()
    result = tune_example_weight(model, [(x, y)], candidates=[0.3])
    model = result.apply(model)
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y))
    assert loss == pytest.approx(result.best_value, rel=1e-6)
    assert model[1].example_weight == 0.3


def test_each_batch_is_read_once_for_all_candidates() -> None:
    stream = iter([data(4), data(3)])
    assert tune_example_weight(network(), stream).alphas == CANDIDATES
    with pytest.raises(ValueError, match="it can be read once, and in_one_pass=False takes 16"):
        tune_example_weight(network(), iter([data()]), in_one_pass=False)


def test_ties_go_to_the_lower_loss_then_to_the_network_as_it_is() -> None:
    model = network(classes=2)
    x, y = data(classes=2)
    result = tune_example_weight(model, [(x, y)], lambda output, target: 1.0)
    assert result.best == 0.0
    y = model.eval()(x).argmax(1)
    result = tune_example_weight(model, [(x, y)], "top1", candidates=[0.0, 0.001])
    assert result.values == (1.0, 1.0)
    assert result.best == result.alphas[result.curves["loss"].index(min(result.curves["loss"]))]


def test_a_metric_of_ones_own() -> None:
    def error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(1)

    model, x = network(), torch.randn(9, 2, 5, 5).double()
    y = model.eval()(x).detach()
    batches = list(zip(x.split(4), y.split(4), strict=True))
    result = tune_example_weight(model, batches, error, candidates=ALPHAS)
    assert (result.metric, result.best) == ("error", 0.0)
    assert result.best_value < 1e-30
    worst = tune_example_weight(model, batches, error, candidates=ALPHAS, maximize=True)
    assert worst.best_value == max(result.values)
    mean = tune_example_weight(
        model, batches, lambda o, t: float(error(o, t).mean()), candidates=ALPHAS
    )
    assert mean.values == pytest.approx(result.values)


def test_dictionaries_and_a_forward_of_ones_own() -> None:
    model, (x, y) = network(), data()
    plain = tune_example_weight(model, [(x, y)])
    other = tune_example_weight(
        model, [{"image": x, "labels": y}], forward=lambda m, b: {"logits": m(b["image"])}
    )
    assert plain.values == other.values


def test_positions_that_do_not_count_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    x, y = torch.randn(4, 2, 6, 6), torch.randint(3, (4, 4, 4))
    y[:, :2] = -100
    result = tune_example_weight(model, [(x, y)], candidates=[0.0])
    scores = model.eval()(x).detach()
    assert result.best_value == pytest.approx(float(F.cross_entropy(scores, y)), rel=1e-5)
    right = (scores.argmax(1) == y)[:, 2:].float().mean()
    assert result.curves["top1"][0] == pytest.approx(float(right))


def test_candidates_with_a_value_that_is_not_finite_are_never_best() -> None:
    values = iter([math.nan, 3.0, math.inf])
    result = tune_example_weight(
        network(), [data()], lambda o, t: next(values), candidates=[0.0, 0.1, 0.2]
    )
    assert result.best == 0.1
    with pytest.raises(ValueError, match="finite at no candidate"):
        tune_example_weight(network(), [data()], lambda o, t: math.nan)


def test_the_result_prints_plots_and_is_data(tmp_path: Path) -> None:
    result = tune_example_weight(network(), [data()], candidates=[0.0, 0.2])
    text = str(result)
    assert text.splitlines()[0].split() == ["alpha", "loss", "top1", "top5"]
    assert f"best loss at alpha = {result.best:g}, 23 examples" in text
    assert json.loads(json.dumps(result.to_dict()))["curves"]["loss"] == list(result.values)
    result.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tune_example_weight(network(), [data()], candidates=[0.0])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'anybatch\[tools\]'"):
        result.plot()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "accuracy"}, ValueError, "metric='accuracy': give one of 'loss', 'top1'"),
        ({"metric": 3}, TypeError, "metric=3"),
        ({"candidates": []}, ValueError, r"candidates=\[\]"),
        ({"candidates": [0.0, 1.2]}, ValueError, "candidates=1.2"),
        ({"candidates": ["a"]}, TypeError, "candidates='a'"),
        ({"where": "nothing"}, ValueError, "where='nothing'"),
        ({"max_batches": 0}, ValueError, "max_batches=0"),
        ({"loader": []}, ValueError, "gave no batch"),
        ({"loader": [data()[0]]}, ValueError, "has no target"),
        ({"loader": [(data()[0], torch.full((23,), -100))]}, ValueError, "no target that counts"),
    ],
)
def test_tune_example_weight_refuses_wrong_arguments(
    options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        tune_example_weight(**{"model": network(), "loader": [data()], **options})


def test_top5_needs_more_than_five_classes() -> None:
    with pytest.raises(ValueError, match="5 classes"):
        tune_example_weight(network(classes=5), [data(classes=5)], "top5")


def test_a_group_norm_without_averages_is_told_how_to_get_them() -> None:
    with pytest.raises(ValueError, match="anybatch.recalibrate"):
        tune_example_weight(nn.Sequential(nn.GroupNorm(1, 2)), [data()])


def test_a_failure_leaves_the_network_as_it_was() -> None:
    model, (x, y) = network("ghost"), data()
    model[1].example_weight = 0.25

    def broken():
        yield x, y
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        tune_example_weight(model, broken())
    assert model[1].example_weight == 0.25
    assert model.training


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_of_one_example_of_one_value(count: int) -> None:
    """At weight 1 a norm is one of single values, whose output is its shift."""
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    model(torch.randn(8, 4))
    data = [(torch.randn(n, 4), torch.arange(n)) for n in (2, count)]
    result = tune_example_weight(model, data)
    assert len(result.values) == len(CANDIDATES)
    model = anybatch.set_example_weight(model, 1.0).eval()
    shift = model[1].bias.expand(1, 16)
    torch.testing.assert_close(model[1](torch.randn(1, 16)), shift, rtol=0, atol=1e-3)


def test_candidates_are_a_list() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match=r"candidates=0.5: give a list of numbers from 0 to 1"):
        tune_example_weight(model, [], candidates=0.5)  # type: ignore[arg-type]


def _tune_in_processes(rank: int) -> None:
    torch.manual_seed(0)
    model, (x, y) = network("bn"), data()
    alone = tune_example_weight(model, [(x, y)], candidates=ALPHAS, process_group=_this_one())
    mine = [(x[:9], y[:9]), (x[9:20], y[9:20])] if rank == 0 else [(x[20:], y[20:])]
    for in_one_pass in (True, False):
        pooled = tune_example_weight(model, mine, candidates=ALPHAS, in_one_pass=in_one_pass)
        assert (pooled.best, pooled.examples) == (alone.best, 23)
        for name, values in alone.curves.items():
            assert pooled.curves[name] == pytest.approx(values, rel=1e-6)  # float32 scores
    own = tune_example_weight(model, mine, lambda output, target: output[:, 0], candidates=ALPHAS)
    assert own.examples == 23
    broken = [*mine, (x, torch.full((23,), 9 if rank else 0))]  # class 9 of 7
    with pytest.raises(IndexError if rank else RuntimeError):
        tune_example_weight(model, broken, candidates=ALPHAS)
    assert model[1].example_weight == 0


def _this_one() -> torch.distributed.ProcessGroup:
    groups = [torch.distributed.new_group([rank]) for rank in range(2)]
    return groups[torch.distributed.get_rank()]


def test_processes_pool_their_data_and_choose_the_same_weight() -> None:
    spawn(_tune_in_processes)
