"""A converted network leaves Python: torch.export, ONNX and its runtime give the same outputs."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import anybatch
from anybatch.registry import METHODS

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)

AFFINE = [name for name, method in METHODS.items() if method.folds]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(method: str, **options: object) -> nn.Module:
    """A network after a few steps, in evaluation mode."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    anybatch.convert(model, method, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = anybatch.VirtualDataset(model, 0.0, 1.0, 2) if METHODS[method].wraps else model
    for _ in range(5):
        optimizer.zero_grad()
        run(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return model.eval()


def through_onnx(model: nn.Module, path: Path) -> tuple[torch.Tensor, list[str]]:
    """The output of ONNX's runtime for another batch size, and the operators in the file."""
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.onnx.export(
        model, (X,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    (found,) = session.run(None, {name: X[:3].numpy()})
    return torch.from_numpy(found), [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.few(3)
@pytest.mark.parametrize("method", AFFINE)
def test_an_exported_program_gives_the_same(method: str) -> None:
    torch._dynamo.reset()
    model = trained(method)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(X[:3]), model(X[:3]))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("batch_norm" in name for name in names)
    assert not any("anybatch" in name for name in names)


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.skipif(torch.__version__ < "2.7", reason="it does not know the newer onnxscript")
@pytest.mark.parametrize("method", AFFINE)
def test_onnx_runs_it_as_batch_normalization(method: str, tmp_path: Path) -> None:
    model = trained(method)
    found, operators = through_onnx(model, tmp_path / "net.onnx")
    torch.testing.assert_close(found, model(X[:3]), rtol=1e-4, atol=1e-5)
    assert set(operators) <= {"Conv", "BatchNormalization", "Relu", "Reshape", "Flatten", "Gemm"}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "options"), [("bn", {"example_weight": 0.2}), ("bgn", {})])
def test_onnx_runs_what_depends_on_the_example(method: str, options: dict, tmp_path: Path) -> None:
    model = trained(method, **options)
    found, _ = through_onnx(model, tmp_path / "net.onnx")
    torch.testing.assert_close(found, model(X[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.families
@pytest.mark.few(1)
@pytest.mark.parametrize("method", AFFINE)
def test_folded_and_plain_networks_are_the_same_in_onnx(method: str, tmp_path: Path) -> None:
    model = trained(method)
    expected = model(X[:3])
    folded, operators = through_onnx(anybatch.fold(copy.deepcopy(model)), tmp_path / "folded.onnx")
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)
    assert "BatchNormalization" not in operators


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_and_functional_calls_give_the_same(method: str) -> None:
    model = trained(method)
    expected = model(X).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected)
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(functional_call(model, parts, (X,)), expected)


@pytest.mark.parametrize("method", AFFINE)
def test_an_ensemble_runs_under_vmap(method: str) -> None:
    models = [trained(method), trained(method)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.5)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def run(parts: dict, state: dict, x: torch.Tensor) -> torch.Tensor:
        return functional_call(base, (parts, state), (x,))

    found = vmap(run, (0, 0, None))(parameters, buffers, X)
    # The convolutions of all models are one there, whose sums have another order.
    wanted = torch.stack([model(X) for model in models])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
