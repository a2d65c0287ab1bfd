"""Second derivatives, batched gradients and the transforms of torch.func."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    jacfwd,
    jacrev,
    stack_module_state,
    vmap,
)

import anybatch
from method_cases import NAMES, make

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
AVERAGED = ["mabn"]  # their backward pass averages gradients over steps
BUFFERS = ["bn", "sync", "ghost", "bgn", "ns", "l1", "range"]  # all their state is in buffers


def layer_of(name: str, **options: object) -> nn.Module:
    torch.manual_seed(3)
    layer = make(name, 4, 2, dtype=torch.float64, **options)
    if not options.get("track_running_stats", True) or "example_weight" in options:
        layer.eval()
    return layer


def batch(positions: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 4, positions, 2, dtype=torch.float64, generator=generator) * 2 + 1


def second_derivative_is_right(layer: nn.Module) -> bool:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    rows = (t.detach().clone().requires_grad_() for t in (layer.weight, layer.bias))
    with anybatch.no_update():
        return torch.autograd.gradgradcheck(
            run, (batch().requires_grad_(), *rows), atol=1e-4, fast_mode=True
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in AVERAGED])
def test_second_derivatives_in_training_are_right(name: str) -> None:
    if name == "range":  # whose extremes a finite difference moves
        pytest.skip("piecewise linear: checked by l1")
    assert second_derivative_is_right(layer_of(name))


@pytest.mark.parametrize("name", ["bn", "ghost", "bgn", "ns", "l1"])
def test_second_derivatives_without_running_statistics_are_right(name: str) -> None:
    assert second_derivative_is_right(layer_of(name, track_running_stats=False))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_in_evaluation_are_right(name: str) -> None:
    assert second_derivative_is_right(layer_of(name, example_weight=0.3))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["bn", "ghost", "bgn", "brn", "mbn"])
def test_a_gradient_penalty_trains(name: str, mode: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), make(name, 4, 2), nn.ReLU(), nn.Flatten())
    getattr(net, mode)()
    x = torch.randn(4, 2, 6, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (slope.flatten(1).norm(dim=1) - 1).square().mean().backward()
    assert net[0].weight.grad is not None
    assert bool(net[0].weight.grad.isfinite().all())


def test_a_second_derivative_that_does_not_exist_is_refused_with_a_way_out() -> None:
    x = batch().requires_grad_()
    layer = layer_of("mabn")
    with pytest.raises(RuntimeError, match="averages gradients over steps; freeze its statistics"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    anybatch.freeze(layer)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_batched_gradients_are_those_one_by_one(name: str) -> None:
    layer, x = layer_of(name), batch(3).requires_grad_()
    y = layer(x)
    dys = torch.randn(3, *y.shape, dtype=y.dtype)
    if name in AVERAGED:
        with pytest.raises(RuntimeError, match="a batch of gradients: .* averages gradients"):
            torch.autograd.grad(y, x, dys, is_grads_batched=True)
        return
    (found,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(found, torch.stack(expected))


def jacobian(layer: nn.Module, **options: bool) -> Tensor:
    return torch.autograd.functional.jacobian(layer, batch(), **options)


def forward_mode(layer: nn.Module) -> Tensor:
    """The derivative along one direction, times nothing else: a column of the Jacobian."""
    tangent = torch.zeros_like(batch())
    tangent[0, 0, 0, 0] = 1
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(batch(), tangent))
        return forward_ad.unpack_dual(y).tangent


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in AVERAGED])
def test_every_way_to_a_jacobian_gives_the_same(name: str) -> None:
    layer = layer_of(name)
    with anybatch.no_update():
        expected = jacobian(layer)
        torch.testing.assert_close(jacobian(layer, vectorize=True), expected)
        torch.testing.assert_close(jacrev(layer)(batch()), expected)
        torch.testing.assert_close(jacfwd(layer)(batch()), expected)
        torch.testing.assert_close(forward_mode(layer), expected[..., 0, 0, 0, 0])


def ensemble(name: str) -> tuple[list[nn.Module], nn.Module, dict, dict]:
    models = [layer_of(name), layer_of(name)]
    with torch.no_grad():
        models[1].weight.mul_(1.5)
    return models, copy.deepcopy(models[0]), *stack_module_state(models)


@pytest.mark.parametrize("name", NAMES)
def test_an_ensemble_trains_under_vmap_or_is_refused(name: str) -> None:
    models, base, parameters, buffers = ensemble(name)

    def loss(parameters: dict, buffers: dict, x: Tensor) -> tuple[Tensor, Tensor]:
        y = functional_call(base, (parameters, buffers), (x,))
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum(), y

    run = vmap(grad(loss, has_aux=True), (0, 0, None))
    if base.method_state:
        with pytest.raises(RuntimeError, match=r"torch.func: .* which are no buffers"):
            run(parameters, buffers, batch(3))
        return
    gradients, outputs = run(parameters, buffers, batch(3))
    for i, model in enumerate(models):
        y = model(batch(3))
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        torch.testing.assert_close(outputs[i], y)
        torch.testing.assert_close(gradients["weight"][i], model.weight.grad)
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[key][i], buffer)


@pytest.mark.parametrize("name", ["bn", "ghost", "bgn"])
@pytest.mark.parametrize("transform", [functionalize, vmap])
def test_state_that_a_transform_does_not_own_is_named(name: str, transform: object) -> None:
    x = batch() if transform is functionalize else batch().unsqueeze(0)
    layer = layer_of(name)
    with pytest.raises(RuntimeError, match="pass the buffers as arguments"):
        transform(layer)(x)
    before = copy.deepcopy(layer.state_dict())
    with anybatch.no_update():
        transform(layer)(x)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
