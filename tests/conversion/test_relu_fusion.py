"""Networks whose norms do the ReLU that follows them, beside the same networks unfused."""

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import anybatch
from anybatch.backends import use_fused
from anybatch.conversion import convert, fold, plan, to_batchnorm
from anybatch.conversion.graph_trace import GraphTracer
from anybatch.conversion.norm_types import is_norm
from anybatch.conversion.observe import tensors_in
from anybatch.conversion.relu_fusion.find import find_fusions
from anybatch.conversion.relu_fusion.fused_block import fusions
from anybatch.core.norm_layer import NormLayer
from anybatch.tools.networks import build
from conversion.networks import NETWORKS, Network
from zoo.listing import randomize

SOME = ["bn", "mabn", "cbn", "ghost", "bgn", "fs"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What norms were asked to do beside their own, call by call."""
    made: list[str | None] = []
    own = NormLayer.forward

    def forward(self: NormLayer, *args: Any, **given: Any) -> Tensor:
        adds = "add and " if given.get("residual") is not None else ""
        made.append(f"{adds}relu" if given.get("activation") else None)
        return own(self, *args, **given)

    monkeypatch.setattr(NormLayer, "forward", forward)
    return made


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    use_fused("auto")


# --- blocks as people write them --------------------------------------------------


class Basic(nn.Module):
    """A residual block whose ReLU is one module, called twice, in place."""

    def __init__(self, inputs: int = 6, outputs: int = 6, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Ways(nn.Module):
    """A ReLU, and an addition, in each of the ways there are; nothing there is uncertain."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(8))
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.convs[0](x)))
        x = torch.relu(self.norms[1](self.convs[1](x)))
        x = self.norms[2](self.convs[2](x)).relu_()
        x = F.relu(self.drop(self.norms[3](self.convs[3](x))), inplace=True)
        x = torch.relu(torch.add(x, self.norms[4](self.convs[4](x))))
        x = self.norms[5](self.convs[5](x)).add(x).relu()
        x = self.norms[6](self.convs[6](x)).add_(x).relu_()
        return F.relu_(x + self.drop(self.norms[7](self.convs[7](x))))


def two_blocks() -> nn.Module:
    stem = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    return nn.Sequential(*stem, Basic(), Basic(6, 8, 2), nn.Flatten(), nn.Linear(128, 4))


def inputs_of(model: nn.Module, examples: int = 4) -> Tensor:
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    return torch.randn(examples, channels, 8, 8).double()


def fused_rows(model: nn.Module, method: str = "bn", **given: Any) -> dict[str, str | None]:
    return {row.name: row.fuses for row in plan(model, method, fuse=True, **given).rows}


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in plan(model, "bn", fuse=True).rows}


def course(model: nn.Module, make: Callable[[], Any], steps: int = 3) -> list[Tensor]:
    """Outputs, gradients and state along some steps of training."""
    torch.manual_seed(2)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.01), []
    model.train()
    for _ in range(steps):
        inputs = make()
        given = [t.requires_grad_() for t in tensors_in(inputs) if t.is_floating_point()]
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        floats = [t for t in tensors_in(result) if t.is_floating_point()]
        loss = sum((t * torch.randn_like(t)).mean() for t in floats)
        optimizer.zero_grad()
        loss.backward()
        found += [t.detach().clone() for t in floats] + [
            t.grad for t in given if t.grad is not None
        ]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found + [t.double() for t in model.state_dict().values()]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, as a share of the largest value."""
    assert len(ours) == len(theirs)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in pairs)


def pair(model: nn.Module, method: str = "bn", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network converted and fused, and the same unfused."""
    twin = copy.deepcopy(model)
    return convert(model, method, fuse=True, **options), convert(twin, method, **options)


# --- what is fused, and that it is the same -----------------------------------------


def test_a_residual_network_is_fused() -> None:
    assert fused_rows(two_blocks()) == {
        "1": "relu",
        "3.bn1": "relu",
        "3.bn2": "add and relu",
        "4.bn1": "relu",
        "4.bn2": "add and relu",
        "4.downsample.1": None,
    }
    assert "fused with add and relu" in reasons(two_blocks())["3.bn2"]
    assert "1 norms" not in str(plan(two_blocks(), "bn"))
    assert str(plan(two_blocks(), "bn", fuse=True)).endswith("ReLUs fused into 5 norms.")


def test_all_ways_to_write_it_are_found() -> None:
    rows = fused_rows(Ways())
    assert list(rows.values()) == ["relu"] * 4 + ["add and relu"] * 4


