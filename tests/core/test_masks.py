"""Masks: statistics of the valid positions are those of the packed tensor."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends.aten.samples import Points
from anybatch.core.norm_layer import NormLayer
from method_cases import NAMES, SAMPLED, SPATIAL, batch, make, same, state, step

# One group of all examples: their valid positions in a row are the same batch.
ONE_GROUP = [name for name in NAMES if name not in ("ghost", "bgn", *SAMPLED)]
EXACT = ["bn", "sync", "ghost", "bgn", "l1", *SAMPLED]  # whose gradient is that of the output


def valid_of(x: Tensor, seed: int = 0, chance: float = 0.6) -> Tensor:
    """A random mask ``(N, ...)`` of an activation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((x.shape[0], *x.shape[2:]), generator=generator) < chance


def pack(x: Tensor, mask: Tensor) -> Tensor:
    """Valid positions as rows ``(n, C)``."""
    return x.movedim(1, -1)[mask]


def masked_step(layer: nn.Module, x: Tensor, dy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, mask=mask)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ONE_GROUP)
def test_a_masked_batch_gives_what_its_valid_values_give(name: str, dims: int, last: bool) -> None:
    """Output, gradients and state, over the method's warm-ups and windows."""
    if last and dims == 1:
        pytest.skip("channels last is of pictures")
    layer = make(name, dims=dims, dtype=torch.float64)
    packed = make(name, dims=1, dtype=torch.float64)
    packed.load_state_dict(layer.state_dict())
    for number in range(9):
        x = batch(4, dims=dims, dtype=torch.float64) * (1 + 0.2 * number)
        if last:
            x = x.contiguous(
                memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d
            )
        mask = valid_of(x, number)
        mask[number % 4] = False  # an example that is padding from end to end
        dy = torch.randn_like(x) * mask.unsqueeze(1)
        x = torch.where(mask.unsqueeze(1), x, 1e6)  # of no account, whatever it is
        y, dx = masked_step(layer, x, dy, mask)
        expected, grad = step(packed, pack(x, mask), pack(dy, mask))
        torch.testing.assert_close(pack(y, mask), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pack(dx, mask), grad, rtol=1e-9, atol=1e-9)
        for mine, other in zip(layer.parameters(), packed.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-9)
        for key, value in layer.state_dict().items():
            torch.testing.assert_close(value, packed.state_dict()[key], rtol=1e-9, atol=1e-9)
        if last:
            assert y.stride() == x.stride()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ONE_GROUP),
    st.lists(st.integers(1, 6), min_size=0, max_size=2),
    st.integers(1, 5),
    st.integers(0, 2**16),
    st.floats(0, 1),
)
def test_any_shape_and_mask(
    name: str, spatial: list[int], examples: int, seed: int, chance: float
) -> None:
    dims = max(len(spatial), 1)
    layer = make(name, 3, dims, dtype=torch.float64)
    packed = make(name, 3, 1, dtype=torch.float64)
    packed.load_state_dict(layer.state_dict())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, *spatial, generator=generator).double() + 100
    mask = valid_of(x, seed, chance)
    y, dx = masked_step(layer, x, torch.ones_like(x), mask)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    if mask.sum() > (name == "mabn" or 1):
        expected = packed(pack(x, mask))
        torch.testing.assert_close(pack(y, mask), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("groups", [None, 2])
def test_the_gradient_of_masked_statistics_is_exact(name: str, groups: int | None) -> None:
    """Padding that has a part in the loss included: its output depends on the statistics too."""
    layer = make(name, 4, dims=2, dtype=torch.float64, norm_batch_size=groups)
    x = batch(4, 4, dtype=torch.float64).requires_grad_()
    mask = valid_of(x, 3)
    mask[0] = True  # virtual rows are
    mask[2] = True

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with anybatch.no_update():
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, mask))

    parameters = (layer.weight.detach().clone().requires_grad_(), layer.bias.detach().clone())
    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-6)


