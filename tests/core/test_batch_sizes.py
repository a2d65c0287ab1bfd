"""Any batch size: nothing raises, nothing ends in NaN, what cannot be learnt is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anybatch.backends import use_fused
from method_cases import CENTRED, NAMES, SAMPLED, batch, finite, make, same, state, step, train


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3, 37])
@pytest.mark.parametrize("spatial", [(), (1, 1), (1, 7), (7, 5)], ids=str)
def test_any_shape_trains(name: str, channels: int, spatial: tuple[int, ...]) -> None:
    layer = make(name, channels, 2 if spatial else 1)
    for examples in (2, 1, 3, 0, 5, 1, 8, 17, 1):
        y, grad = step(layer, torch.randn(examples, channels, *spatial))
        assert y.shape == grad.shape == (examples, channels, *spatial)
        assert y.isfinite().all()
        assert grad.isfinite().all()
        assert finite(state(layer))
        assert finite({n: p.grad for n, p in layer.named_parameters()})
    assert layer.eval()(torch.randn(1, channels, *spatial)).isfinite().all()


@pytest.mark.parametrize("name", [name for name in CENTRED if name != "cbn"])  # has a window
def test_one_value_a_channel_is_normalized_by_the_running_statistics(name: str) -> None:
    options = {"num_groups": 6} if name == "bgn" else {}
    layer = make(name, dims=1, **options)
    for _ in range(5):
        step(layer, torch.randn(8, 6))
    before, x = state(layer), torch.randn(1, 6)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y, grad = step(layer, x)
    expected = F.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)
    assert torch.allclose(y, expected, atol=1e-6)
    assert same(before, state(layer))
    assert grad.abs().sum() > 0


def test_one_value_a_channel_is_a_second_moment_to_the_uncentred_form() -> None:
    layer = make("mabn", dims=1)
    step(layer, torch.full((1, 6), 3.0))
    assert layer.num_batches_tracked == 1
    assert torch.allclose(layer.running_var, torch.full((6,), 0.98 + 0.02 * 9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_leaves_no_trace(name: str, training: bool) -> None:
    layer = make(name)
    train(layer, 4)
    layer.train(training)
    layer.zero_grad()
    before = state(layer)
    y, grad = step(layer, torch.zeros(0, 6, 4, 3))
    assert y.shape == grad.shape == (0, 6, 4, 3)
    assert same(before, state(layer))
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_channel_that_is_not_finite_is_not_remembered(name: str, bad: float) -> None:
    layer = make(name, num_groups=6) if name == "bgn" else make(name)
    train(layer, 9)
    before = state(layer)
    x = batch(2)
    if name in SAMPLED:  # one value may not be in the sample
        x[:, 2] = bad
    x[1, 2, 0, 0] = bad
    with torch.no_grad():
        layer(x)
    after = state(layer)
    for key in ("running_mean", "running_var"):
        assert after[key][2] == before[key][2]
    others = [0, 1, 3, 4, 5]
    assert (after["running_var"][others] != before["running_var"][others]).all()
    assert finite(after)
    y, grad = step(layer, batch(2))
    assert y.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("fused", ["auto", "never"])
def test_averages_start_with_the_first_whole_batch(fused: str) -> None:
    use_fused(fused)
    layer = make("mbn", batch_size=2, affine=True)
    layer.set_progress(3, 3)  # lambda is large, as where a trained network is converted
    x = batch(4)
    x[0, 2] = torch.inf
    with torch.no_grad():
        layer(x)
    reference = nn.BatchNorm2d(6)
    reference.load_state_dict(layer.state_dict(), strict=False)
    x = batch(4)
    with torch.no_grad():
        assert torch.allclose(layer(x), reference(x), atol=1e-5)
        assert layer(batch(4)).abs().max() < 20
    use_fused("auto")


@pytest.mark.parametrize("backward_stats", ["sma", "ema"])
@pytest.mark.parametrize("centered", [False, True])
def test_a_gradient_that_is_not_finite_is_not_remembered(
    backward_stats: str, centered: bool
) -> None:
    layer = make("mabn", backward_stats=backward_stats, centered=centered)
    train(layer, 9)
    before = layer.method_state["backward_average"].clone()
    x, dy = batch(2), torch.randn(2, 6, 4, 3)
    dy[0, 3, 1, 1] = torch.inf
    step(layer, x, dy)
    after = layer.method_state["backward_average"]
    assert after.isfinite().all()
    assert torch.equal(after[..., 3], before[..., 3])
    assert not torch.equal(after[..., 2], before[..., 2])
    assert step(layer, batch(2))[1].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_larger_norm_batch_size_than_batch_is_none(name: str) -> None:
    torch.manual_seed(0)
    one = make(name)
    torch.manual_seed(0)
    other = make(name, norm_batch_size=64)
    for _ in range(9):
        x, dy = batch(3), torch.randn(3, 6, 4, 3)
        for a, b in zip(step(one, x, dy), step(other, x, dy), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("examples", [6, 7])
def test_norm_batch_size_gives_what_successive_batches_give(name: str, examples: int) -> None:
    torch.manual_seed(0)
    whole = make(name, norm_batch_size=2).double()
    torch.manual_seed(0)
    split = make(name).double()
    for _ in range(6):
        x, dy = batch(examples).double(), torch.randn(examples, 6, 4, 3).double()
        y, grad = step(whole, x, dy)
        parts = [step(split, a, b) for a, b in zip(x.split(2), dy.split(2), strict=True)]
        assert torch.allclose(y, torch.cat([part[0] for part in parts]), atol=1e-10)
        assert torch.allclose(grad, torch.cat([part[1] for part in parts]), atol=1e-10)
    for key, value in state(split).items():
        assert torch.allclose(state(whole)[key], value, atol=1e-10), key
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_momentum_none_averages_over_all_batches(name: str) -> None:
    layer = make(name, momentum=None)
    seen = []
    for _ in range(7):
        x = batch(4)
        with torch.no_grad():
            layer(x)
        seen.append(x.mean((0, 2, 3)))
    if name not in ("mabn", *SAMPLED):
        assert torch.allclose(layer.running_mean, torch.stack(seen).mean(0), atol=1e-5)
    assert layer.num_batches_tracked == 7


@pytest.mark.every_case
@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_of_the_momentum_is_a_momentum_for_each_batch(name: str) -> None:
    layer, twin = make(name, momentum=0.2, momentum_warmup=3), make(name, momentum=0.2)
    twin.load_state_dict(layer.state_dict())
    for number in range(1, 18):  # from the 13th batch on it is 0.2
        twin.momentum = max(0.2, 3 / (number + 2))
        x = batch(4) * (1 + number)
        for one in (layer, twin):
            one(x).square().mean().backward()
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)
        if number == 1 and name not in ("mabn", *SAMPLED):  # initial values are gone
            torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("momentum", "weight"), [(None, 1 / 4), (1.0, 1.0), (0.0, 0.0), (0.2, 3 / 6)]
)
def test_a_warm_up_meets_every_momentum(momentum: float | None, weight: float) -> None:
    layer = make("bn", momentum=momentum, momentum_warmup=3)
    for _ in range(3):
        layer(batch(4))
    before, x = layer.running_mean.clone(), batch(4)
    layer(x)
    torch.testing.assert_close(
        layer.running_mean, before + weight * (x.mean((0, 2, 3)) - before), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (2.5, TypeError)])
def test_a_wrong_warm_up_of_the_momentum_is_named(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"momentum_warmup={value}"):
        make("bn", momentum_warmup=value)


def test_torch_raises_where_these_layers_do_not() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))
