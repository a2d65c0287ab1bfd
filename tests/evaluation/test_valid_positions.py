"""Recalibration, diagnosis and EvalNorm of a padded network use its valid positions only."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch
import reference

LENGTHS = torch.tensor([5, 2, 4, 3, 5, 1, 3, 4])
VALID = torch.arange(5) < LENGTHS.unsqueeze(1)


class Scores(nn.Module):
    """Norms between layers that see each position alone; one is given its mask as an argument."""

    def __init__(self, given: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)
        self.second, self.last, self.given = nn.Conv1d(4, 3, 1), nn.BatchNorm1d(3), given

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        more = (mask,) if self.given else ()
        y = self.second(torch.tanh(self.norm(self.first(x), *more)))
        z: Tensor = self.last(y, mask=mask) if self.given else self.last(y)
        return z


def by_mask(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    with anybatch.masked(model, batch[1]):
        return model(*batch)


def by_lengths(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    with anybatch.masked(model, lengths=batch[1].sum(1)):
        return model(*batch)


def by_argument(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return model(*batch)


WAYS = [by_mask, by_lengths, by_argument]


def batches(padding: float, count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        x = torch.randn(8, 2, 5, generator=generator) * 2 + 1
        valid = VALID.roll(number, 0)
        found.append((torch.where(valid.unsqueeze(1), x, padding), valid))
    return found


def network(method: str, way: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return anybatch.convert(Scores(given=way is by_argument), method)


@pytest.mark.parametrize("mode", ["layerwise", "together"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["bn", "mabn", "ghost", "cbn", "bs"])
def test_recalibrated_statistics_are_those_of_the_valid_values(
    method: str, way: Callable[..., Any], mode: Any
) -> None:
    model = network(method, way)
    result = anybatch.recalibrate(model, batches(50.0), forward=way, mode=mode)
    assert result.layers[0].values == 6 * int(LENGTHS.sum())
    inputs = torch.cat([model.first(x).movedim(1, -1)[valid] for x, valid in batches(50.0)])
    mean, var = reference.population(inputs.double())
    if not model.norm.centered:
        mean, var = torch.zeros_like(mean), inputs.double().square().mean(0)
    torch.testing.assert_close(model.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var.double(), var, rtol=1e-5, atol=1e-6)
    other = network(method, way)
    anybatch.recalibrate(other, batches(math.nan), forward=way, mode=mode)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_valid_positions_adds_nothing() -> None:
    model = network("bn", by_mask)
    more = [*batches(9.0), (torch.full((8, 2, 5), 1e6), torch.zeros(8, 5, dtype=torch.bool))]
    anybatch.recalibrate(model, more, forward=by_mask)
    other = network("bn", by_mask)
    anybatch.recalibrate(other, batches(9.0), forward=by_mask)
    assert torch.equal(model.norm.running_mean, other.norm.running_mean)
    assert torch.equal(model.norm.running_var, other.norm.running_var)


def trained(method: str, way: Callable[..., Any]) -> nn.Module:
    model = network(method, way)
    for _ in range(60):
        for batch in batches(50.0):
            way(model, batch)
    return model


def squares(model: nn.Module, way: Callable[..., Any]) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores = way(model, batch)
        return scores.movedim(1, -1)[batch[1]].square().sum() / batch[1].sum()

    return loss


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["bn", "mabn", "ghost"])
def test_a_diagnosis_does_not_depend_on_padding(method: str, way: Callable[..., Any]) -> None:
    found = []
    for padding in (50.0, 0.0, math.nan):
        torch.manual_seed(1)
        model = trained(method, way)
        diagnosis = anybatch.diagnose(model, batches(padding), forward=squares(model, way))
        found.append(diagnosis.to_dict()["layers"])
    pairs = [pair for other in found[1:] for pair in zip(found[0], other, strict=True)]
    for one, other in pairs:
        for name in ("values", "effective", "mean", "var", "g", "psi", "stale"):
            a, b = one[name], other[name]
            assert (a is None) == (b is None)
            for mine, its in zip(numbers(a), numbers(b), strict=True):
                assert mine == pytest.approx(its, rel=1e-3, abs=1e-5), name
        assert one["values"] == pytest.approx(float(LENGTHS.double().mean()) * 8)
        if method == "bn":
            assert one["stale"] < 0.2  # trained on these data


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [one for item in value.values() for one in numbers(item)]
    if isinstance(value, (list, tuple)):
        return [one for item in value for one in numbers(item)]
    return [] if value is None else [float(value)]


@pytest.mark.parametrize("way", WAYS)
def test_example_weights_do_not_depend_on_padding(way: Callable[..., Any]) -> None:
    found = []
    for padding in (50.0, -3.0):
        model = trained("bn", way)
        found.append(anybatch.eval_norm(model, batches(padding, 12), 4, forward=way).alphas)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_mask_that_is_true_everywhere_changes_no_example_weight() -> None:
    model = trained("bn", by_mask)
    whole = [(x, torch.ones(8, 5, dtype=torch.bool)) for x, _ in batches(1.0, 12)]
    plain = anybatch.eval_norm(model, whole, 4, forward=lambda m, b: m(*b)).alphas
    assert anybatch.eval_norm(model, whole, 4, forward=by_mask).alphas == pytest.approx(plain)


def test_example_weights_of_a_network_with_fused_activations() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1))
    data = [x for x, _ in batches(1.0, 12)]
    apart = anybatch.convert(copy.deepcopy(plain), "bn")
    fused = anybatch.convert(copy.deepcopy(plain), "bn", fuse=True)
    for model in (apart, fused):
        for x in data * 20:
            model(x)
    expected = anybatch.eval_norm(apart, data, 4).alphas
    assert anybatch.eval_norm(fused, data, 4).alphas == pytest.approx(expected)
