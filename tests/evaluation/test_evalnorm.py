"""Weights that foretell training batches: least squares in float64, 1 / n where it must be."""

import copy

import pytest
import torch
from torch import Tensor, nn

import anybatch
import reference
from anybatch.evaluation.evalnorm import eval_norm

METHODS = ["torch", "bn", "ghost", "mbn", "brn"]


def network(method: str = "torch") -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)
    )
    if method != "torch":
        anybatch.convert(model, method)
    anybatch.recalibrate(model, [torch.randn(30, 2, 5, 5) * 2])
    return model.double()


def expected(model: nn.Sequential, x: Tensor, size: int) -> list[float]:
    conv, first, relu, other, second = model
    with torch.no_grad():
        z = conv(x)
        parts = [
            nn.functional.batch_norm(p, None, None, first.weight, first.bias, True, eps=first.eps)
            for p in z.split(size)
        ]
        w = other(relu(torch.cat(parts)))
    return [
        reference.foretelling(v, norm.running_mean, norm.running_var, norm.eps, size)
        for v, norm in ((z, first), (w, second))
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 3])
def test_weights_are_those_of_least_squares(method: str, size: int) -> None:
    model, x = network(method), torch.randn(12, 2, 5, 5).double() * 2
    result = eval_norm(model, x.split(6), size)
    assert list(result.alphas) == ["1", "4"]
    assert list(result.alphas.values()) == pytest.approx(expected(model, x, size), rel=1e-6)
    assert result.batches == 12 // size


def test_a_rest_is_normalized_but_not_measured() -> None:
    model, x = network(), torch.randn(7, 2, 5, 5).double()
    result = eval_norm(model, [x], 3)
    first = model[0](x[:6]).detach()
    wanted = reference.foretelling(first, model[1].running_mean, model[1].running_var, 1e-5, 3)
    assert result.alphas["1"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_of_independent_examples_each_weighs_its_share(size: int) -> None:
    norm = nn.BatchNorm1d(8)
    result = eval_norm(norm, torch.randn(9600, 8).split(960), size)
    assert result.alphas[""] == pytest.approx(1 / size, rel=0.05)


def test_apply_sets_a_weight_a_layer() -> None:
    model = network()
    result = eval_norm(model, [torch.randn(20, 2, 5, 5).double()], 2)
    model = result.apply(model)
    assert [model[1].example_weight, model[4].example_weight] == list(result.alphas.values())
    assert "1 / 2 is 0.5" in str(result)
    assert result.to_dict()["alphas"] == result.alphas


@pytest.mark.parametrize("method", [*METHODS, "mabn", "bgn", "gn"])
@pytest.mark.parametrize("fails", [False, True])
def test_eval_norm_leaves_the_network_as_it_was(method: str, fails: bool) -> None:
    model = network(method).float()
    before = copy.deepcopy(model.state_dict())
    attributes = [sorted(vars(m)) for m in model.modules()]

    def batches():
        yield torch.randn(4, 2, 5, 5)
        if fails:
            raise OSError("disk")

    if method in ("mabn", "bgn", "gn"):
        with pytest.raises(ValueError, match="no batch norm to do this for"):
            eval_norm(model, batches(), 2)
    elif fails:
        with pytest.raises(OSError, match="disk"):
            eval_norm(model, batches(), 2)
    else:
        eval_norm(model, batches(), 2)
    assert model.training
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("loader", "size", "message"),
    [
        ([torch.randn(4, 3)], 0, "batch_size=0"),
        ([torch.randn(4, 3)], 1, "batch_size=1: alone in its batch"),
        ([torch.randn(4, 3)], 8, "batch_size=8: the loader gave a batch of 4"),
        ([torch.full((4, 3), torch.nan)], 2, "not finite"),
        ([], 2, "gave no batch"),
    ],
    ids=["0", "1", "8", "nan", "empty"],
)
def test_eval_norm_refuses_wrong_arguments(loader: list, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_norm(nn.BatchNorm1d(3), loader, size)


def test_frozen_layers_and_others_are_left_out() -> None:
    model = nn.Sequential(anybatch.BatchNorm1d(3), anybatch.BatchNorm1d(3))
    anybatch.freeze(model, where="0")
    assert list(eval_norm(model, [torch.randn(8, 3)], 2).alphas) == ["1"]
    assert list(eval_norm(nn.Sequential(model[1], nn.BatchNorm1d(3)), [torch.randn(8, 3)], 2,
                          where="1").alphas) == ["1"]  # fmt: skip
