"""Batch normalization sampling: its indices, its passes, virtual examples around a network."""

import copy
import dataclasses
import io
import itertools
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
import reference
from anybatch.backends import use_fused
from anybatch.backends.aten.samples import random_positions
from anybatch.layers.sample_positions import patch_sides
from method_cases import VIRTUAL

REAL = ("naive", "batch", "feature", "points")
RANDOM = REAL[1:]
MIXED = ("virtual", "feature+virtual", "batch+virtual")
LAYERS = {
    1: anybatch.SampledBatchNorm1d,
    2: anybatch.SampledBatchNorm2d,
    3: anybatch.SampledBatchNorm3d,
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _path() -> Iterator[None]:
    yield
    use_fused("auto")


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients and running statistics of one step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    assert y.stride() == x.stride()
    assert x.grad is not None
    own = [layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    return [y.detach(), x.grad, *(tensor.clone() for tensor in own)]


def random_layer(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    layer = LAYERS[max(len(shape) - 2, 1)](shape[1], dtype=dtype, **options)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


# --- the passes ----------------------------------------------------------------


@pytest.mark.few(14)
@pytest.mark.parametrize("sample", [*REAL, *MIXED])
@pytest.mark.parametrize(
    "shape",
    [(9, 5), (9, 5, 7), (7, 3, 4, 5), (32, 24, 9, 11), (70, 130, 4, 4), (4, 3, 3, 4, 5)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_and_aten_passes_agree(
    sample: str, shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    layer = random_layer(shape, dtype, sample=sample, ratio=0.2, num_virtual=2, seed=5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for last in (False, True):
        if last and len(shape) < 4:
            continue
        x = torch.randn(shape, dtype=dtype) + 2
        x = x.contiguous(memory_format=LAST[len(shape)]) if last else x
        dy, results = torch.randn(shape, dtype=dtype), []
        for fused in ("auto", "never"):
            use_fused(fused)
            results.append(step(copy.deepcopy(layer), x, dy))
        for ours, theirs in zip(*results, strict=True):
            close = 1e-5 if dtype == torch.float32 else 1e-12
            assert torch.allclose(ours, theirs, rtol=close, atol=close * float(theirs.abs().max()))
    torch.set_num_threads(before)


@pytest.mark.parametrize("sample", REAL)
@pytest.mark.parametrize("fused", ["auto", "never"])
@pytest.mark.parametrize("last", [False, True])
def test_a_ratio_of_one_is_batch_norm_to_the_bit(sample: str, fused: str, last: bool) -> None:
    layer = random_layer((1, 6, 1, 1), sample=sample, ratio=1.0)
    norm, torchs = anybatch.BatchNorm2d(6), nn.BatchNorm2d(6)
    for other in (norm, torchs):
        own = other.state_dict()
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if k in own})
    use_fused(fused)
    for examples in (5, 8, 3):
        x = torch.randn(examples, 6, 7, 5)
        x = x.contiguous(memory_format=LAST[4]) if last else x
        dy = torch.randn(x.shape)
        runs = [step(one, x, dy) for one in (layer, norm, torchs)]
        for ours, theirs, plain in zip(*runs, strict=True):
            # The compiled path of small batches sums in another order.
            assert torch.equal(ours, theirs) or fused == "auto"
            assert torch.allclose(ours, plain, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    sample=st.sampled_from([*REAL, *MIXED]),
    n=st.integers(2, 7),
    c=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    ratio=st.floats(0.01, 1.0),
    mix=st.floats(0.0, 1.0),
    virtual=st.integers(1, 3),
    epoch=st.integers(1, 9),
    fused=st.sampled_from(["auto", "never"]),
)
def test_any_shape_is_the_reference(
    sample: str,
    n: int,
    c: int,
    spatial: list[int],
    ratio: float,
    mix: float,
    virtual: int,
    epoch: int,
    fused: str,
) -> None:
    use_fused(fused)
    shape = (n, c, *spatial)
    options = {"ratio": ratio, "mix": mix, "num_virtual": virtual, "seed": 3}
    layer = random_layer(shape, torch.float64, sample=sample, **options)
    own = [layer.weight.detach().clone(), layer.bias.detach().clone()]
    truth = reference.SampledBatchNorm(c, *own, sample=sample, **options)
    truth.spatial = tuple(spatial)
    layer.set_progress(epoch, 9)
    truth.set_progress(epoch, 9)
    x, dy = torch.randn(shape).double(), torch.randn(shape).double()
    y, dx, dw, db, mean, var = step(layer, x, dy)
    expected, backward = truth.forward(x.view(n, c, -1))
    grads = backward(dy.view(n, c, -1))
    for ours, theirs in (
        (y, expected),
        (dx, grads[0]),
        (dw, grads[1]),
        (db, grads[2]),
        (mean, truth.running_mean),
        (var, truth.running_var),
    ):
        scale = max(float(theirs.abs().max()), 1.0)
        assert torch.allclose(ours.reshape(theirs.shape), theirs, atol=1e-8 * scale)


@pytest.mark.few(3)
@pytest.mark.parametrize("sample", [*REAL, *MIXED])
@pytest.mark.parametrize("fused", ["auto", "never"])
def test_the_gradient_of_sampled_statistics_is_exact(sample: str, fused: str) -> None:
    use_fused(fused)
    layer = random_layer((6, 3, 4, 5), torch.float64, sample=sample, ratio=0.3, num_virtual=2)
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with anybatch.no_update():
            y: Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return y

    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.bias))


def test_untrusted_files_the_sample_the_gradient_is_that_of_constants() -> None:
    layer = random_layer((8, 3, 6, 6), sample="naive", size=2)
    x, dy = torch.randn(8, 3, 6, 6), torch.randn(8, 3, 6, 6)
    dx = step(layer, x, dy)[1]
    var = x[:2].var((0, 2, 3), unbiased=False)
    constant = dy * (layer.weight.detach() / (var + layer.eps).sqrt()).view(1, -1, 1, 1)
    assert torch.allclose(dx[2:], constant[2:], atol=1e-5)
    assert not torch.allclose(dx[:2], constant[:2], atol=1e-2)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("row", [0, 3])
def test_a_sample_that_is_not_finite_is_not_remembered(last: bool, bad: float, row: int) -> None:
    layer = random_layer((40, 40, 8, 8), sample="naive", size=5)
    x = torch.randn(40, 40, 8, 8)
    x[row, 3, 0, 0] = bad
    x = x.contiguous(memory_format=LAST[4]) if last else x
    with torch.no_grad():
        layer(x)
    assert layer.running_mean[3] == 0
    assert layer.running_var[3] == 1
    assert (layer.running_var != 1).sum() == 39


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sample", REAL)
def test_a_large_mean_costs_no_precision_in_compiled_passes(last: bool, sample: str) -> None:
    x = (torch.randn(40, 40, 8, 8, dtype=torch.float64) * 1e-2 + 1e3).float()
    x = x.contiguous(memory_format=LAST[4]) if last else x
    layer = random_layer(x.shape, sample=sample, ratio=0.3)
    errors = []
    for norm in (layer, nn.BatchNorm2d(40)):
        twin = copy.deepcopy(norm).double()
        y, exact = norm(x), twin(x.double())
        errors.append(float((y - exact).detach().abs().mean()))
    assert errors[0] <= 1.5 * errors[1] * float(layer.weight.detach().abs().mean()) + 1e-4


# --- indices -----------------------------------------------------------------


def indices(layer: Any, x: Tensor) -> Any:
    """The places of a layer's sample, as a mask over examples and pixels."""
    mask = torch.zeros(x.shape[0], 1, *x.shape[2:])
    (part,) = layer._parts(x, (x.shape[0],))[0]
    from anybatch.backends.aten.samples import Points, take

    if isinstance(part.sample, Points):
        mask[part.sample.index] = 1
    else:
        take(mask, part.sample).fill_(1)
    assert int(mask.sum()) == part.values
    return mask


@pytest.mark.parametrize("sample", RANDOM)
def test_the_same_seed_gives_the_same_indices_and_an_epoch_others(sample: str) -> None:
    x = torch.randn(64, 2, 20, 20)
    one, two = (random_layer(x.shape, sample=sample, seed=7) for _ in range(2))
    other = random_layer(x.shape, sample=sample, seed=8)
    seen, apart = [], 0
    for _ in range(5):
        assert torch.equal(indices(one, x), indices(two, x))
        apart += not torch.equal(indices(one, x), indices(other, x))
        seen.append(indices(one, x))
        for layer in (one, two, other):
            layer.redraw()
    assert apart >= 3
    assert sum(not torch.equal(a, b) for a, b in itertools.pairwise(seen)) >= 3


@pytest.mark.parametrize("sample", RANDOM)
def test_a_generator_gives_layers_seeds_of_their_own(sample: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = [anybatch.SampledBatchNorm2d(3, sample=sample, generator=generator) for _ in range(4)]
    assert len({layer.seed for layer in layers}) == 4
    again = torch.Generator().manual_seed(1)
    assert anybatch.SampledBatchNorm2d(3, generator=again).seed == layers[0].seed


@pytest.mark.parametrize("sample", RANDOM)
def test_a_checkpoint_goes_on_with_the_same_indices(sample: str) -> None:
    x = torch.randn(64, 2, 20, 20)
    layer = random_layer(x.shape, sample=sample)
    layer.redraw()
    layer.redraw()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = random_layer(x.shape, sample=sample)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert torch.equal(indices(layer, x), indices(other, x))
        layer.redraw()
        other.redraw()
    assert torch.equal(layer.method_state["index"], other.method_state["index"])


def test_the_scheduler_redraws_and_resumes() -> None:
    def network() -> nn.Module:
        net = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)))
        return anybatch.convert(net, "bs", seed=4)

    net = network()
    first = [layer.method_state["index"].clone() for layer in net]
    assert len({tuple(index.tolist()) for index in first}) == 3  # a layer, an index
    scheduler = anybatch.NormScheduler(net, total_epochs=5)
    assert all(torch.equal(a, b.method_state["index"]) for a, b in zip(first, net, strict=True))
    scheduler.step()
    scheduler.step()
    assert not any(torch.equal(a, b.method_state["index"]) for a, b in zip(first, net, strict=True))
    other = network()
    later = anybatch.NormScheduler(other, total_epochs=5)
    later.load_state_dict(scheduler.state_dict())
    assert all(
        torch.equal(a.method_state["index"], b.method_state["index"])
        for a, b in zip(net, other, strict=True)
    )
    assert anybatch.plan(net, "bs").having("keep")[0].reason == "already bs"
    assert anybatch.plan(net, "bs", seed=5).having("convert")
    assert anybatch.plan(net, "fs").having("convert")


def test_an_index_is_drawn_between_micro_batches_for_good() -> None:
    layer = random_layer((8, 3, 4, 4), sample="batch")
    layer.accumulate(4)
    step(layer, torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4))
    layer.redraw()
    drawn = layer.method_state["index"].clone()
    step(layer, torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4))
    assert torch.equal(layer.method_state["index"], drawn)


