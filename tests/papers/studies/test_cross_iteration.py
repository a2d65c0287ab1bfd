"""What cross-iteration batch norm rests on: predictions against autograd and against the layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch
from papers.studies.cross_iteration.compensation import (
    KINDS,
    Chain,
    Errors,
    _by_layer,
    _moments,
    compensation_errors,
    predict,
    step_seconds,
)
from papers.studies.cross_iteration.decay import Decay, gradient_decay
from papers.studies.cross_iteration.figures import decay_figure, error_figure

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func.jvp's first use


def trained(kind: str = "one layer", steps: int = 12) -> Chain:
    torch.manual_seed(0)
    net = Chain((1, 4, 6, 5), 3, window=4, kind=kind).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(net(torch.randn(3, 1, 6, 6).double()), torch.randint(3, (3,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def test_second_order_of_one_layer_is_exact() -> None:
    net = trained()
    now, old = net.pairs[-1][0].weight.detach() + 0.3, net.past[-1][0]
    mean, var = predict(old, None, now, "one layer, second order")
    true_mean, true_var = _by_layer(old, now)
    assert torch.allclose(mean, true_mean, atol=1e-10)
    assert torch.allclose(var, true_var, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_order_is_the_derivative(layers: int) -> None:
    net = trained()
    old = net.past[-1][0]
    assert old.earlier is not None
    kind = "one layer" if layers == 1 else "two layers"
    step, moved = 1e-5, torch.randn_like(old.weight)
    earlier_moved = torch.randn_like(old.earlier[0])
    mean, _ = predict(old, old.earlier[0] + step * earlier_moved, old.weight + step * moved, kind)
    start, _ = _moments(old, None, old.weight)
    earlier = old.earlier[0] + step * earlier_moved if layers == 2 else None
    end, _ = _moments(old, earlier, old.weight + step * moved)
    assert torch.allclose((mean - start) / step, (end - start) / step, atol=1e-3)
    assert not torch.allclose(mean, start, atol=1e-7)


def test_a_chain_that_compensates_one_layer_is_the_library() -> None:
    net = trained(steps=0)
    parts: list[nn.Module] = []
    for conv, norm in net.pairs:
        parts += [conv, norm, nn.ReLU()]
    ours = nn.Sequential(*parts)
    ours = copy.deepcopy(ours)
    anybatch.convert(ours, "cbn", window=4, gradient_sample=None, backward_stats="batch")
    head = copy.deepcopy(net.head)
    both = [
        torch.optim.SGD(net.parameters(), lr=0.05),
        torch.optim.SGD([*ours.parameters(), *head.parameters()], lr=0.05),
    ]
    for _ in range(9):
        x, y = torch.randn(3, 1, 6, 6).double(), torch.randint(3, (3,))
        first, second = net(x), head(ours(x).mean((2, 3)))
        assert torch.allclose(first, second, atol=1e-9)
        for optimizer, scores in zip(both, (first, second), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(scores, y).backward()
            optimizer.step()


@pytest.mark.exhaustive
def test_one_layer_cuts_the_error_by_half_where_one_layer_is_the_truth() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8) + torch.randn(64, 1, 1, 1), torch.randint(4, (64,))
    errors = compensation_errors(x, y, rate=0.003, window=4, steps=30)
    naive, one, second = (sum(errors.layer[kind]) for kind in KINDS[:3])
    assert one < naive / 2
    assert second < 1e-3
    assert sum(errors.network["two layers"]) < sum(errors.network["naive"])


def test_gradient_decay_is_that_of_the_whole_jacobian() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    ).double()
    x = torch.randn(4, 2, 8, 8).double()
    out = net[:4](x).transpose(0, 1).flatten(1).mean(1)
    squares = []
    for layer in (net[3], net[0]):
        rows = [torch.autograd.grad(o, layer.weight, retain_graph=True)[0] for o in out]
        squares.append(sum(float(row.square().sum()) for row in rows))
    decay = gradient_decay(net, x, back=1, probes=400)
    assert decay.mean[0] == decay.square[0] == 1
    assert decay.mean[1] == pytest.approx((squares[1] / squares[0]) ** 0.5, rel=0.1)
    with pytest.raises(ValueError, match="give two"):
        gradient_decay(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), x.float())


@pytest.mark.exhaustive
def test_a_step_is_timed_and_a_wrong_kind_is_refused() -> None:
    x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
    assert set(step_seconds(x, y, batch_size=2, rounds=1)) == set(KINDS)
    with pytest.raises(ValueError, match="kind='three layers'"):
        Chain((1, 2, 2), 3, kind="three layers")


def test_figures_of_the_cross_iteration_study_are_drawn() -> None:
    from anybatch.evaluation.figures import png

    table = {kind: [0.1, 0.2] for kind in KINDS}
    assert png(error_figure(Errors(table, table)))[:4] == b"\x89PNG"
    decay = Decay([1.0, 0.3], [1.0, 0.4])
    assert png(decay_figure({"fresh": decay}))[:4] == b"\x89PNG"