@pytest.mark.parametrize("name", ["ghost", "bgn"])
def test_groups_have_the_statistics_of_their_valid_positions(name: str) -> None:
    layer = make(name, dims=2, dtype=torch.float64)
    x = batch(6, dtype=torch.float64)
    mask = valid_of(x)
    mask[4:] = False  # a group without any
    y = layer(x, mask=mask)
    columns = layer.num_statistics
    pooled_mean, pooled_var, total = torch.zeros(6), torch.zeros(6), 0
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        values = pack(x[rows], mask[rows])
        if len(values):
            shared = values.view(len(values), columns, -1)
            mean = shared.mean((0, 2)).repeat_interleave(6 // columns)
            var = shared.var((0, 2), correction=0).repeat_interleave(6 // columns)
            pooled_mean = pooled_mean + len(values) * values.mean(0)
            pooled_var = pooled_var + len(values) * values.var(0)
            total += len(values)
        else:
            mean, var = (
                torch.zeros(6).double(),
                torch.ones(6).double(),
            )  # the running statistics at the start
        column = (1, 6, 1, 1)
        z = (x[rows] - mean.view(column)) / (var.view(column) + layer.eps).sqrt()
        expected = layer.weight.view(column) * z + layer.bias.view(column)
        torch.testing.assert_close(y[rows], expected, rtol=1e-9, atol=1e-9)
    pace = layer.momentum
    torch.testing.assert_close(layer.running_mean, pace * pooled_mean / total)
    torch.testing.assert_close(layer.running_var, 1 - pace + pace * pooled_var / total)


@pytest.mark.parametrize("name", ["ns", "bs", "fs", "points"])
def test_a_sample_is_of_valid_positions(name: str) -> None:
    """What a layer without a mask would have sampled, less what is not valid."""
    layer = make(name, dims=2, dtype=torch.float64)
    x = batch(4, dtype=torch.float64).requires_grad_()
    twin = copy.deepcopy(layer)
    twin(x)
    mask = valid_of(x)
    y = layer(x, mask=mask)
    part = twin._parts(x, (4,))[0][0]
    here = torch.zeros(4, 1, *SPATIAL[2], dtype=torch.bool)
    here[part.sample.index if isinstance(part.sample, Points) else box(part.sample)] = True
    values = pack(x, here[:, 0] & mask)
    column = (1, 6, 1, 1)
    z = (x - values.mean(0).view(column)) / (
        values.var(0, correction=0).view(column) + layer.eps
    ).sqrt()
    expected = layer.weight.view(column) * z + layer.bias.view(column)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy), rtol=1e-9, atol=1e-9
    )


def box(sample: Any) -> tuple[slice, ...]:
    """A box as what picks it out of an activation."""
    rows, *others = (slice(a, a + n) for a, n in zip(sample.first, sample.sides, strict=True))
    return (rows, slice(None), *others)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_mask_changes_nothing(name: str) -> None:
    layer = make(name, dims=2, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    for _ in range(5):
        x, dy = batch(4, dtype=torch.float64), torch.randn(4, 6, *SPATIAL[2]).double()
        y, dx = masked_step(layer, x, dy, torch.ones(4, dtype=torch.long))
        expected, grad = step(twin, x, dy)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dx, grad, rtol=1e-9, atol=1e-9)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_that_is_not_finite_enters_no_memory(name: str, dtype: torch.dtype) -> None:
    layer = make(name, dims=2)
    x = batch(4).to(dtype)
    mask = torch.ones(4, *SPATIAL[2], dtype=torch.bool)
    mask[-1] = False
    twin = copy.deepcopy(layer)
    clean = twin(x, mask=mask)
    x[-1] = torch.nan
    dirty = layer(x, mask=mask)
    assert same(state(layer), state(twin))
    assert torch.equal(dirty[:-1], clean[:-1])
    assert dirty.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_leaves_statistics_alone(name: str) -> None:
    layer = make(name, dims=2)
    for _ in range(2):
        step(layer, batch(4))
    before = state(layer)
    y, dx = masked_step(layer, batch(4), torch.randn(4, 6, *SPATIAL[2]), torch.zeros(4).bool())
    assert y.isfinite().all()
    assert dx.isfinite().all()
    moved = ("step", "backward_step") if name == "cbn" else ()  # it counts forwards
    assert same(before, state(layer), moved)


@pytest.mark.parametrize("name", ["bn", "mabn", "mbn", "cbn", "brn", "ns"])
def test_micro_batches_pool_their_valid_values(name: str) -> None:
    """Two halves of a step have at its end the state of the whole."""
    sizes = [{"batch_size": size} if name == "mbn" else {} for size in (4, 2)]
    whole, halves = (make(name, dims=2, dtype=torch.float64, **size) for size in sizes)
    anybatch.accumulate(halves, 2)
    if name == "ns":
        for layer in (whole, halves):
            layer.ratio = 1.0
    for number in range(4):
        x = batch(4, dtype=torch.float64)
        mask = valid_of(x, number)
        whole(x, mask=mask)
        for part, valid in zip(x.split(2), mask.split(2), strict=True):
            halves(part, mask=valid)
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(
                getattr(halves, key), getattr(whole, key), rtol=1e-9, atol=1e-9
            )