@pytest.mark.parametrize("sample", ["naive", "batch", "feature", "points"])
@pytest.mark.parametrize("shape", [(4, 8, 2, 2), (16, 8, 2, 2), (32, 8, 1, 1), (2, 8, 5, 5)])
def test_a_ratio_of_few_values_is_of_enough_to_divide_by(
    sample: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = random_layer(shape, sample=sample, ratio=1 / 32)
    scale = float(layer.weight.detach().abs().max()) + float(layer.bias.detach().abs().max())
    for _ in range(100):
        layer.redraw()
        assert layer(torch.randn(shape)).abs().max() < 15 * scale  # two values alike: 300


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.floats(0.001, 1.0))
def test_a_patch_is_about_the_ratios_area(sides: list[int], ratio: float) -> None:
    patch = patch_sides(tuple(sides), ratio)
    assert all(1 <= part <= side for part, side in zip(patch, sides, strict=True))
    wanted = ratio * float(torch.tensor(sides).prod())
    area = float(torch.tensor(patch).prod())
    shortest = max(min(patch), 1)
    assert area >= 1
    assert abs(area - wanted) <= max(wanted, 1.0) * (0.5 + 0.5 / shortest)
    if len(set(sides)) == 1 and wanted >= 1:
        assert max(patch) <= 2 * min(patch) + 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.floats(0.01, 1.0), st.integers(0, 2**31 - 1))
