"""Cross-iteration batch norm against the reference, pair by pair, and what it promises."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import anybatch
import reference
from anybatch.backends import use_fused
from anybatch.backends.aten import patches
from anybatch.layers.cross_iteration_batch_norm import recommended_window
from anybatch.layers.statistics_gradients import StatisticsGradients, compensated
from anybatch.registry import METHODS

# Every way in which weights meet an input: the layer, and the shape of its input.
FEEDERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 7, 6)),
    "two groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 5, 4)),
    "depthwise twice": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 5, 4)),
    "strided, dilated": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (4, 7, 6),
    ),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 6)),
    "same, even": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (4, 9)),
    "valid": (lambda: nn.Conv1d(4, 6, 4, padding="valid"), (4, 9)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 5, 6)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="replicate"), (4, 5, 6)),
    "circular": (
        lambda: nn.Conv2d(4, 6, 3, 2, padding=1, padding_mode="circular", groups=2),
        (4, 5, 6),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, padding=1, groups=2), (2, 3, 2, 4)),
    "one by one": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 4)),
    "transposed": (
        lambda: nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2
        ),
        (4, 4, 3),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2), (4, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 6, 2, padding=1, bias=False), (2, 3, 4, 3)),
    "linear": (lambda: nn.Linear(5, 6), (5,)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.func.jvp's own first use
]


def convolve(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer without its bias, as a function of input and weights."""
    bare = copy.deepcopy(module)
    bare._forward_hooks.clear()
    bare.bias = None
    return lambda x, w: torch.func.functional_call(bare, {"weight": w}, (x,))


def pair(feeder: str, **options: Any) -> tuple[nn.Module, Any, tuple[int, ...]]:
    """A layer in float64 and the norm that is bound to it."""
    make, shape = FEEDERS[feeder]
    module = make().double()
    settings = {"window": 4, "gradient_sample": None, **options}
    norm = METHODS["cbn"].build(6, max(len(shape) - 1, 1), dtype=torch.float64, **settings)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return module, norm.bind(module), shape


def moving(shape: tuple[int, ...], step: int) -> Tensor:
    """Inputs whose mean and spread drift, in size too."""
    size = (3, 5, 4)[step % 3]
    return torch.randn(size, *shape).double() * (1 + 0.02 * step) + 0.3 - 0.02 * step


CASES = [
    *((feeder, {"order": 1}) for feeder in FEEDERS),
    *((feeder, {"order": 2}) for feeder in ("conv2d", "two groups", "depthwise", "linear")),
    *(("transposed", {"order": order}) for order in (0, 2)),
    *(
        (feeder, {"window": window})
        for feeder in ("conv2d", "two groups", "depthwise")
        for window in (1, 4, 8)
    ),
    ("conv2d", {"burn_in_steps": 5}),
    ("conv2d", {"order": 0}),
    ("conv2d", {"running_stats": "window"}),
    ("two groups", {"momentum": 0.3, "window": 2}),
]


@pytest.mark.few(6)
@pytest.mark.parametrize(("feeder", "options"), CASES, ids=str)
def test_a_pair_is_the_reference_over_twenty_steps_of_sgd(
    feeder: str, options: dict[str, Any]
) -> None:
    module, norm, shape = pair(feeder, **options)
    known = {"window": 4, **options}
    truth = reference.CrossIteration(convolve(module), 6, **known)
    theirs = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    gamma, beta = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    leaves = [*theirs.values(), gamma, beta]
    model = nn.Sequential(module, norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(20):
        x = moving(shape, step)
        y = model(x)
        expected, *_ = truth.forward(x, theirs["weight"], theirs.get("bias"), gamma, beta)
        assert torch.allclose(y, expected, atol=1e-9), f"output, step {step}"
        dy = torch.randn_like(y)
        optimizer.zero_grad()
        y.backward(dy)
        optimizer.step()
        slopes = torch.autograd.grad(expected, leaves, dy)
        with torch.no_grad():
            for leaf, slope in zip(leaves, slopes, strict=True):
                leaf -= 0.02 * slope
    for own, leaf in zip(model.parameters(), leaves, strict=True):
        assert torch.allclose(own, leaf, atol=1e-9)
    assert torch.allclose(norm.running_mean, truth.running_mean, atol=1e-9)
    assert torch.allclose(norm.running_var, truth.running_var, atol=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"order": 0}, {"order": 2}, {"window": 8}], ids=str)