@pytest.mark.few(3)
@pytest.mark.parametrize("method", SOME)
@pytest.mark.parametrize("make", [two_blocks, Ways], ids=["residual", "ways"])
@pytest.mark.parametrize("choice", ["auto", "never"])
def test_training_with_fused_relu_is_the_same(
    make: Callable[[], nn.Module], method: str, choice: str, calls: list[str | None]
) -> None:
    use_fused(choice)
    options = {"fs": {"ratio": 0.5}, "bgn": {"num_groups": 2}}.get(method, {})
    ours, theirs = pair(make().double(), method, **options)
    found = course(ours, lambda: inputs_of(ours))
    assert calls.count("relu") == 3 * sum(v == "relu" for v in fused_rows(make()).values())
    assert calls.count("add and relu") >= 3 * 2
    expected = course(theirs, lambda: inputs_of(ours))
    assert apart(found, expected) <= (0 if choice == "never" else 1e-11)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = inputs_of(ours)
    calls.clear()
    assert apart([ours.eval()(x).detach()], [theirs.eval()(x).detach()]) <= 1e-11
    assert set(calls) == {None}  # inference is the block's own forward


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["resnet8", "resnet50", "vgg11", "mlp"])
def test_networks_of_the_tools_are_fused(name: str) -> None:
    shape = {"mlp": (12,), "vgg11": (3, 32, 32)}.get(name, (3, 16, 16))
    model = build(name, 5, shape).double()
    rows = fused_rows(model)
    assert list(rows.values()).count(None) == {"resnet8": 2, "resnet50": 4}.get(name, 0)
    ours, theirs = pair(model)
    draw = lambda: torch.randn(3, *shape).double()  # noqa: E731
    assert apart(course(ours, draw, 2), course(theirs, draw, 2)) <= 1e-9


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "network",
    [pytest.param(n, id=k, marks=[pytest.mark.slow] * n.slow) for k, n in NETWORKS.items()],
)
def test_real_networks_train_alike_with_and_without_fusion(network: Network) -> None:
    torch.manual_seed(1)
    model = randomize(network.build())
    for module in model.modules():  # random numbers are drawn in the same order, but not dropped
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = network.inputs(2)
    before = list(model.state_dict())
    ours, theirs = pair(model, example_inputs=inputs)
    expected = course(theirs, lambda: copy.deepcopy(inputs), 2)
    assert apart(course(ours, lambda: copy.deepcopy(inputs), 2), expected) <= 1e-3
    assert list(ours.state_dict()) == before
    assert not any(fusions(to_batchnorm(ours)))


def test_memory_for_backward_is_no_more() -> None:
    found = []
    for model in pair(two_blocks()):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(torch.randn(4, 3, 8, 8))
        found.append(sum(sizes.values()))
        del output
    assert found[0] <= found[1]


def test_a_norm_that_is_called_in_two_places() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x)).relu()
            return torch.tanh(self.norm(self.conv(x)))

    assert fused_rows(Shared()) == {"norm": "relu"}
    ours, theirs = pair(Shared().double())
    assert (
        apart(course(ours, lambda: inputs_of(ours)), course(theirs, lambda: inputs_of(ours)))
        < 1e-11
    )


# --- what is not certain stays as it is ---------------------------------------------