def test_random_positions_are_distinct(total: int, part: float, key: int) -> None:
    count = max(int(part * total), 1)
    found = random_positions(key, total, count, torch.device("cpu"))
    assert len(found.unique()) == count
    assert set(found.tolist()) <= set(range(total))
    tensor = random_positions(torch.tensor(key), total, count, torch.device("cpu"))
    assert torch.equal(found, tensor)


def test_random_positions_are_uniform_and_unrelated() -> None:
    cells = torch.zeros(50)
    pairs = torch.zeros(2)
    for key in range(400):
        source = torch.Generator().manual_seed(key)
        number = int(torch.randint(2**31, (), generator=source))
        found = random_positions(number, 50, 10, torch.device("cpu"))
        cells[found] += 1
        pairs += torch.tensor([(found.diff() == 1).sum(), 1.0])
    assert (cells - 80).abs().max() < 5 * (400 * 0.2 * 0.8) ** 0.5
    # Of 49 neighbouring pairs, a share of 10 * 9 / (50 * 49) is in a sample.
    assert abs(float(pairs[0]) / 400 - 49 * 90 / 2450) < 0.3


@pytest.mark.exhaustive
@pytest.mark.parametrize("sample", [*REAL, *MIXED])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph_holds_for_every_draw(sample: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer = random_layer((8, 3, 4, 5), sample=sample, ratio=0.3, num_virtual=2, seed=1)
    twin = copy.deepcopy(layer)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=graphs)
    for _ in range(12):
        x, dy = torch.randn(8, 3, 4, 5), torch.randn(8, 3, 4, 5)
        expected = step(layer, x, dy)
        inner = x.clone().requires_grad_()
        y = compiled(inner)
        y.backward(dy)
        assert torch.allclose(y, expected[0], atol=1e-5)
        assert torch.allclose(inner.grad, expected[1], atol=1e-5)
        assert torch.allclose(twin.running_var, expected[5], atol=1e-5)
        layer.redraw()
        twin.redraw()
    assert graphs.frame_count == 1