def test_three_stacked_pairs_are_the_reference(options: dict[str, Any]) -> None:
    widths, truths, leaves, modules = (3, 6, 6, 6), [], [], []
    for low, high, groups in zip(widths, widths[1:], (1, 2, 6), strict=False):
        conv = nn.Conv2d(low, high, 3, padding=1, groups=groups).double()
        modules += [conv, nn.BatchNorm2d(high).double(), nn.ReLU()]
        truths.append(reference.CrossIteration(convolve(conv), high, **{"window": 4, **options}))
        tensors = (conv.weight, conv.bias, modules[-2].weight, modules[-2].bias)
        leaves.append([t.detach().clone().requires_grad_() for t in tensors])
    model = nn.Sequential(*modules)
    anybatch.convert(model, "cbn", gradient_sample=None, **{
        "window": 4, "backward_stats": "batch", "running_stats": "batch", **options
    })  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(20):
        x = moving((3, 6, 5), step)
        hidden = x
        for truth, own in zip(truths, leaves, strict=True):
            hidden = truth.forward(hidden, *own)[0].relu()
        y = model(x)
        assert torch.allclose(y, hidden, atol=1e-9)
        dy = torch.randn_like(y)
        optimizer.zero_grad()
        y.backward(dy)
        optimizer.step()
        flat = list(itertools.chain(*leaves))
        slopes = torch.autograd.grad(hidden, flat, dy)
        with torch.no_grad():
            for leaf, slope in zip(flat, slopes, strict=True):
                leaf -= 0.02 * slope
    for own, leaf in zip(model.parameters(), itertools.chain(*leaves), strict=True):
        assert torch.allclose(own, leaf, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"burn_in_steps": 4}], ids=str)
def test_windowed_backward_statistics_are_the_reference(options: dict[str, Any]) -> None:
    options = {"window": 4, "backward_stats": "window", **options}
    module, norm, shape = pair("conv2d", **options)
    truth = reference.CrossIteration(convolve(module), 6, **options)
    for step in range(12):
        x = moving(shape, step)
        out = module(x)
        out.retain_grad()
        y = norm(out)
        dy = torch.randn_like(y)
        y.backward(dy)
        args = (module.weight, module.bias, norm.weight, norm.bias)
        expected, mean, var = truth.forward(x, *(t.detach() for t in args))
        assert torch.allclose(y, expected, atol=1e-9)
        dx = truth.windowed_gradient(out.detach(), dy, norm.weight.detach(), mean, var)
        assert torch.allclose(out.grad, dx, atol=1e-9)
        with torch.no_grad():
            module.weight += 0.02 * torch.randn_like(module.weight)


@pytest.mark.parametrize("feeder", list(FEEDERS))
def test_gradients_of_the_statistics_are_autograds(feeder: str) -> None:
    module, _, shape = pair(feeder)
    x = torch.randn(3, *shape).double()
    y = module(x)
    values = y.transpose(0, 1).flatten(1)
    mean, var, nu = values.mean(1), values.var(1, unbiased=False), values.square().mean(1)
    layer = patches.geometry_of(module)

    def by_autograd(statistic: Tensor) -> Tensor:
        rows = [
            layer.rows(torch.autograd.grad(one, module.weight, retain_graph=True)[0])[i]
            for i, one in enumerate(statistic)
        ]
        return torch.stack(rows)

    y = y.detach()
    patch = patches.mean_patch(layer, x, y)
    of_mean = patch.repeat_interleave(6 // layer.groups, 0)
    assert torch.allclose(of_mean, by_autograd(mean), atol=1e-12)
    of_var = patches.var_gradient(layer, x, y, mean.detach(), patch)
    assert torch.allclose(of_var, by_autograd(var), atol=1e-12)
    of_nu = of_var + 2 * mean.detach().unsqueeze(1) * of_mean
    assert torch.allclose(of_nu, by_autograd(nu), atol=1e-12)


def dilated(when: str, padding: object = (2, 2)) -> nn.Sequential:
    """A pair that is dilated when it is made, afterwards as segmenters do, or once it is bound."""
    torch.manual_seed(0)
    made = {"padding": padding, "dilation": 2} if when == "made" else {"padding": 1}
    conv = nn.Conv2d(4, 4, 3, bias=False, **made)
    network = nn.Sequential(conv, nn.BatchNorm2d(4))
    if when == "bound":
        anybatch.convert(network, "cbn", batch_size=2, burn_in=0.0)
        network(torch.randn(2, 4, 12, 12))
        network.load_state_dict(dilated("made").state_dict())
    conv.dilation, conv.padding = (2, 2), padding
    return (
        network if when == "bound" else anybatch.convert(network, "cbn", batch_size=2, burn_in=0.0)
    )


@pytest.mark.parametrize("when", ["afterwards", "bound"])
@pytest.mark.parametrize("padding", [(2, 2), 2, "same", "valid"])
def test_settings_of_a_convolution_count_as_its_forward_reads_them(
    when: str, padding: object
) -> None:
    outputs = []
    for one in ("made", when):
        network = dilated(one, padding)
        optimizer = torch.optim.SGD(network.parameters(), 0.3)
        outputs.append([])
        for number in range(5):
            x = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(number)) + number
            y = network(x)
            (y - y.mean() ** 2).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs[-1].append(y.detach())
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_mode_of_padding_that_is_set_later_counts(mode: str) -> None:
    """As people make images seamless; the ends that its forward pads are set beside it."""
    outputs = []
    for later in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 6, 3, padding=2, bias=False).double()
        norm = anybatch.CrossIterationBatchNorm2d(6, window=4, burn_in=0.0).double()
        for step in (norm.bind, lambda one: None) if later else (lambda one: None, norm.bind):
            step(conv)
            conv.padding_mode, conv._reversed_padding_repeated_twice = mode, [2, 1, 0, 2]
        outputs.append([])
        for number in range(4):
            g = torch.Generator().manual_seed(number)
            x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=g) + 1
            outputs[-1].append(norm(conv(x)))
            outputs[-1][-1].square().mean().backward()
            with torch.no_grad():
                conv.weight.add_(torch.randn(conv.weight.shape, generator=g).double() * 0.2)
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("feeder", list(FEEDERS))
def test_patches_of_all_positions_give_the_output(feeder: str) -> None:
    module, _, shape = pair(feeder)
    x = torch.randn(3, *shape).double()
    y = module(x).detach()
    layer = patches.geometry_of(module)
    values, seen = patches.sampled_patches(layer, x, y, patches.all_points(y))
    rows = layer.rows(module.weight.detach()).view(layer.groups, -1, layer.fan_in)
    made = torch.einsum("ngk,gok->ngo", seen, rows).flatten(1)
    made = made if module.bias is None else made + module.bias
    assert torch.allclose(made, values, atol=1e-12)
    assert torch.allclose(values.mean(0), y.transpose(0, 1).flatten(1).mean(1), atol=1e-12)


