"""The kernels as operators: what a compiler sees of them, and that they are the layers."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.backends import use_fused
from anybatch.backends.torch_library import TorchLibraryBackend, method_arguments, state_of
from anybatch.core.grouping import partition
from deployment.test_compile import compare
from method_cases import make

pytest.importorskip("numba")
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["bn", "mbn", "mabn", "brn", "ghost", "bgn"]
OPTIONS: dict[str, dict[str, Any]] = {
    "mbn": {"batch_size": 6},
    "mabn": {"window": 2, "warmup_steps": 2, "renorm_warmup_steps": 3},
    "brn": {"warmup_steps": 2, "smooth": True},
}
NORMALIZE = torch.ops.anybatch.normalize.default
BACKWARD = torch.ops.anybatch.normalize_backward.default


@pytest.fixture(autouse=True)
def _always() -> Iterator[None]:
    torch._dynamo.reset()
    use_fused("always")
    yield
    use_fused("auto")
    torch._dynamo.reset()


class Graphs:
    """A compiler that keeps what it is given, forward and backward."""

    def __init__(self) -> None:
        self.targets: list[Any] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)(graph, inputs)

    def _keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            told = (node.target, *node.args[:1]) if node.op == "call_function" else ()
            self.targets += [one for one in told if isinstance(one, torch._ops.OpOverload)]
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)


def batch(number: int, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    torch.manual_seed(number)
    x = (torch.randn(shape, dtype=torch.float64) * (1 + number) + number).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def trained(layer: nn.Module, run: Any, shape: tuple[int, ...], *how: Any) -> list[Tensor]:
    """Outputs, gradients and state of some steps."""
    found = []
    for number in range(5):
        x = batch(number, shape, *how).requires_grad_()
        layer.zero_grad()
        y = run(x)
        (y * batch(number + 9, shape, *how)).sum().backward()
        found += [y, x.grad, *(p.grad.clone() for p in layer.parameters())]
        found += [value.clone() for value in layer.state_dict().values()]
        assert y.stride() == x.stride() == x.grad.stride()
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("norm_batch_size", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_layer_is_the_layer(name: str, norm_batch_size: int | None, last: bool) -> None:
    """Bit for bit: the loops are the same, and one of each operator is all of its graph's work."""
    shape, how = (6, 8, 5, 3), (torch.float64, last)
    layer = make(name, 8, norm_batch_size=norm_batch_size, **OPTIONS.get(name, {})).double()
    compiled, graphs = copy.deepcopy(layer), Graphs()
    run = torch.compile(compiled, fullgraph=True, backend=graphs)
    expected, found = trained(layer, layer, shape, *how), trained(compiled, run, shape, *how)
    assert graphs.targets.count(NORMALIZE) == graphs.targets.count(BACKWARD) == 1
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_operators_need_one_graph_for_all_steps_and_epochs(name: str) -> None:
    compare(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_operators_under_inductor_give_the_same(name: str) -> None:
    """Inductor lays convolutions out anew, channels last: strides are those that it finds."""
    compare(name, "inductor")


@pytest.mark.exhaustive
@pytest.mark.parametrize("choice", ["auto", "never"])
def test_elsewhere_a_compiler_gets_the_operators_of_torch(choice: str) -> None:
    use_fused(choice)
    layer, graphs = make("mabn", 8), Graphs()
    torch.compile(layer, backend=graphs)(
        torch.randn(4, 8, 3, 3, requires_grad=True)
    ).sum().backward()
    assert graphs.targets
    assert not {NORMALIZE, BACKWARD} & set(graphs.targets)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["masked", "without scale", "half", "limited", "centered"])
def test_what_the_kernels_do_not_know_takes_the_operators_of_torch(case: str) -> None:
    options: dict[str, Any] = {
        "without scale": {"affine": False},
        "limited": {"outlier_limit": 9.0},
        "centered": {"centered": True},
    }.get(case, {})
    layer, graphs = make("mabn" if case == "centered" else "bn", 8, **options), Graphs()
    x = torch.randn(4, 8, 3, 3).to(torch.bfloat16 if case == "half" else torch.float32)
    mask = torch.tensor([1, 1, 1, 0]).bool() if case == "masked" else None
    plain, run = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend=graphs)
    a, b = (one(x.clone().requires_grad_(), mask) for one in (plain, run))
    b.sum().backward()
    assert graphs.targets
    assert not {NORMALIZE, BACKWARD} & set(graphs.targets)
    torch.testing.assert_close(a, b, rtol=1e-2 if case == "half" else 1e-5, atol=1e-5)


def test_an_exported_training_graph_has_the_operator() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), make("brn", 8))
    program = torch.export.export(layer, (torch.randn(4, 3, 5, 5),))
    graphs = [part.graph for part in program.graph_module.modules() if hasattr(part, "graph")]
    assert NORMALIZE in [node.target for graph in graphs for node in graph.nodes]
    plain, x = copy.deepcopy(layer), torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(program.module()(x), plain(x), rtol=0, atol=0)


def given(name: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of both operators."""
    layer = make(name, 6, **OPTIONS.get(name, {}))
    cut = ([2, 2], [2], [4]) if name == "ghost" else ([4], [1], [4])
    how = (*cut, layer.num_statistics, 0.1, 1e-5, True)
    x, dy = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    spec = layer.method_spec(x, partition(4))
    state = (layer.running_mean, layer.running_var, layer.num_batches_tracked, *state_of(spec))
    weight, bias = layer.weight.detach(), layer.bias.detach()
    forward = (x, weight, bias, *state[:-3], *method_arguments(spec, spec.kept), *how)
    _, used = NORMALIZE(*forward)
    averages = (*state[-3:], *method_arguments(spec, spec.averages))
    return forward, (dy, x, weight, used, state[2], *averages, *how, True)


@pytest.mark.parametrize("name", NAMES)
def test_schemas_and_shapes_without_data_are_true(name: str) -> None:
    """torch's own check of an operator: what it says it writes, gives and may be traced as."""
    forward, backward = given(name)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(NORMALIZE, forward, test_utils=checks)
    torch.library.opcheck(BACKWARD, backward, test_utils=checks)
    torch.library.opcheck(BACKWARD, (*backward[:-1], False), test_utils=checks)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 1, 1), (1, 6, 3, 2)])
def test_operators_serve_any_rank_and_layout(shape: tuple[int, ...], gaps: bool) -> None:
    """A batch with gaps in memory is copied by the operator, and its gradient comes dense."""
    (_, weight, bias, *rest), (*_, wanted) = given("bn")
    x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if gaps else torch.randn(shape)
    x, dy, how = x.requires_grad_(), torch.randn(shape), (*rest[-4:],)
    cut = ([shape[0]], [1], [shape[0]])
    y, used = NORMALIZE(x.detach(), weight, bias, *rest[:-7], *cut, *how)
    none = (None, None, None, "", True, [], [])
    dx, (db, dw) = BACKWARD(dy, x.detach(), weight, used, rest[2], *none, *cut, *how, wanted)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    truth = nn.functional.batch_norm(x, None, None, weight, bias, True)
    truth.backward(dy)
    for a, b in ((y, truth), (dx, x.grad), (dw, weight.grad), (db, bias.grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_operators_without_a_compiler() -> None:
    row = torch.ones(6)
    assert TorchLibraryBackend().memory_obstacle(torch.randn(4, 6, 5), (row,) * 4)
    assert anybatch.convert(nn.BatchNorm1d(6), "bn")(torch.randn(4, 6)).grad_fn is not None
