"""Converted networks in torch.jit and torch.fx: the same outputs, or an error with a way out."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import anybatch
from anybatch.registry import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS_OF_OURS = [name for name, m in METHODS.items() if m.builder is None and not m.wraps]


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8)
    model = nn.Sequential(*layers, nn.BatchNorm2d(8), *head)
    options = {"num_groups": 4} if method == "bgn" else {}
    anybatch.convert(model, method, **options)
    model(torch.randn(4, 3, 8, 8))
    return model.eval()


ALL = [*METHODS_OF_OURS, "frozen"]
X = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)


@pytest.mark.few(6)
@pytest.mark.parametrize("method", ALL)
def test_a_traced_network_is_saved_and_gives_the_same(method: str, tmp_path: Path) -> None:
    model = network(method)
    torch.jit.trace(model, X).save(tmp_path / "traced.pt")
    found = torch.jit.load(tmp_path / "traced.pt")(X)
    torch.testing.assert_close(found, model(X))


@pytest.mark.parametrize("method", METHODS_OF_OURS)
def test_a_trace_in_training_is_refused_with_a_way_out(method: str) -> None:
    model = network(method).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"torch.jit.trace: .*to_batchnorm"):
        torch.jit.trace(model, X)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.few(5)
@pytest.mark.parametrize("method", ALL)
def test_a_script_is_refused_with_a_way_out_that_works(method: str) -> None:
    model = network(method)
    with pytest.raises(RuntimeError, match=r"torch.jit.script: .*to_batchnorm"):
        torch.jit.script(model)
    if method == "frozen" or METHODS[method].folds:
        plain = torch.jit.script(anybatch.to_batchnorm(copy.deepcopy(model)))
        torch.testing.assert_close(plain(X), model(X))


@pytest.mark.parametrize("method", ALL)
def test_a_symbolic_trace_keeps_layers_as_leaves(method: str) -> None:
    model = network(method)
    graph = torch.fx.symbolic_trace(model)
    assert sum(node.op == "call_module" for node in graph.graph.nodes) == 9
    torch.testing.assert_close(graph(X), model(X))


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="input of type list"):
        anybatch.BatchNorm1d(2)([[1.0, 2.0]])