@pytest.mark.parametrize("feeder", ["conv2d", "two groups", "transposed", "linear"])
def test_sampled_gradients_converge_on_the_whole_ones(feeder: str) -> None:
    module, norm, shape = pair(feeder, gradient_sample=8)
    x = torch.randn(4, *shape).double()
    y = module(x).detach()
    layer = patches.geometry_of(module)
    mean = y.transpose(0, 1).flatten(1).mean(1)
    whole = patches.var_gradient(layer, x, y, mean, patches.mean_patch(layer, x, y))
    feed = norm._flow.feed
    assert feed is not None
    errors = []
    for sample in (4, 64, 4096):
        tries = []
        for step in range(0, 5000, 500):
            how = StatisticsGradients(norm.order, sample, torch.tensor(step * sample))
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Tensor, "numel", lambda self: 1 << 40)  # any sample is small
                tries.append(how.of_batch(feed, y, mean)["var_gradient"])
        errors.append(float((torch.stack(tries) - whole).norm(dim=(1, 2)).mean() / whole.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2


def test_points_cover_the_cube_and_follow_from_their_number() -> None:
    first = torch.tensor(640)
    points = patches.covering_points(first, 512, 3)
    assert points.shape == (3, 512)
    assert torch.equal(points[:, 64:], patches.covering_points(first + 64, 448, 3))
    cells = (points * 4).long().clamp(max=3)
    cell = cells[0] * 16 + cells[1] * 4 + cells[2]
    counts = torch.bincount(cell, minlength=64)
    assert counts.min() >= 4  # 8 on average
    assert counts.max() <= 13
    late = patches.covering_points(torch.tensor(10**12), 8, 4)
    assert late.min() >= 0
    assert late.max() <= 1


# What the method promises


def moved_slots(norm: Any) -> tuple[Tensor, Tensor]:
    """Means and variances of all slots at today's weights, in float64."""
    slots = {
        name: norm.method_state[name].double()
        for name in norm.per_step_state
        if name in norm.method_state
    }
    return compensated(slots, norm._flow.feed, norm.order)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_window_of_one_is_batch_norm_to_the_bit(order: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 6, 3)
    norm = anybatch.CrossIterationBatchNorm2d(6, window=1, order=order).bind(module)
    plain = anybatch.BatchNorm2d(6)
    for _ in range(5):
        x = module(torch.randn(2, 3, 6, 6)).detach().requires_grad_()
        again = x.detach().clone().requires_grad_()
        dy = torch.randn(2, 6, 4, 4)
        a, b = norm(x), plain(again)
        a.backward(dy)
        b.backward(dy)
        assert torch.equal(a, b)
        assert torch.equal(x.grad, again.grad)
    assert torch.equal(norm.running_var, plain.running_var)


@pytest.mark.parametrize("feeder", list(FEEDERS))
@pytest.mark.parametrize("order", [0, 1, 2])
def test_cbn_with_constant_weights_is_batch_norm_of_the_joined_batches(
    feeder: str, order: int
) -> None:
    module, norm, shape = pair(feeder, order=order, window=5)
    plain = METHODS["bn"].build(6, norm.dims, dtype=torch.float64)
    plain.load_state_dict(norm.state_dict(), strict=False)
    with torch.no_grad():
        seen = [torch.randn(3, *shape).double() for _ in range(9)]
        for x in seen:
            y = norm(module(x))
        expected = plain(module(torch.cat(seen[-5:])))[-3:]
    assert torch.allclose(y, expected, atol=1e-10)


def test_uneven_batches_weigh_by_their_values() -> None:
    module, norm, _ = pair("conv2d")
    plain = anybatch.BatchNorm2d(6).double()
    plain.load_state_dict(norm.state_dict(), strict=False)
    with torch.no_grad():
        seen = [torch.randn(n, 4, 7 + n, 6).double() for n in (2, 5, 1)]
        seen.append(torch.randn(3, 4, 8, 6).double())
        for x in seen:
            y = norm(module(x))
        values = torch.cat([module(x).transpose(0, 1).flatten(1) for x in seen], 1)
        z = (module(x) - values.mean(1).view(1, -1, 1, 1)) * torch.rsqrt(
            values.var(1, unbiased=False) + norm.eps
        ).view(1, -1, 1, 1)
    expected = z * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(y, expected, atol=1e-10)


@pytest.mark.parametrize("feeder", ["conv2d", "two groups", "transposed", "linear"])
def test_micro_batches_pool_with_their_gradients(feeder: str) -> None:
    """A step of three micro-batches leaves the window as one batch does."""
    module, norm, shape = pair(feeder)
    other, whole, _ = pair(feeder)
    other.load_state_dict(module.state_dict())
    whole.load_state_dict(norm.state_dict())
    norm.accumulate(3)
    for _ in range(7):
        micro = [torch.randn(n, *shape).double() for n in (2, 3, 2)]
        with torch.no_grad():
            expected = whole(other(torch.cat(micro)))[-2:]
            for x in micro:
                y = norm(module(x))
            assert torch.allclose(y, expected, atol=1e-9)
            for name, tensor in whole.method_state.items():
                assert torch.allclose(norm.method_state[name], tensor, atol=1e-9), name
            shift = 0.02 * torch.randn_like(module.weight)
            module.weight += shift
            other.weight += shift


@pytest.mark.parametrize("order", [1, 2])
def test_norm_batch_size_of_cbn_is_successive_batches(order: int) -> None:
    module, norm, shape = pair("two groups", norm_batch_size=2, order=order)
    other, split, _ = pair("two groups", order=order)
    other.load_state_dict(module.state_dict())
    split.load_state_dict(norm.state_dict())
    for _ in range(4):
        x = torch.randn(6, *shape).double()
        expected = torch.cat([split(other(part)) for part in x.split(2)])
        assert torch.allclose(norm(module(x)), expected, atol=1e-10)
        with torch.no_grad():
            shift = 0.05 * torch.randn_like(module.weight)
            module.weight += shift
            other.weight += shift
    for name, tensor in split.state_dict().items():
        assert torch.allclose(norm.state_dict()[name], tensor, atol=1e-10), name


def statistics_error(order: int, steps: int = 50, rate: float = 0.05) -> float:
    """How far old batches' compensated statistics are from those recomputed at today's weights."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 8, 3).double(), nn.Linear(8, 4).double()
    options = {"window": 8, "order": order, "gradient_sample": None}
    norm = anybatch.CrossIterationBatchNorm2d(8, **options).double().bind(conv)
    parameters = [*conv.parameters(), *head.parameters(), *norm.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    seen: list[Tensor] = []
    errors = []
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8).double() + torch.randn(4, 3, 1, 1).double()
        target = x.mean((1, 2, 3)).mul(3).long().clamp(-1, 2) + 1
        seen.append(x)
        out = conv(x)
        if step >= 16:
            means, variances = moved_slots(norm)
            position = int(norm.method_state["position"])
            for age in range(1, 8):
                true = F.conv2d(seen[-1 - age], conv.weight, conv.bias).detach()
                true = true.transpose(0, 1).flatten(1)
                slot = (position - age) % 8
                mean_error = (means[slot] - true.mean(1)).square()
                var_error = (variances[slot] - true.var(1, unbiased=False)).square()
                errors.append(float((mean_error + var_error).sum().sqrt()))
        loss = F.cross_entropy(head(norm(out).relu().mean((2, 3))), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(errors) / len(errors)


def test_first_order_cuts_the_naive_error_by_half_at_least() -> None:
    naive, first, second = (statistics_error(order) for order in (0, 1, 2))
    assert first < naive / 2
    assert second < first


def test_the_recommended_window() -> None:
    assert [recommended_window(n) for n in (1, 2, 3, 4, 8, 16, 64)] == [8, 8, 6, 4, 2, 1, 1]
    model = anybatch.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "cbn")
    assert model[1].window is None
    model(torch.randn(4, 3))
    assert model[1].window == 4
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert anybatch.convert(model, "cbn", batch_size=2)[1].window == 8


def test_the_window_grows_after_the_burn_in() -> None:
    module, norm, shape = pair("conv2d", burn_in_steps=3, window=4)
    plain = anybatch.BatchNorm2d(6).double()
    plain.load_state_dict(norm.state_dict(), strict=False)
    entries = []
    for step in range(8):
        x = torch.randn(2, *shape).double()
        with torch.no_grad():
            y = norm(module(x))
            if step < 4:
                assert torch.allclose(y, plain(module(x)), atol=1e-12)
        entries.append(int(norm.method_state["entries"]))
    assert entries == [0, 0, 0, 1, 2, 3, 3, 3]


def test_the_scheduler_sets_the_burn_in() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    anybatch.convert(model, "cbn", window=4)
    scheduler = anybatch.NormScheduler(model, total_epochs=8)
    grown = []
    for _ in range(8):
        for _ in range(2):
            model(torch.randn(2, 3, 5, 5)).sum().backward()
        grown.append(int(model[1].method_state["entries"]))
        scheduler.step()
    assert grown == [0, 0, 2, 3, 3, 3, 3, 3]
    again = anybatch.convert(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), "cbn", window=4)
    anybatch.NormScheduler(again, total_epochs=8)
    again.load_state_dict(model.state_dict())
    assert not again[1].burning


def test_memory_is_what_is_counted_on_paper() -> None:
    for name in FEEDERS:
        module, norm, _ = pair(name, window=5)
        layer = patches.geometry_of(module)
        per_step = 4 * 6 + 1 + layer.groups * layer.fan_in + 6 * layer.fan_in
        assert norm.memory_numbers == 5 * per_step
    conv = nn.Conv2d(64, 64, 3)
    norm = anybatch.CrossIterationBatchNorm2d(64, window=8).bind(conv)
    assert norm.memory_numbers < 2 * 7 * (64 + 64 * 64 * 9)  # the paper's
    naive = anybatch.CrossIterationBatchNorm2d(64, window=8, order=0)
    assert naive.memory_numbers == 8 * (2 * 64 + 1)


# Weights that are not plain, or do not move, or jump


def weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "wrap",
    [
        anybatch.weight_centralization,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        weight_norm,
    ],
)
def test_the_weights_in_use_count(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    module = wrap(nn.Conv2d(3, 6, 3).double())
    options = {"window": 4, "gradient_sample": None}
    norm = anybatch.CrossIterationBatchNorm2d(6, **options).double().bind(module)
    used = nn.Conv2d(3, 6, 3).double()
    truth = reference.CrossIteration(convolve(used), 6, window=4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(8):
        x = moving((3, 6, 5), step)
        y = norm(module(x))
        # A convolution's output for a unit impulse at each input is its kernel.
        bias = module.bias.detach()
        kernel = torch.stack(
            [
                module._conv_forward(unit, module.weight, None)[0].flip(-1, -2)
                if wrap is not anybatch.weight_centralization
                else (module.forward(unit)[0] - bias.view(-1, 1, 1)).flip(-1, -2)
                for unit in impulses(3, 3)
            ],
            1,
        ).detach()
        expected, *_ = truth.forward(x, kernel, bias, norm.weight, norm.bias)
        assert torch.allclose(y, expected, atol=1e-8)
        optimizer.zero_grad()
        y.backward(torch.randn_like(y))
        optimizer.step()


def impulses(channels: int, size: int) -> list[Tensor]:
    """Inputs that are 1 in the middle of one channel, padded so that the output is the kernel."""
    found = []
    for channel in range(channels):
        unit = torch.zeros(1, channels, 2 * size - 1, 2 * size - 1).double()
        unit[0, channel, size - 1, size - 1] = 1
        found.append(unit)
    return found


def test_a_parametrization_that_moves_when_read_is_read_once() -> None:
    torch.manual_seed(0)
    plain = parametrizations.spectral_norm(nn.Conv2d(3, 6, 3))
    bound = copy.deepcopy(plain)
    norm = anybatch.CrossIterationBatchNorm2d(6, window=4).bind(bound)
    for _ in range(4):
        x = torch.randn(2, 3, 6, 6)
        y = bound(x)
        assert torch.equal(plain(x), y)
        norm(y)
    assert torch.equal(plain.parametrizations.weight[0]._u, bound.parametrizations.weight[0]._u)


@pytest.mark.parametrize("how", ["frozen", "rate of zero"])
def test_weights_that_do_not_move_are_not_compensated(how: str) -> None:
    module, norm, shape = pair("conv2d", window=4)
    module.requires_grad_(how != "frozen")
    optimizer = torch.optim.SGD([*module.parameters(), *norm.parameters()], lr=0.0)
    for _ in range(6):
        norm(module(torch.randn(2, *shape).double())).sum().backward()
        optimizer.step()
    module(torch.randn(2, *shape).double())
    means, variances = moved_slots(norm)
    used = int(norm.method_state["position"])
    slots = [i for i in range(4) if i != used]
    still = norm.method_state["mean"][slots] + module.bias
    assert torch.allclose(means[slots], still, atol=1e-12)
    assert torch.allclose(variances[slots], norm.method_state["var"][slots], atol=1e-12)


def test_a_jump_of_the_weights_is_clamped_and_forgotten_within_the_window() -> None:
    module, norm, shape = pair("conv2d", window=4)
    plain = anybatch.BatchNorm2d(6).double()
    plain.load_state_dict(norm.state_dict(), strict=False)
    for _ in range(6):
        norm(module(torch.randn(4, *shape).double()))
    with torch.no_grad():
        module.weight.copy_(torch.randn_like(module.weight))  # other weights altogether
    for _ in range(3):
        y = norm(module(torch.randn(4, *shape).double()))
        assert y.isfinite().all()
    seen = [torch.randn(4, *shape).double() for _ in range(4)]
    with torch.no_grad():
        for x in seen:
            y = norm(module(x))
        expected = plain(module(torch.cat(seen)))[-4:]
    assert torch.allclose(y, expected, atol=1e-10)


def test_averaged_weights_in_evaluation_leave_the_window_alone() -> None:
    module, norm, shape = pair("conv2d")
    model = nn.Sequential(module, norm)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(5):
        model(torch.randn(2, *shape).double()).sum().backward()
        with torch.no_grad():
            module.weight -= 0.05 * module.weight.grad
        average.update_parameters(model)
    before = copy.deepcopy(norm.state_dict())
    average.eval()(torch.randn(2, *shape).double())
    average.train()(torch.randn(2, *shape).double())  # bound to its own copy of the convolution
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    assert norm._flow.feed is None


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("inside", ["both", "norm", "convolution"])
def test_a_checkpointed_step_of_cbn_counts_once(use_reentrant: bool, inside: str) -> None:
    torch.manual_seed(0)
    module, norm, shape = pair("conv2d", window=4)
    plain_module, plain, _ = pair("conv2d", window=4)
    plain_module.load_state_dict(module.state_dict())
    plain.load_state_dict(norm.state_dict())
    optimizers = [
        torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.05)
        for a, b in ((module, norm), (plain_module, plain))
    ]
    for _ in range(7):
        x = torch.randn(2, *shape).double().requires_grad_()
        again = x.detach().clone().requires_grad_()
        expected = plain(plain_module(x))
        if inside == "both":
            y = checkpoint(nn.Sequential(module, norm), again, use_reentrant=use_reentrant)
        elif inside == "norm":
            y = checkpoint(norm, module(again), use_reentrant=use_reentrant)
        else:
            y = norm(checkpoint(module, again, use_reentrant=use_reentrant))
        dy = torch.randn_like(y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected.backward(dy)
        y.backward(dy)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.allclose(y, expected, atol=1e-10)
        assert torch.allclose(x.grad, again.grad, atol=1e-10)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(norm.state_dict()[name], tensor, atol=1e-10), name


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"gradient_sample": 8}], ids=str)
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_resumed_pair_goes_on_bit_for_bit(options: dict[str, Any], stop: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    anybatch.convert(model, "cbn", window=4, **options)
    data = [torch.randn(2, 3, 6, 6) for _ in range(12)]

    def train(net: nn.Sequential, some: list[Tensor], optimizer: torch.optim.SGD) -> Tensor:
        for x in some:
            y = net(x)
            optimizer.zero_grad()
            y.square().mul(x.mean()).sum().backward()
            optimizer.step()
        return y

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    train(model, data[:stop], optimizer)
    saved = copy.deepcopy(model.state_dict())
    expected = train(model, data[stop:], optimizer)
    again = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    anybatch.convert(again, "cbn", window=4, **options)
    again.load_state_dict(saved)
    assert torch.equal(
        train(again, data[stop:], torch.optim.SGD(again.parameters(), 0.02)), expected
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_window_read_from_the_first_batch_is_in_the_checkpoint() -> None:
    model = anybatch.convert(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), "cbn")
    for _ in range(5):
        model(torch.randn(4, 3))
    again = anybatch.convert(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), "cbn")
    again.load_state_dict(model.state_dict())
    assert again[1].window == 4
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_plain_checkpoint_starts_the_window_empty() -> None:
    module, norm, shape = pair("conv2d")
    for _ in range(5):
        norm(module(torch.randn(2, *shape).double()))
    norm.load_state_dict(nn.BatchNorm2d(6).double().state_dict())
    assert norm.method_state["entries"] == 0


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_batch_that_is_not_finite_does_not_enter_the_window(bad: float) -> None:
    module, norm, shape = pair("conv2d", window=4)
    for _ in range(6):
        norm(module(torch.randn(2, *shape).double()))
    spared_module, spared, _ = pair("conv2d", window=4)
    spared_module.load_state_dict(module.state_dict())
    spared.load_state_dict(norm.state_dict())
    x = torch.randn(2, *shape).double()
    x[0, 1, 2, 2] = bad
    with torch.no_grad():
        norm(module(x))
        module.weight += 0.05
        spared_module.weight += 0.05
        for _ in range(6):
            x = torch.randn(2, *shape).double()
            assert torch.equal(norm(module(x)), spared(spared_module(x)))
    assert torch.equal(norm.running_var, spared.running_var)
    assert all(tensor.isfinite().all() for tensor in norm.state_dict().values())


def test_one_value_a_channel_has_statistics_once_there_is_a_window() -> None:
    module, norm, _ = pair("linear", window=4)
    x = torch.randn(1, 5).double()
    y = norm(module(x))
    plain = F.batch_norm(
        module(x), torch.zeros(6).double(), torch.ones(6).double(), norm.weight, norm.bias
    )
    assert torch.allclose(y, plain)
    assert norm.running_mean.eq(0).all()
    for _ in range(3):
        y = norm(module(torch.randn(1, 5).double()))
        assert y.isfinite().all()
        y.sum().backward()
    assert norm.method_state["entries"] == 3


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{}, {"gradient_sample": None}, {"backward_stats": "window"}], ids=str
)
def test_a_compiled_pair_is_whole_and_equal(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    anybatch.convert(model, "cbn", window=3, **options)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(6):
        x = torch.randn(2, 3, 6, 6)
        a, b = model(x), compiled(x)
        assert torch.allclose(a, b, atol=1e-5)
        dy = torch.randn_like(a)
        a.backward(dy)
        b.backward(dy)
        with torch.no_grad():
            model[0].weight -= 0.01 * model[0].weight.grad
            twin[0].weight -= 0.01 * twin[0].weight.grad
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, twin.state_dict()[name], atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sample", [None, 16])
def test_autocast_and_low_precision(dtype: torch.dtype, sample: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    anybatch.convert(model, "cbn", window=3, gradient_sample=sample)
    twin = copy.deepcopy(model)
    for _ in range(5):
        x = torch.randn(4, 3, 8, 8) * 30
        with torch.autocast("cpu", dtype):
            low = model(x)
        assert low.dtype == dtype
        low.sum().backward()
        assert torch.allclose(low.float(), twin(x), atol=0.1)
    assert all(t.dtype != dtype for t in model[1].state_dict().values())


@pytest.mark.parametrize("order", [0, 1])
def test_a_first_batch_of_one_value_has_its_place_in_the_backward_window(order: int) -> None:
    torch.manual_seed(0)
    options = {"window": 3, "order": order, "burn_in": 0.0, "backward_stats": "window"}
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    nets = [anybatch.convert(net, "cbn", **options)]
    nets.append(copy.deepcopy(net))
    found = []
    for one, choice in zip(nets, ("auto", "never"), strict=True):
        use_fused(choice)
        torch.manual_seed(1)
        results = []
        for n in (1, 4, 4):
            x = torch.randn(n, 4, requires_grad=True)
            one(x).backward(torch.randn(n, 3))
            results.append(x.grad)
        found.append([*results, *one[1].state_dict().values()])
    use_fused("auto")
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Copies, conversion, mistakes


def test_a_copy_follows_its_own_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    anybatch.convert(model, "cbn", window=3)
    twin = copy.deepcopy(model)
    for _ in range(3):
        twin(torch.randn(2, 3, 5, 5))
    assert model[1].method_state["entries"] == 0
    assert twin[1].method_state["entries"] == 2
    (hook,) = twin[0]._forward_hooks.values()
    assert hook.__self__ is twin[1]


def test_a_norm_without_a_convolution_of_its_own_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.twice = nn.Conv2d(6, 6, 3, padding=1)
            self.drop = nn.Dropout(0.1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (6, 6, 12, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](self.conv(x))
            a = self.norms[1](self.drop(self.twice(x)))
            b = self.norms[2](torch.cat([x, a], 1))
            c = self.norms[3](x + a)
            return self.norms[4](self.twice(c)) + b[:, :6]

    model = Net()
    plan = anybatch.plan(model, "cbn")
    assert [row.decision for row in plan.rows] == ["convert", "keep", "keep", "keep", "keep"]
    assert [row.binds for row in plan.rows] == ["conv", None, None, None, None]
    reasons = [row.reason for row in plan.rows[1:]]
    for reason, words in zip(
        reasons,
        ("Dropout 'drop'", "a concatenation", "an addition", "'twice' is called twice"),
        strict=True,
    ):
        assert words in reason
    anybatch.convert(model, "cbn")
    kinds = [type(norm).__name__ for norm in model.norms]
    assert kinds == ["CrossIterationBatchNorm2d", *["BatchNorm2d"] * 4]
    assert not model.twice._forward_hooks


def test_a_convolution_with_a_forward_of_its_own_is_not_followed() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight / self.weight.std(), self.bias)

    model = nn.Sequential(Standardized(3, 6, 3), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match="in its own way"):
        anybatch.convert(model, "cbn")
    assert type(model[1]) is nn.BatchNorm2d
    naive = anybatch.convert(model, "cbn", order=0, window=4)
    assert naive[1].order == 0


def test_what_leaves_lets_go_of_its_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    for other in ("mbn", "gn"):
        anybatch.convert(model, "cbn")
        assert len(model[0]._forward_hooks) == 1
        if other == "gn":
            break
        anybatch.convert(model, other)
        assert not model[0]._forward_hooks
    anybatch.convert(model, "cbn", window=3)
    assert len(model[0]._forward_hooks) == 1
    plain = anybatch.to_batchnorm(copy.deepcopy(model))
    assert not plain[0]._forward_hooks
    folded = anybatch.fold(copy.deepcopy(model).eval())
    assert type(folded[1]) is nn.Identity
    assert not folded[0]._forward_hooks
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(folded(x), model.eval()(x), atol=1e-5)


def test_what_bind_refuses() -> None:
    norm = anybatch.CrossIterationBatchNorm2d(6, window=4)
    with pytest.raises(TypeError, match="module=ReLU"):
        norm.bind(nn.ReLU())
    with pytest.raises(ValueError, match="5 channels, this layer normalizes 6"):
        norm.bind(nn.Conv2d(3, 5, 3))
    first = nn.Conv2d(3, 6, 3)
    norm.bind(first)
    with pytest.raises(ValueError, match="unbind it first"):
        norm.bind(nn.Conv2d(3, 6, 3))
    norm.unbind(first)
    assert not first._forward_hooks
    norm.bind(nn.Conv2d(3, 6, 3))


def test_what_a_forward_refuses() -> None:
    norm = anybatch.CrossIterationBatchNorm2d(6, window=4)
    with pytest.raises(RuntimeError, match=r"bound to no layer: call \.bind\(conv\)"):
        norm(torch.randn(2, 6, 4, 4))
    conv = nn.Conv2d(3, 6, 3)
    norm.bind(conv)
    with pytest.raises(RuntimeError, match="must run in turn"):
        norm(torch.randn(2, 6, 4, 4))
    for y in (torch.randn(3, 6, 4, 4), conv(torch.randn(2, 3, 6, 6)) + 1):
        conv(torch.randn(2, 3, 6, 6))
        with pytest.raises(ValueError, match="must normalize that layer's latest output"):
            norm(y)
    first = conv(torch.randn(2, 3, 6, 6))
    conv(torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match="latest output"):
        norm(first)
    norm(conv(torch.randn(2, 3, 6, 6)))
    norm.eval()(torch.randn(2, 6, 4, 4))
    norm = anybatch.CrossIterationBatchNorm1d(4, window=4).bind(nn.Linear(3, 4))
    assert norm.eval()(torch.randn(2, 4)).shape == (2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window=0"),
        ({"burn_in_steps": -1}, "burn_in_steps=-1"),
        ({"burn_in": 1.5}, "burn_in=1.5"),
        ({"order": 3}, "order=3"),
        ({"gradient_sample": 0}, "gradient_sample=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"backward_stats": "sma"}, "backward_stats='sma'"),
        ({"running_stats": "ema"}, "running_stats='ema'"),
    ],
    ids=str,
)
def test_what_the_layer_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        anybatch.CrossIterationBatchNorm2d(6, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("feeder", list(FEEDERS))
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_sample": 8},
        {"gradient_sample": 8, "norm_batch_size": 2},
        {"gradient_sample": 8, "backward_stats": "window", "running_stats": "window"},
        {"order": 0, "backward_stats": "window"},
    ],
    ids=str,
)
def test_numba_and_torch_operators_agree_for_cbn(feeder: str, options: dict[str, Any]) -> None:
    pytest.importorskip("numba")
    module, norm, shape = pair(feeder, **options)
    other, plain, _ = pair(feeder, **options)
    other.load_state_dict(module.state_dict())
    plain.load_state_dict(norm.state_dict())
    for step in range(9):
        x = moving(shape, step)
        dy = torch.randn_like(module.forward(x))
        results = []
        for choice, conv, layer in (("auto", module, norm), ("never", other, plain)):
            use_fused(choice)
            conv.zero_grad()
            layer.zero_grad()
            given = x.clone().requires_grad_()
            y = layer(conv(given))
            assert (y.grad_fn.how[0].name == "numba") == (choice == "auto")
            y.backward(dy)
            results.append((y, given.grad, layer.weight.grad, conv.weight.grad))
        use_fused("auto")
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-9)
        with torch.no_grad():
            shift = 0.05 * torch.randn_like(module.weight)
            module.weight += shift
            other.weight += shift
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(norm.state_dict()[name], tensor, atol=1e-9), name