# --- virtual examples -----------------------------------------------------------


class Conv(nn.Module):
    """A network whose output has a form to choose."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.form = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), form

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        self.given = [len(x), *(len(o) for o in (*others, *named.values()))]
        y = self.norm(self.conv(x))
        return self.form(y)


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Record:
    out: Tensor
    extra: Any = None


FORMS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y.mean((2, 3))),
    "list": lambda y: [y, {"deep": y}],
    "dict": lambda y: {"out": y, "count": torch.zeros(()), "name": "n"},
    "ordered": lambda y: OrderedDict(out=y),
    "named tuple": lambda y: Pair(y, None),
    "dataclass": lambda y: Record(y, (y,)),
}


def wrapped(form: str = "tensor", method: str = "vdn", num_virtual: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    model = anybatch.convert(Conv(FORMS[form]), method)
    return anybatch.VirtualDataset(model, [0.5] * 3, [0.2, 0.3, 0.1], num_virtual, **options)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_lose_the_virtual_rows_in_any_nest(form: str) -> None:
    from anybatch.conversion.observe import tensors_in

    net = wrapped(form)
    x = torch.rand(5, 3, 6, 6)
    y = net(x)
    assert type(y) is type(FORMS[form](torch.zeros(5, 4, 4, 4)))
    assert all(t.dim() == 0 or len(t) == 5 for t in tensors_in(y))
    assert net.model.given == [7]
    if form == "dict":
        assert y["name"] == "n"
    net.eval()
    net(x)
    assert net.model.given == [5]


def test_statistics_are_those_of_the_virtual_rows() -> None:
    net = wrapped(seed=3)
    seen: list[Tensor] = []
    net.model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.rand(5, 3, 6, 6)
    y = net(x)
    virtual = seen[0][:2]
    assert torch.equal(seen[0][2:], x)
    features = net.model.conv(seen[0])
    mean = features[:2].mean((0, 2, 3), keepdim=True)
    var = features[:2].var((0, 2, 3), keepdim=True, unbiased=False)
    assert torch.allclose(y, (features[2:] - mean) / (var + 1e-5).sqrt(), atol=1e-4)
    net(x)
    assert not torch.equal(seen[1][:2], virtual)  # fresh in each forward
    again = wrapped(seed=3)
    again.model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    again(x)
    assert torch.equal(seen[2], seen[0])


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize("examples", [8, 7, 3, 1])
def test_each_normalization_batch_has_virtual_rows_of_its_own(method: str, examples: int) -> None:
    options = {} if method == "vdn" else {"seed": 0}
    model = anybatch.convert(Conv(FORMS["tensor"]), method, norm_batch_size=5, **options).double()
    alone = copy.deepcopy(model)
    for layer in alone.modules():
        if isinstance(layer, anybatch.SampledBatchNorm2d):
            layer.norm_batch_size, layer.num_virtual = None, 2
    net = anybatch.VirtualDataset(model, [0.5] * 3, [0.2, 0.3, 0.1], 2, seed=3)
    seen: list[Tensor] = []
    net.model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.rand(examples, 3, 6, 6, dtype=torch.float64)
    y = net(x)
    parts = seen[0].split(5)  # three of the batch in each
    assert torch.equal(torch.cat([part[2:] for part in parts]), x)
    fronts = [part[:2] for part in parts]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(fronts, 2))
    assert torch.allclose(y, torch.cat([alone(part)[2:] for part in parts]))
    for key, value in alone.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value)


def test_a_mask_leaves_out_the_virtual_rows_of_each_normalization_batch() -> None:
    model = anybatch.convert(Conv(FORMS["tensor"]), "fs+vdn", seed=0, norm_batch_size=5)
    net = anybatch.VirtualDataset(model, 0.5, 0.2, 2, seed=3)
    x, mask = torch.rand(7, 3, 6, 6), torch.rand(7, 4, 4) > 0.3
    ones = torch.ones(2, 4, 4, dtype=torch.bool)
    whole = torch.cat([m for part in mask.split(3) for m in (ones, part)])
    outputs = []
    for valid in (mask, whole):
        one = copy.deepcopy(net)
        with anybatch.masked(one, valid):
            outputs.append(one(x))
    assert torch.equal(*outputs)


def test_virtual_rows_that_leave_no_room_are_refused() -> None:
    model = anybatch.convert(Conv(FORMS["tensor"]), "vdn", norm_batch_size=2)
    with pytest.raises(ValueError, match="norm_batch_size=2 has no room beside num_virtual=2"):
        anybatch.VirtualDataset(model, 0.0, 1.0, 2)(torch.rand(4, 3, 6, 6))
    two = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    anybatch.convert(two, "vdn", norm_batch_size=4)[1].norm_batch_size = 5
    with pytest.raises(ValueError, match="3: norm_batch_size=4, but 5 in 1"):
        anybatch.VirtualDataset(two, 0.0, 1.0)(torch.rand(4, 3, 6, 6))


def test_the_gradient_passes_the_activations_of_the_virtual_rows() -> None:
    net = wrapped(seed=3).double()
    x, dy = torch.rand(5, 3, 6, 6).double(), torch.randn(5, 4, 4, 4).double()
    rows: list[Tensor] = []
    handle = net.model.register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    net(x).backward(dy)
    handle.remove()
    weight = net.model.conv.weight.detach().clone().requires_grad_()
    features = nn.functional.conv2d(rows[0], weight, net.model.conv.bias)
    mean = features[:2].mean((0, 2, 3), keepdim=True)
    var = features[:2].var((0, 2, 3), keepdim=True, unbiased=False)
    ((features[2:] - mean) / (var + 1e-5).sqrt()).backward(dy)
    assert torch.allclose(net.model.conv.weight.grad, weight.grad, atol=1e-10)


@pytest.mark.parametrize("method", ["vdn", "fs+vdn", "bs+vdn"])
def test_training_without_the_wrapper_is_refused(method: str) -> None:
    net = wrapped(method=method)
    x = torch.rand(5, 3, 6, 6)
    net(x)
    with pytest.raises(RuntimeError, match=r"wrap the network in anybatch\.VirtualDataset"):
        net.model(x)
    assert net.model.eval()(x).shape == (5, 4, 4, 4)


def test_the_virtual_examples_have_the_datasets_mean_and_spread() -> None:
    net = wrapped(num_virtual=400)
    rows: list[Tensor] = []
    net.model.register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    net(torch.rand(2, 3, 6, 6))
    virtual = rows[0][:400]
    assert torch.allclose(virtual.mean((0, 2, 3)), torch.tensor([0.5] * 3), atol=0.02)
    assert torch.allclose(virtual.std((0, 2, 3)), torch.tensor([0.2, 0.3, 0.1]), atol=0.02)


def test_several_inputs_grow_together() -> None:
    net = wrapped()
    x, mask, ids = torch.rand(5, 3, 6, 6), torch.rand(5, 2), torch.arange(5)
    net(x, mask, "text", ids=ids, table=torch.zeros(9, 2))
    assert net.model.given == [7, 7, 4, 7, 9]
    both = anybatch.VirtualDataset(net.model, {0: 0.5, "side": 0.0}, {0: 0.2, "side": 1.0}, 2)
    both(x, side=torch.rand(5, 2))
    assert net.model.given == [7, 7]


def test_a_run_resumed_draws_the_same_virtual_examples() -> None:
    net, x = wrapped("tensor"), torch.rand(5, 3, 6, 6)
    net(x)
    other = wrapped("tensor", seed=99)
    other.load_state_dict(net.state_dict())
    for _ in range(3):
        assert torch.equal(net(x), other(x))
    plain = wrapped("tensor")
    plain.load_state_dict({f"model.{k}": v for k, v in net.model.state_dict().items()})


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_checkpointing_draws_once(use_reentrant: bool, outside: bool) -> None:
    plain = wrapped(seed=5, method="fs+vdn")
    saving = copy.deepcopy(plain)
    if not outside:
        inner = saving.model.forward
        saving.model.forward = lambda x: checkpoint(inner, x, use_reentrant=use_reentrant)
    for _ in range(3):
        x, dy = torch.rand(5, 3, 6, 6, requires_grad=True), torch.randn(5, 4, 4, 4)
        plain(x).backward(dy)
        run = (lambda x: checkpoint(saving, x, use_reentrant=use_reentrant)) if outside else saving
        run(x).backward(dy)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_is_wrapped() -> None:
    torch._dynamo.reset()
    net = wrapped(seed=5)
    other = copy.deepcopy(net)
    net.model.form = other.model.form = nn.Identity()
    other.model = torch.compile(other.model, fullgraph=True, backend="aot_eager")
    x = torch.rand(5, 3, 6, 6)
    for _ in range(3):
        assert torch.allclose(net(x), other(x), atol=1e-5)


def test_what_a_virtual_dataset_refuses() -> None:
    model, x = Conv(FORMS["tensor"]), torch.rand(5, 3, 6, 6)
    with pytest.raises(ValueError, match="no layer that looks at virtual examples"):
        anybatch.VirtualDataset(model, 0.0, 1.0)(x)
    with pytest.raises(TypeError, match="input 0 is a list of tensors"):
        wrapped()([x[0], x[1]])
    net = wrapped()
    net.model.form = Tensor.mean
    with pytest.raises(ValueError, match="returned no tensor with a row an example"):
        net(x)
    with pytest.raises(ValueError, match="mean is of 2 channels, the input of 3"):
        anybatch.VirtualDataset(wrapped().model, [0.0] * 2, 1.0)(x)
    with pytest.raises(ValueError, match="num_virtual=0"):
        anybatch.VirtualDataset(model, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="std=-1.0"):
        anybatch.VirtualDataset(model, 0.0, -1.0)
    with pytest.raises(ValueError, match="no tensor with a row an example for it"):
        wrapped()(torch.arange(3))
    net = wrapped()
    net.model.norm.norm_batch_size = 2
    with pytest.raises(ValueError, match="norm: norm_batch_size=2"):
        net(x)
    net = wrapped()
    net.model.norm.num_virtual = 5
    with pytest.raises(ValueError, match="norm: num_virtual=5"):
        net(x)


def test_one_virtual_value_per_channel_is_warned_of() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net = anybatch.VirtualDataset(anybatch.convert(net, "vdn"), 0.5, 0.2)
    with pytest.warns(anybatch.NoEffectWarning, match="its virtual example gives one value"):
        net(torch.rand(5, 3))
    net.num_virtual = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.rand(5, 3))


def test_a_plan_says_that_the_network_must_be_wrapped() -> None:
    rows = anybatch.plan(Conv(FORMS["tensor"]), "vdn").rows
    assert "train the network in a VirtualDataset" in rows[0].reason


# --- statistics of a dataset -------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_dataset_statistics_pool_exactly(sizes: list[int], shift: float) -> None:
    batches = [torch.randn(n, 3, 2, 4) + shift for n in sizes]
    whole = torch.cat(batches).double()
    if not len(whole):
        with pytest.raises(ValueError, match="it gave no value"):
            anybatch.dataset_statistics(batches)
        return
    mean, std = anybatch.dataset_statistics(batches)
    assert torch.allclose(mean.double(), whole.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    assert torch.allclose(std.double(), whole.std((0, 2, 3), unbiased=False), rtol=1e-5)


def test_dataset_statistics_find_the_input_in_any_batch() -> None:
    x, labels = torch.randn(6, 3, 2, 2), torch.arange(6)
    expected = anybatch.dataset_statistics([x])
    for batch in ((x, labels), [labels, x], {"label": labels, "image": x}):
        for found, right in zip(anybatch.dataset_statistics([batch]), expected, strict=True):
            assert torch.equal(found, right)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 4)
    assert torch.allclose(anybatch.dataset_statistics(loader).mean, expected.mean)
    assert anybatch.dataset_statistics([(labels.float(), x)], key=1).std.shape == (3,)
    with pytest.raises(ValueError, match="key="):
        anybatch.dataset_statistics([(labels,)])
    x[0, 1] = torch.inf
    with pytest.raises(ValueError, match=r"channels \[1\]"):
        anybatch.dataset_statistics([x])
