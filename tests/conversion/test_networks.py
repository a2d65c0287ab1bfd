"""Whole real networks: every method converts, trains at batch 2 and 1, and goes back."""

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from anybatch.conversion import NoEffectWarning, convert, fold, plan, to_batchnorm
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.conversion.observe import observe, tensors_in
from anybatch.core.norm_layer import NormLayer
from anybatch.layers import VirtualDataset
from anybatch.registry import METHODS
from conversion.networks import NETWORKS, Network
from zoo.listing import randomize

EXACT = [name for name, method in METHODS.items() if method.exact_eval]
each_network = pytest.mark.parametrize(
    "network",
    [pytest.param(n, id=k, marks=[pytest.mark.slow] * n.slow) for k, n in NETWORKS.items()],
)


def outputs(model: nn.Module, inputs: object) -> list[Tensor]:
    return [t for t in tensors_in(observe(model, inputs)) if t.is_floating_point()]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, as a share of the largest value."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in pairs)


def trained(network: Network) -> nn.Module:
    torch.manual_seed(1)
    return randomize(network.build())


def step(model: nn.Module, inputs: object) -> float:
    """One step of SGD on a random projection of the outputs."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    floats = [t for t in tensors_in(result) if t.is_floating_point()]
    loss = sum((t * torch.randn_like(t)).mean() for t in floats)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@each_network
def test_the_plan_names_every_norm_and_is_what_convert_does(network: Network) -> None:
    model = network.build()
    made = plan(model, "brn", example_inputs=network.inputs(1))
    norms = [name for name, module in model.named_modules() if is_batch_norm(module)]
    assert [row.name for row in made.having("convert")] == norms
    convert(model, "brn")
    for row in made.rows:
        assert type(model.get_submodule(row.name)).__name__ == row.becomes


@each_network
@pytest.mark.parametrize("method", EXACT)
def test_a_trained_real_network_keeps_its_eval_output(network: Network, method: str) -> None:
    model, inputs = trained(network), network.inputs(2)
    before = outputs(model, inputs)
    state = copy.deepcopy(model.state_dict())
    convert(model, method, batch_size=2, example_inputs=inputs)
    assert distance(outputs(model, inputs), before) <= 1e-5
    assert set(state) <= set(model.state_dict())

    to_batchnorm(model)
    assert distance(outputs(model, inputs), before) <= 1e-5
    assert set(state) == set(model.state_dict())
    assert not any(type(m).__module__.startswith("anybatch") for m in model.modules())


@pytest.mark.few(6)
@each_network
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_network_trains_at_batch_2_and_at_batch_1(network: Network, method: str) -> None:
    torch.manual_seed(2)
    model = network.build()
    where = _spatial(model) if method == "in" else None
    convert(model, method, example_inputs=network.inputs(2), where=where)
    if METHODS[method].wraps:
        model = VirtualDataset(model, 0.0, 1.0, 2)  # what the inputs are
    # torch's instance norm raises on one value, and so do the norms that cbn leaves as they are.
    for batch in (2,) if method in ("in", "cbn") else (2, 1):
        assert math.isfinite(step(model.train(), network.inputs(batch)))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert all(torch.isfinite(b).all() for b in model.buffers())
    assert all(torch.isfinite(t).all() for t in outputs(model, network.inputs(2)))


def _spatial(model: nn.Module):  # type: ignore[no-untyped-def]
    """Leave out norms after linear layers, where instance norm has nothing to normalize."""
    after_linear = {
        row.name for row in plan(model, "in").having("refuse") if "linear" in row.reason
    }
    return lambda name, module: name not in after_linear


@each_network
@pytest.mark.parametrize("method", [None, "mabn", "mbn"])
def test_folding_a_real_network_keeps_its_output(network: Network, method: str | None) -> None:
    model, inputs = trained(network), network.inputs(2)
    if method is not None:
        convert(model, method, example_inputs=inputs, centralize=True)
    model.eval()
    before = outputs(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        fold(model, inputs)
    assert distance(outputs(model, inputs), before) <= 1e-4
    assert any(isinstance(module, nn.Identity) for module in model.modules())


@pytest.mark.few(5)
@each_network
def test_state_and_copies_of_a_converted_network(network: Network) -> None:
    torch.manual_seed(3)
    inputs = network.inputs(2)
    model = convert(network.build(), "mabn", example_inputs=inputs)
    step(model.train(), inputs)
    twin = copy.deepcopy(model)
    other = convert(network.build(), "mabn", example_inputs=inputs)
    other.load_state_dict(model.state_dict())
    for copied in (twin, other):
        assert distance(outputs(copied, inputs), outputs(model, inputs)) == 0.0
        assert sum(isinstance(m, NormLayer) for m in copied.modules()) == sum(
            isinstance(m, NormLayer) for m in model.modules()
        )