def test_cross_iteration_follows_the_weights_behind_valid_positions() -> None:
    """A linear layer over tokens: masked is packed, compensation included."""
    for order, sample in ((1, None), (2, None)):
        pairs = []
        for _ in range(2):
            torch.manual_seed(0)
            feed = nn.Linear(5, 6).double()
            options = {"window": 3, "burn_in": 0.0, "order": order, "gradient_sample": sample}
            norm = anybatch.CrossIterationBatchNorm1d(6, dtype=torch.float64, **options)
            pairs.append((feed, norm.bind(feed)))
        for number in range(6):
            x = torch.randn(7, 5).double() + number
            mask = torch.rand(7) < 0.6
            y = pairs[0][1](pairs[0][0](x), mask=mask)
            z = pairs[1][1](pairs[1][0](x[mask]))
            torch.testing.assert_close(y[mask], z, rtol=1e-9, atol=1e-9)
            with torch.no_grad():
                for feed, _ in pairs:
                    feed.weight += 0.1 * torch.sin(torch.arange(30.0).view(6, 5) + number)
        for key, value in pairs[0][1].state_dict().items():
            torch.testing.assert_close(value, pairs[1][1].state_dict()[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sample", [None, 16])
def test_cross_iteration_gradients_of_masked_statistics(sample: int | None) -> None:
    """Of a convolution: those that autograd finds, from all positions or about, from some."""
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    norm = anybatch.CrossIterationBatchNorm2d(
        4, dtype=torch.float64, window=2, burn_in=0.0, gradient_sample=sample
    ).bind(conv)
    x = torch.randn(40, 3, 6, 6).double()
    mask = valid_of(x)
    norm(conv(x), mask=mask)
    weight = conv.weight.detach().clone().requires_grad_()
    values = pack(torch.nn.functional.conv2d(x, weight, conv.bias, padding=1), mask)
    (slope,) = torch.autograd.grad(values.var(0, correction=0).sum(), weight, retain_graph=True)
    (patch,) = torch.autograd.grad(values.mean(0)[0], weight)
    found = norm.state_dict()["var_gradient"][0], norm.state_dict()["mean_gradient"][0]
    if sample is None:
        torch.testing.assert_close(found[0], slope.flatten(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1][0], patch[0].flatten(), rtol=1e-9, atol=1e-9)
    else:
        assert (found[0] - slope.flatten(1)).norm() < 3 * slope.norm()
        assert found[0].isfinite().all()


# --- the shape of a mask ----------------------------------------------------------------


def test_a_mask_fits_layers_of_other_sizes() -> None:
    """Smaller maps take the nearest position; flat features take whole examples."""
    norms = [anybatch.BatchNorm2d(2), anybatch.BatchNorm2d(2), anybatch.BatchNorm1d(2)]
    net = nn.Sequential(
        norms[0], nn.AvgPool2d(2), norms[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), norms[2]
    )
    x = torch.randn(3, 2, 4, 6)
    mask = torch.zeros(3, 4, 6, dtype=torch.bool)
    mask[0, :, :4] = mask[1, :2] = True
    seen: list[Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with anybatch.masked(net, mask):
        net(x)
    assert all(norm.mask is None for norm in norms)
    means = [norm.running_mean / 0.1 for norm in norms]
    torch.testing.assert_close(means[0], pack(x, mask).mean(0))
    torch.testing.assert_close(means[1], pack(seen[1], mask[:, ::2, ::2]).mean(0))
    torch.testing.assert_close(means[2], seen[2][:2].mean(0))


@pytest.mark.parametrize(
    "shape", [(4,), (4, 1, 1, 1), (4, 4, 3), (4, 1, 4, 3)], ids=["N", "N111", "NHW", "N1HW"]
)
def test_all_forms_of_a_mask_give_the_same(shape: tuple[int, ...]) -> None:
    x = batch(4)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[3] = 0
    masked, plain = anybatch.BatchNorm2d(6), anybatch.BatchNorm2d(6)
    torch.testing.assert_close(masked(x, mask)[:3], plain(x[:3]))


def test_masked_tokens_in_rows_give_what_packed_ones_give() -> None:
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    layer, plain = anybatch.BatchNorm1d(6), anybatch.BatchNorm1d(6)
    y = layer(x.flatten(0, 1), mask)
    torch.testing.assert_close(y[mask.flatten() > 0], plain(x[mask > 0]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_a_mask_may_be_written_to_before_the_backward_pass(dtype: torch.dtype) -> None:
    layer, x = anybatch.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    mask = (torch.rand(4, 5, 5) < 0.7).to(dtype)
    found = []
    for change in (False, True):
        leaf = x.clone().requires_grad_()
        given = mask.clone()
        y = layer(leaf, given)
        if change:
            given.fill_(1)
        y.square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_virtual_rows_need_no_mask() -> None:
    net = anybatch.convert(nn.Sequential(nn.BatchNorm2d(3)), "fs+vdn", ratio=1.0)
    wrapped = anybatch.VirtualDataset(net, 0.0, 1.0, 2, seed=0)
    x, mask = torch.randn(4, 3, 5, 5), torch.rand(4, 5, 5) < 0.5
    with anybatch.masked(net, mask):
        assert wrapped(x).shape == x.shape


@pytest.mark.parametrize("name", ["bn", "mabn", "bgn", "l1"])
def test_at_inference_an_examples_valid_positions_count(name: str) -> None:
    layer = make(name, dims=2, dtype=torch.float64, example_weight=0.4).eval()
    x = batch(3, dtype=torch.float64)
    mask = torch.zeros(3, *SPATIAL[2], dtype=torch.bool)
    mask[:2, :2] = True  # and nothing of the last
    y = layer(x, mask=mask)
    torch.testing.assert_close(y[:2, :, :2], layer(x[:2, :, :2]), rtol=1e-9, atol=1e-9)
    layer.example_weight = 0.0
    torch.testing.assert_close(y[2:], plain_inference(layer, x[2:]), rtol=1e-9, atol=1e-9)


def plain_inference(layer: NormLayer, x: Tensor) -> Tensor:
    """By the running statistics alone, channels sharing them as the layer has it."""
    if layer.num_statistics == layer.num_features:
        return layer(x)
    shared = (layer.num_statistics, -1)
    mean = layer.running_mean.view(shared).mean(1)
    second = (layer.running_var + layer.running_mean**2).view(shared).mean(1)
    repeat = layer.num_features // layer.num_statistics
    mean, second = (t.repeat_interleave(repeat).view(1, -1, 1, 1) for t in (mean, second))
    z = (x - mean) / (second - mean**2 + layer.eps).sqrt()
    return layer.weight.view(1, -1, 1, 1) * z + layer.bias.view(1, -1, 1, 1)


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in NAMES if n not in SAMPLED])
def test_a_masked_layer_compiles_whole(name: str) -> None:
    layer = make(name, dims=2)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for number in range(3):
        x, dy = batch(4), torch.randn(4, 6, *SPATIAL[2])
        mask = valid_of(x, number)
        y, dx = masked_step(compiled, x, dy, mask)
        expected, grad = masked_step(twin, x, dy, mask)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_masked_layer_counts_once(use_reentrant: bool) -> None:
    layer, twin = make("mabn"), None
    twin = copy.deepcopy(layer)
    for number in range(3):
        x = batch(4).requires_grad_()
        mask = valid_of(x, number)
        dy = torch.randn(4, 6, *SPATIAL[2])
        y = checkpoint(layer, x, mask, use_reentrant=use_reentrant)
        y.backward(dy)
        expected, grad = masked_step(twin, x, dy, mask)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, grad)
    mine, its = state(layer), state(twin)
    assert same(mine, its, but=("backward_average",))  # of sums in another order
    torch.testing.assert_close(mine["backward_average"], its["backward_average"])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("by", ["mask", "lengths"])
@pytest.mark.parametrize("name", NAMES)
def test_backward_may_come_after_the_end_of_a_mask(name: str, by: str, use_reentrant: bool) -> None:
    layer = make(name, dims=1)
    twin, lengths = copy.deepcopy(layer), torch.tensor([5, 2, 4, 3])
    how = {by: lengths if by == "lengths" else torch.arange(5) < lengths.unsqueeze(1)}
    for number in range(3):
        torch.manual_seed(number)
        x, dy = torch.randn(4, 6, 5, requires_grad=True), torch.randn(4, 6, 5)
        with anybatch.masked(layer, **how):
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        y.backward(dy)
        other = x.detach().clone().requires_grad_()
        with anybatch.masked(twin, **how):
            expected = twin(other)
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_masks_of_forwards_that_ran_again_are_let_go() -> None:
    layer, x = anybatch.BatchNorm1d(6), torch.randn(4, 6, 5, requires_grad=True)
    for _ in range(3):
        checkpoint(layer, x, torch.ones(4).bool(), use_reentrant=True).sum().backward()
    with torch.no_grad():
        for _ in range(20):
            layer(x, mask=torch.ones(4).bool())
    assert sum(noted.source is not None for _, noted in layer._recent.kept) == 8
    checkpoint(layer, x, use_reentrant=True).sum().backward()


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "floats": (torch.ones(4), TypeError, "mask of type torch.float32: give a tensor of bool"),
    "a list": ([True] * 4, TypeError, "mask of type list"),
    "examples": (torch.ones(3).bool(), ValueError, r"mask of shape \(3,\): BatchNorm2d got"),
    "channels": (torch.ones(4, 6, 4, 3).bool(), ValueError, r"give a mask of shape \(4, 4, 3\)"),
    "dimensions": (torch.ones(4, 4).bool(), ValueError, r"or \(4,\) for whole examples"),
    "a number": (torch.tensor(True), ValueError, r"mask of shape \(\)"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_a_mask_must_be(case: str) -> None:
    mask, kind, words = BAD[case]
    layer = anybatch.BatchNorm2d(6)
    before = state(layer)
    with pytest.raises(kind, match=words):
        layer(batch(4), mask=mask)
    with pytest.raises(kind, match=words), anybatch.masked(layer, mask):
        layer(batch(4))
    assert layer.mask is None
    assert same(before, state(layer))


def test_a_mask_is_for_the_layers_that_are_picked() -> None:
    net = nn.Sequential(anybatch.BatchNorm1d(3), anybatch.BatchNorm1d(3))
    with anybatch.masked(net, torch.tensor([True, False]), where="1"):
        assert net[0].mask is None
        assert net[1].mask is not None
    with (
        pytest.raises(ValueError, match="no anybatch layer"),
        anybatch.masked(nn.ReLU(), torch.ones(2).bool()),
    ):
        pass


def test_layers_of_one_shape_share_a_mask() -> None:
    layers = nn.Sequential(*(make("bn") for _ in range(3)), nn.AvgPool2d(2), make("bn"))
    mask, x = valid_of(batch(4)), batch(4)
    fitted: dict[tuple[int, ...], set[int]] = {}
    for layer in layers:
        if isinstance(layer, NormLayer):
            fit = layer._fit

            def noted(mask: Tensor, x: Tensor, fit: Any = fit) -> Any:
                found = fit(mask, x)
                fitted.setdefault(tuple(x.shape), set()).add(id(found.valid))
                return found

            layer._fit = noted  # type: ignore[method-assign]
    with anybatch.masked(layers, mask):
        layers(x)
    assert [len(kept) for kept in fitted.values()] == [1, 1]


@pytest.mark.parametrize("name", ["bn", "ghost", "cbn", "points"])
def test_a_mask_that_is_written_into_is_read_again(name: str) -> None:
    """Between two forwards of a context; what a forward has read stays for its backward."""
    layer, mask = make(name, dims=2), valid_of(batch(4), 0)
    twin, first, second = copy.deepcopy(layer), mask.clone(), valid_of(batch(4), 1)
    xs = [batch(4).requires_grad_() for _ in range(2)]
    twins = [x.detach().clone().requires_grad_() for x in xs]
    dy = torch.randn_like(xs[0])
    with anybatch.masked(layer, mask):
        one = layer(xs[0])
        mask.copy_(second)
        two = layer(xs[1])
    (one * dy).sum().backward()
    (two * dy).sum().backward()
    expected = [twin(x, m) for x, m in zip(twins, (first, second), strict=True)]
    for y, wanted in zip((one, two), expected, strict=True):
        assert torch.equal(y, wanted)
        (wanted * dy).sum().backward()
    for x, other in zip(xs, twins, strict=True):
        assert torch.equal(x.grad, other.grad)


def test_masks_in_one_another_are_each_their_layers() -> None:
    outer, inner, x = make("bn"), make("bn"), batch(4)
    twins = copy.deepcopy((outer, inner))
    masks = torch.arange(4) < 2, torch.arange(4) > 1
    with anybatch.masked(outer, masks[0]), anybatch.masked(inner, masks[1]):
        for _ in range(2):
            found = outer(x), inner(x)
    for y, twin, mask in zip(found, twins, masks, strict=True):
        assert torch.equal(y, twin(x, mask))