class Odd(nn.Module):
    """A block of which a test says what its forward does."""

    def __init__(self, does: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()
        self.other = nn.BatchNorm2d(6)
        self.drop, self.gelu, self.count, self.seen = nn.Dropout(0.5), nn.GELU(), 0, []
        self.does = does

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.does(self, x)


def counts(m: Odd, x: Tensor) -> Tensor:
    m.count += 1
    return m.relu(m.norm(x))


def notes(m: Odd, x: Tensor) -> Tensor:
    m.seen.append(1)
    return m.relu(m.norm(x))


def without_gradients(m: Odd, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.relu(m.norm(x))


def constant(m: Odd, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) + torch.ones(1)


def random_layer(m: Odd, x: Tensor) -> Tensor:
    return x if random.random() < 0.5 else m.relu(m.norm(x))


def random_scale(m: Odd, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) * float(torch.rand(()))


def asks(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.relu(m.norm(y[0] if isinstance(y, tuple) else y))


def changes_input(m: Odd, x: Tensor) -> Tensor:
    y = m.norm(x)
    x *= 2
    return m.relu(y + x)


def adds_in_place(m: Odd, x: Tensor) -> Tensor:
    z = m.conv(x)
    z += m.norm(x)
    return m.relu(z)


def again(m: Odd, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return m.relu(y + m.norm(x))


def of_a_batch(m: Odd, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) if x.shape[0] > 1 else x


def uses_twice(m: Odd, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.relu(y) + y


def reads_written(m: Odd, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    m.relu(y + x)
    y += 1
    return y


STAY: dict[str, tuple[Callable[..., Tensor], str]] = {
    "used twice": (uses_twice, "used more than once"),
    "its result is not used": (reads_written, "used more than once"),
    "the end": (lambda m, x: m.norm(x), "its output is the block's"),
    "dropout": (lambda m, x: m.relu(m.drop(m.norm(x))), "Dropout 'drop' follows it"),
    "gelu": (lambda m, x: m.gelu(m.norm(x)), "GELU 'gelu' follows it"),
    "a number": (lambda m, x: m.relu(m.norm(x) + 1.0), "add() follows it"),
    "twice itself": (lambda m, x: m.relu((y := m.norm(x)) + y), "add() follows it"),
    "alpha": (lambda m, x: m.relu(torch.add(m.norm(x), x, alpha=2)), "add() follows it"),
    "two additions": (lambda m, x: m.relu(m.norm(x) + x + x), "add() follows it"),
    "in place": (adds_in_place, "added to a tensor in place"),
    "input changes": (changes_input, "could change before the addition"),
    "a mask": (lambda m, x: m.relu(m.norm(x, x[:, 0] > 0)), "called with more than its input"),
    "counts": (counts, "changes attributes"),
    "notes": (notes, "changes attributes"),
    "modes": (without_gradients, "computes in a mode of its own"),
    "constants": (constant, "changes attributes"),
    "python's random": (random_layer, "draws random numbers"),
    "torch's random": (random_scale, "draws random numbers"),
    "types": (asks, "asks of what type a value is"),
    "sizes": (of_a_batch, "does not trace"),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("case", STAY)
def test_a_norm_whose_use_is_not_certain_stays(case: str) -> None:
    does, reason = STAY[case]
    model = nn.Sequential(Odd(does))
    attributes, drawn = dict(model[0].__dict__), random.getstate()
    find_fusions(model, [model[0].norm])
    assert random.getstate() == drawn
    assert reason in reasons(model)["0.norm"]
    assert fused_rows(model)["0.norm"] is None
    assert model[0].__dict__ == attributes
    assert model[0].seen == []
    assert not any(fusions(convert(model, "bn", fuse=True)))


def test_of_two_norms_that_are_added_one_adds() -> None:
    model = Odd(lambda m, x: m.relu(m.norm(x) + m.other(x)))
    assert fused_rows(model) == {"norm": None, "other": "add and relu"}
    assert "another norm adds its output" in reasons(model)["norm"]


def test_an_earlier_norm_adds_where_nothing_can_change_its_input() -> None:
    assert fused_rows(Odd(again))["norm"] == "add and relu"  # its second call

    def later(m: Odd, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        return m.relu(y + m.gelu(x))

    model = Odd(later)
    assert fused_rows(model)["norm"] == "add and relu"
    ours, theirs = pair(Odd(later).double())
    draw = lambda: inputs_of(ours)  # noqa: E731
    assert apart(course(ours, draw), course(theirs, draw)) <= 1e-11


def test_a_branch_of_training_is_that_of_training(calls: list[str | None]) -> None:
    def does(m: Odd, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.relu(y) if m.training else torch.tanh(y)

    ours, theirs = pair(Odd(does).double())
    assert (
        apart(course(ours, lambda: inputs_of(ours)), course(theirs, lambda: inputs_of(ours)))
        < 1e-11
    )
    assert calls[:3] == ["relu"] * 3
    x = inputs_of(ours)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x))


def test_hooks_keep_their_modules_as_they_are() -> None:
    model, seen = two_blocks(), []
    model[2].register_forward_hook(lambda *_: seen.append("relu"))
    model[3].bn1.register_forward_hook(lambda *_: seen.append("norm"))
    assert "hooks on what follows it would not be called" in reasons(model)["1"]
    assert "hooks on it would see other values" in reasons(model)["3.bn1"]
    convert(model, "bn", fuse=True)(torch.randn(4, 3, 8, 8))
    assert seen == ["relu", "norm"]


def test_torchs_own_layers_and_strangers_stay() -> None:
    assert "GroupNorm only normalizes" in plan(two_blocks(), "gn", fuse=True).rows[0].reason
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    model.forward = lambda x: nn.Sequential.forward(model, x)  # type: ignore[method-assign]
    assert "is none of its class" in reasons(model)["1"]
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()))
    assert "is a graph already" in next(iter(reasons(graph).values()))


def test_containers_are_no_blocks() -> None:
    assert fused_rows(NETWORKS["wave"].build()) == {"norms.down": "relu", "norms.up": None}
    assert "its output is the block's" in reasons(NETWORKS["wave"].build())["norms.up"]


def test_where_and_methods_choose_the_norms_that_are_fused() -> None:
    assert fused_rows(two_blocks(), where="3.*")["1"] is None
    assert fused_rows(two_blocks(), where="3.*")["3.bn1"] == "relu"
    model = convert(two_blocks(), {"1": "gn", "*": "bn"}, fuse=True)
    assert type(model).__name__ == "Sequential"
    assert type(model[3]).__name__ == "FusedBasic"


# --- a fused block is what it was ----------------------------------------------------


@pytest.fixture
def fused() -> nn.Module:
    model: nn.Module = convert(two_blocks().double(), "bn", fuse=True)
    return model


def same_with_and_without(model: nn.Module, calls: list[str | None], what: set[str | None]) -> None:
    """Check that a network trains as its plain twin does, and what its norms do in it."""
    twin = copy.deepcopy(model)
    for block, _ in list(fusions(twin)):
        block.__dict__.pop("_fusion")
    expected = course(twin, lambda: inputs_of(model))
    calls.clear()
    assert apart(course(model, lambda: inputs_of(model)), expected) <= 1e-11
    assert set(calls) == what


ALL = {"relu", "add and relu", None}


def test_copies_and_pickles_are_fused_too(fused: nn.Module, calls: list[str | None]) -> None:
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    ):
        assert isinstance(other[3], Basic)
        assert other[3].relu is not fused[3].relu
        same_with_and_without(other, calls, ALL)
        other[3].bn1.weight.data.zero_()  # of its own, not of the original
        assert not torch.equal(other(x := inputs_of(fused)), fused(x))


def test_types_names_and_parts_stay() -> None:
    model = two_blocks()
    parts, names = list(model.modules()), list(model.state_dict())
    parameters = list(model.parameters())
    convert(model, "bn", fuse=True)
    assert type(model).__name__ == "FusedSequential"
    assert isinstance(model[3], Basic)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    kept = [a is b for a, b in zip(model.modules(), parts, strict=True)]
    assert kept.count(False) == 6  # the norms


def test_a_listener_gets_what_it_would_have_got(fused: nn.Module, calls: list[str | None]) -> None:
    seen: list[Tensor] = []
    handle = fused[3].relu.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))
    same_with_and_without(fused, calls, ALL)
    assert len(seen) >= 6
    handle.remove()
    handle = fused[4].bn2.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))
    seen.clear()
    fused(inputs_of(fused))
    assert float(seen[0].min()) < 0  # what a norm puts out
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        same_with_and_without(fused, calls, {None})
    finally:
        everywhere.remove()
    same_with_and_without(fused, calls, ALL)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[3], "relu", nn.GELU()),
        lambda m: setattr(m[3], "downsample", nn.Identity()),
        lambda m: delattr(m[4], "downsample") or setattr(m[4], "downsample", nn.Conv2d(6, 8, 2, 2)),
        lambda m: m[3]._modules.update(relu=nn.Tanh()),
        lambda m: m[3].add_module("relu", nn.Tanh()),
        lambda m: m.insert(1, nn.Tanh()),
        lambda m: setattr(m[3].relu, "forward", torch.tanh),
        lambda m: setattr(m[3], "bn2", nn.BatchNorm2d(6)),
        lambda m: anybatch.convert(m, "brn"),
        lambda m: anybatch.convert(m, "gn", where="3.bn2", num_groups=2),
    ],
)
def test_a_change_of_the_network_is_seen(
    fused: nn.Module, change: Callable[..., Any], calls: list[str | None]
) -> None:
    change(fused)
    fused.double()
    twin = copy.deepcopy(fused)
    for block in twin.modules():
        block.__dict__.pop("_fusion", None)
    expected = course(twin, lambda: inputs_of(fused))
    assert apart(course(fused, lambda: inputs_of(fused)), expected) <= 1e-11


