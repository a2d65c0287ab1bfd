"""What every network goes through with every method: convert, infer, train a step, go back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch.conversion import convert, plan, to_batchnorm
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.conversion.observe import observe, tensors_in
from anybatch.core.norm_layer import NormLayer
from anybatch.layers import VirtualDataset
from anybatch.registry import METHODS
from zoo.listing import Listed, randomize


def floats(value: object) -> list[Tensor]:
    """The tensors of floating point in a nest."""
    return [t for t in tensors_in(value) if t.is_floating_point()]


def outputs(model: nn.Module, network: Listed, inputs: Any) -> list[Tensor]:
    """What a network gives in inference, from the same random numbers each time."""
    torch.manual_seed(11)
    if network.look is None:
        return floats(observe(model, inputs))
    with torch.no_grad():
        return floats(network.look(model.eval(), inputs))


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, as a share of the largest value."""
    assert len(ours) == len(theirs) > 0
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        known = torch.isfinite(b)  # scores of what is masked out are infinite
        assert torch.equal(known, torch.isfinite(a))
        if known.any():
            scale = b[known].abs().max().clamp_min(1.0)
            worst = max(worst, float((a[known] - b[known]).abs().max() / scale))
    return worst


def norms_of(model: nn.Module) -> list[str]:
    """Names of a network's batch norms, frozen ones too."""
    return [name for name, module in model.named_modules() if is_batch_norm(module)]


def built(network: Listed) -> nn.Module:
    """The network with the look of a trained one; it has a batch norm."""
    return copy.deepcopy(_original(network.build))


@lru_cache(maxsize=1)
def _original(build: Callable[[], nn.Module]) -> nn.Module:
    """A network, made once for all methods: some take long to be drawn."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        model = randomize(build()).eval()
    assert norms_of(model), "there is no batch norm in it"
    return model


def require(network: Listed, library: str, version: str | None = None) -> None:
    """Skip a network that needs a package that is not there.

    Also skip one that this version of its library does not have, or builds from other settings,
    unless it is the version that the list was made with (None: it was made from documentation).
    """
    for package in network.needs:
        pytest.importorskip(package)
    installed = import_module(library).__version__
    if version is not None and installed.startswith(f"{version}."):
        return
    try:
        outputs(built(network), network, network.inputs(network.batch))
    except Exception as error:  # any difference of another version
        first = str(error).partition("\n")[0]
        pytest.skip(f"{library} {installed}: {type(error).__name__}: {first}")


def step(model: nn.Module, inputs: object) -> float:
    """One step of SGD on a random projection of the outputs; checks the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    result = model(*args, **(inputs if isinstance(inputs, dict) else {}))
    trained = [t for t in floats(result) if t.requires_grad]
    assert trained, "nothing that comes out has a gradient"
    loss = sum((t * torch.randn_like(t)).nan_to_num(0.0, 0.0, 0.0).mean() for t in trained)
    optimizer.zero_grad()
    loss.backward()
    graded = [n for n, p in model.named_parameters() if p.grad is not None]
    assert graded
    wrong = [n for n, p in model.named_parameters() if p.grad is not None and _wild(p.grad)]
    assert not wrong, f"gradients that are not finite: {wrong[:5]}"
    optimizer.step()
    return float(loss.detach())


def _wild(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor).all())


def chosen(model: nn.Module, method: str) -> Callable[[str, nn.Module], bool] | None:
    """All norms; for instance norm those with anything to normalize over."""
    if method != "in":
        return None
    refused = {r.name for r in plan(model, "in").having("refuse") if "linear layer" in r.reason}
    return lambda name, module: name not in refused


def check_conversion(network: Listed, method: str) -> None:
    """Convert a trained network, compare its inference, train a step, go back, compare again."""
    if (words := network.refused.get(method)) is not None:
        with pytest.raises(ValueError, match=words):
            convert(built(network), method, example_inputs=network.inputs(network.batch))
        return
    model = built(network)
    if refused_as_unbound(model, method, network.inputs(network.batch)):
        return
    row = METHODS[method]
    inputs = network.inputs(network.batch)
    before = outputs(model, network, inputs)
    keys = set(model.state_dict())
    where = chosen(model, method)
    expected = [n for n in norms_of(model) if where is None or where(n, model.get_submodule(n))]
    convert(model, method, batch_size=network.batch, example_inputs=inputs, where=where)
    check_converted(model, method, expected)
    if row.exact_eval:
        assert distance(outputs(model, network, inputs), before) <= network.tolerance
        assert keys <= set(model.state_dict())

    check_training(model, method, inputs)

    after = outputs(model, network, inputs)
    ours = [name for name, module in model.named_modules() if isinstance(module, NormLayer)]
    if ours and not row.folds:
        with pytest.raises(ValueError, match="nothing was changed") as refusal:
            to_batchnorm(model)
        assert all(f"  {name}: " in str(refusal.value) for name in ours)
        return
    to_batchnorm(model)
    assert distance(outputs(model, network, inputs), after) <= network.tolerance
    assert not any(type(m).__module__.startswith("anybatch") for m in model.modules())
    if row.exact_eval:  # norms that were frozen count batches now
        assert keys <= (now := set(model.state_dict()))
        assert all(key.endswith("num_batches_tracked") for key in now - keys)


def refused_as_unbound(model: nn.Module, method: str, inputs: Any) -> bool:
    """Check that a method that binds refuses a network in which it can bind no norm."""
    if not METHODS[method].binds or plan(model, method, example_inputs=inputs).having("convert"):
        return False
    with pytest.raises(ValueError, match="none can be bound"):
        convert(model, method, example_inputs=inputs)
    return True


def check_converted(model: nn.Module, method: str, expected: list[str]) -> None:
    """Every norm is of the method; one that was not bound to a layer stays a batch norm."""
    for name in expected:
        module = model.get_submodule(name)
        dims = getattr(module, "dims", None) or 2
        layer = METHODS[method].layer(dims)
        assert isinstance(module, layer) or (METHODS[method].binds and is_batch_norm(module))


def check_training(model: nn.Module, method: str, inputs: Any) -> None:
    """One step leaves finite parameters, buffers and inference behind."""
    torch.manual_seed(2)
    run = VirtualDataset(model, 0.0, 1.0, 2) if METHODS[method].wraps else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        assert math.isfinite(step(run.train(), inputs))
    for norm in norms_of(model):
        for name, tensor in model.get_submodule(norm).state_dict().items():
            assert not (tensor.is_floating_point() and _wild(tensor)), f"{norm}.{name}"


def check_batch_of_one(network: Listed, method: str) -> None:
    """A step at batch 1, where torch's batch norm may have a single value a channel."""
    model = built(network)
    if refused_as_unbound(model, method, network.inputs(network.batch)):
        return
    convert(model, method, example_inputs=network.inputs(network.batch))
    check_training(model, method, network.inputs(1))