def test_parameters_may_be_set(fused: nn.Module, calls: list[str | None]) -> None:
    fused[3].scale = nn.Parameter(torch.ones(1).double())
    same_with_and_without(fused, calls, ALL)


def test_chains_can_be_cut_and_made_longer(fused: nn.Module) -> None:
    x = inputs_of(fused)
    start = fused[:2]
    assert bool((start(x) < 0).any())  # the norm alone
    longer = copy.deepcopy(fused).append(nn.Tanh())
    assert torch.allclose(longer(x), torch.tanh(fused(x)))


def test_without_gradients_and_under_autocast_the_own_forward_runs(
    fused: nn.Module, calls: list[str | None]
) -> None:
    with torch.no_grad():
        fused(inputs_of(fused))
    with torch.autocast("cpu", torch.bfloat16):
        fused.float()(inputs_of(fused).float())
    assert set(calls) == {None}


def test_residuals_of_other_types_are_added_as_torch_adds() -> None:
    def does(m: Odd, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        y += x.float().mean((2, 3), keepdim=True)
        return m.relu(y)

    ours, theirs = pair(Odd(does).double())
    assert fused_rows(ours)["norm"] == "add and relu"
    draw = lambda: inputs_of(ours)  # noqa: E731
    assert apart(course(ours, draw), course(theirs, draw)) <= 1e-11
    assert ours(inputs_of(ours)).dtype == torch.float64


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_compiler_sees_the_own_forward_whole(fused: nn.Module) -> None:
    torch._dynamo.reset()
    x = inputs_of(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with anybatch.no_update():
        assert torch.allclose(compiled(x), fused(x))
    fused.eval()
    program = torch.export.export(fused, (x,))
    assert torch.allclose(program.module()(x), fused(x))


def test_a_tracer_sees_the_own_forward(fused: nn.Module) -> None:
    assert anybatch.plan(fused, "brn").rows[1].feeder == "3.conv1"
    graph = fx.GraphModule(
        fused[3], GraphTracer(lambda module: is_norm(module) or None).trace(fused[3])
    )
    x = torch.randn(2, 6, 8, 8).double()
    with anybatch.no_update():
        assert torch.allclose(graph(x), fused[3](x))


# --- there and back --------------------------------------------------------------------


def test_a_fused_network_goes_back_to_plain_torch(fused: nn.Module) -> None:
    course(fused, lambda: inputs_of(fused))
    fused.eval()
    x = inputs_of(fused)
    before = fused(x)
    types = {name: type(module) for name, module in two_blocks().named_modules()}
    plain = to_batchnorm(copy.deepcopy(fused))
    assert {name: type(module) for name, module in plain.named_modules()} == types
    assert not any("_fusion" in module.__dict__ for module in plain.modules())
    assert torch.allclose(plain(x), before)
    pickle.loads(pickle.dumps(plain))
    folded = fold(fused, x)
    assert type(folded) is nn.Sequential
    assert type(folded[3]) is Basic
    assert torch.allclose(folded(x), before)


def test_a_fold_that_fails_leaves_the_fusion(fused: nn.Module, calls: list[str | None]) -> None:
    fused.eval()
    with pytest.raises(ValueError, match="example_inputs"):
        fold(fused, torch.randn(2, 5))
    same_with_and_without(fused, calls, ALL)


def test_a_fused_network_is_converted_again(fused: nn.Module, calls: list[str | None]) -> None:
    convert(fused, "bn", fuse=True)  # all of it is so already
    same_with_and_without(fused, calls, ALL)
    convert(fused, "mbn", fuse=True)
    same_with_and_without(fused, calls, ALL)
    convert(fused, "mbn")
    assert not any(fusions(fused))
    assert type(fused) is nn.Sequential
    convert(fused, "mbn", fuse=True)
    same_with_and_without(fused, calls, ALL)
    convert(fused, "gn", fuse=True, num_groups=2)
    assert not any(fusions(fused))


def test_a_conversion_that_fails_leaves_the_fusion(
    fused: nn.Module, calls: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="examples_per_group=0"):
        convert(fused, "bgn", fuse=True, examples_per_group=0)
    same_with_and_without(fused, calls, ALL)


def test_a_plan_of_fusion_changes_nothing() -> None:
    model = two_blocks()
    types = [type(module) for module in model.modules()]
    plan(model, "bn", fuse=True)
    assert [type(module) for module in model.modules()] == types
    assert not any("_fusion" in module.__dict__ for module in model.modules())


def test_a_switch_of_the_method_keeps_the_fusion(fused: nn.Module, calls: list[str | None]) -> None:
    scheduler = anybatch.NormScheduler(fused, 3, switch={2: "brn"})
    scheduler.step()
    assert type(fused[1]).__name__ == "BatchRenorm2d"
    same_with_and_without(fused, calls, ALL)
