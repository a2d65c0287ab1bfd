"""Several forwards that make one optimizer step: exact pooling, one step in every memory."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.core.autograd import statistics_of
from anybatch.core.norm_layer import NormLayer
from anybatch.core.notices import NoEffectWarning
from method_cases import NAMES as ALL
from method_cases import SAMPLED, UNPOOLED, VIRTUAL, batch, finite, make, same, state, step, train
from processes import spawn

NAMES = [name for name in ALL if name not in UNPOOLED]
POOLED = [name for name in NAMES if name not in ("ghost", "bgn")]
# Samples of micro-batches make that of the joined batch where they are patches.
JOINED = [name for name in POOLED if name not in SAMPLED or name == "fs"]
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def pair(name: str, steps: int | None = 3, **options: object) -> tuple[NormLayer, NormLayer]:
    """Two equal layers, of which the second accumulates."""
    if name == "fs":  # a ratio takes larger patches of few examples
        options = {"size": 2, **options}
    one = make(name, **options).double()
    other = copy.deepcopy(one)
    other.accumulate(steps)
    if name == "mbn" and steps is not None:  # it schedules by the examples of a step
        one._set_batch_size(2 * steps)
    return one, other


def memory(layer: NormLayer, backward: bool = False) -> dict[str, Tensor]:
    """What a layer keeps from step to step, without what moves in the backward pass."""
    kept = {k: v for k, v in state(layer).items() if not k.startswith("step.")}
    return {k: v for k, v in kept.items() if backward or not k.startswith("backward_")}


def close(
    first: dict[str, Tensor], second: dict[str, Tensor], but: tuple[str, ...] = ("batch_size",)
) -> bool:
    assert first.keys() == second.keys()
    return all(torch.allclose(first[k], second[k], atol=1e-12) for k in first if k not in but)


@pytest.mark.parametrize("name", JOINED)
def test_memory_after_a_step_is_that_of_the_joined_batch(name: str) -> None:
    whole, parts = pair(name)
    for _ in range(12):
        micro = [batch(examples).double() for examples in (2, 1, 3)]
        expected = whole(torch.cat(micro))
        outputs = [parts(x) for x in micro]
        assert torch.allclose(outputs[-1], expected[-3:], atol=1e-12)
        assert close(memory(whole), memory(parts))
    assert parts.num_batches_tracked == 12


@pytest.mark.parametrize("name", JOINED)
def test_the_micro_batches_seen_so_far_pool(name: str) -> None:
    whole, parts = pair(name)
    for _ in range(12):
        micro = [batch(2).double() for _ in range(3)]
        for seen in range(3):
            before = copy.deepcopy(whole)
            assert torch.allclose(
                parts(micro[seen]), before(torch.cat(micro[: seen + 1]))[-2:], atol=1e-12
            )
            assert close(memory(before), memory(parts))
        whole = before


@pytest.mark.parametrize("name", ["ghost", "bgn"])
def test_groups_keep_their_own_statistics_and_running_ones_pool(name: str) -> None:
    whole, parts = pair(name)
    for _ in range(4):
        x = batch(12).double()
        expected = whole(x)
        assert torch.allclose(torch.cat([parts(part) for part in x.split(4)]), expected)
        assert close(memory(whole), memory(parts))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLED or name == "fs"])
def test_a_shorter_step_is_ended_by_hand_or_by_the_optimizer(name: str) -> None:
    whole, by_hand = pair(name, None, momentum=0.1)
    model = nn.Sequential(copy.deepcopy(whole))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = anybatch.accumulate(nn.Sequential(by_hand), 3)
    if name == "mbn":  # which the optimizer alone does not tell of a step's examples
        by_hand.method_state["average_weight"].copy_(whole.method_state["average_weight"])
    anybatch.accumulate(model, optimizer=optimizer)
    for parts in (3, 1, 2, 3):
        micro = [batch(2).double() for _ in range(parts)]
        with torch.no_grad():
            whole(torch.cat(micro))
            for x in micro:
                by_hand(x)
        handle.end_step()
        for x in micro:
            model(x).sum().backward()
        optimizer.step()
        assert close(memory(whole), memory(by_hand))
        assert close(memory(whole), memory(model[0]))


@pytest.mark.parametrize("name", ["bn", "mbn", "brn", "mabn"])
def test_the_gradient_has_the_micro_batchs_own_means(name: str) -> None:
    layer = make(name).double()
    layer.set_progress(1, 3)
    layer.accumulate(3)
    psis: list[Tensor] = []
    for _ in range(3):
        x, dy = batch(2).double(), torch.randn(2, 6, 4, 3).double()
        given = x.clone().requires_grad_()
        y = layer(given)
        backend, call, _, context, _ = y.grad_fn.how  # type: ignore[union-attr]
        used = statistics_of(backend, call, context, x)
        y.backward(dy)
        grad, (mean, var, r) = given.grad, (used.mean, used.var, used.r)
        column = (1, -1, 1, 1)
        mean = torch.zeros(6) if mean is None else mean
        sigma = (var + layer.eps).sqrt().view(column)
        z = (x - mean.view(column)) / sigma
        g = dy * (layer.weight.detach() * (1 if r is None else r)).view(column)
        psis.append((g * z).mean((0, 2, 3)))
        # mabn in its warm-up has the batch's own, which is that of the step so far.
        psi = torch.stack(psis).mean(0) if name == "mabn" else psis[-1]
        mean_g = 0 if name == "mabn" else g.mean((0, 2, 3)).view(column)
        expected = (g - mean_g - z * psi.view(column)) / sigma
        assert torch.allclose(grad, expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [1, 3, 5, 14])
def test_a_run_resumed_within_a_step_goes_on_bit_for_bit(name: str, stop: int) -> None:
    torch.manual_seed(0)
    layer = make(name)
    layer.accumulate(4)
    data = [(batch(2), torch.randn(2, 6, 4, 3)) for _ in range(20)]
    for x, dy in data[:stop]:
        step(layer, x, dy)
    resumed = make(name)
    resumed.accumulate(4)
    resumed.load_state_dict(state(layer))
    for x, dy in data[stop:]:
        first, second = step(layer, x, dy), step(resumed, x, dy)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert same(state(layer), state(resumed))


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_pass_between_layers_that_accumulate_and_that_do_not(name: str) -> None:
    plain, other = make(name), make(name)
    other.accumulate(2)
    for _ in range(3):
        step(other, batch(2))
    plain.load_state_dict(other.state_dict(), strict=True)
    assert same(memory(plain, True), memory(other, True))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert other.step is not None
    assert other.step.tensors["micro_batches"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_update_leaves_no_trace_within_a_step(name: str) -> None:
    layer = make(name)
    layer.accumulate(3)
    for _ in range(8):
        step(layer, batch(2))
    before = state(layer)
    x = batch(2)
    with anybatch.no_update():
        quiet = layer(x)
        quiet.sum().backward()
    assert same(before, state(layer))
    assert torch.allclose(layer(x), quiet, atol=1e-6)


@pytest.mark.parametrize("name", POOLED)
def test_a_micro_batch_that_is_not_finite_is_not_pooled(name: str) -> None:
    layer = make(name)
    layer.accumulate(3)
    for _ in range(9):
        step(layer, batch(2))
    step(layer, batch(2))
    x = batch(2)
    x[0, 2] = torch.inf
    with torch.no_grad():
        layer(x)
    assert finite(state(layer))
    y, grad = step(layer, batch(2))
    assert y.isfinite().all()
    assert grad.isfinite().all()
    assert finite(state(layer))


@pytest.mark.parametrize("name", JOINED)
def test_micro_batches_of_one_value_pool(name: str) -> None:
    whole, parts = pair(name, 4, dims=1)
    for _ in range(6):
        x = torch.randn(4, 6).double()
        expected = whole(x)
        outputs = [step(parts, row)[0] for row in x.split(1)]
        assert torch.allclose(outputs[-1], expected[-1:], atol=1e-12)
        assert all(y.isfinite().all() for y in outputs)
        assert close(memory(whole), memory(parts))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_counts_once_within_a_step(name: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = make(name)
    again = copy.deepcopy(plain)
    plain.accumulate(2)
    again.accumulate(2)
    for _ in range(7):
        x, dy = batch(2), torch.randn(2, 6, 4, 3)
        expected = step(plain, x, dy)
        x = x.clone().requires_grad_()
        y = checkpoint(again, x, use_reentrant=use_reentrant)
        y.backward(dy)
        assert torch.allclose(y, expected[0], atol=1e-5)
        assert torch.allclose(x.grad, expected[1], atol=1e-4)
    first, second = state(plain), state(again)
    assert all(torch.allclose(first[k].float(), second[k].float(), atol=1e-4) for k in first)


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_accumulating_layer_compiles_whole(name: str) -> None:
    if name == "mabn" and torch.__version__ < "2.7":
        pytest.skip("its compiler takes no layer into a backward pass")
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = make(name)
    layer.accumulate(3)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(7):
        x, dy = batch(2), torch.randn(2, 6, 4, 3)
        for a, b in zip(step(layer, x, dy), step(compiled, x, dy), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["bn", "ghost", "bgn"])
def test_a_layer_without_running_statistics_accumulates(name: str) -> None:
    layer = make(name, track_running_stats=False)
    layer.accumulate(2)
    y, _ = step(layer, batch(2))
    assert y.isfinite().all()


@pytest.mark.parametrize("name", UNPOOLED)
def test_what_does_not_pool_is_refused(name: str) -> None:
    model = nn.Sequential(anybatch.BatchNorm2d(6), make(name))
    with pytest.raises(ValueError, match="1: .*do not pool over micro-batches"):
        anybatch.accumulate(model, 2)
    assert model[0].step is None


@pytest.mark.parametrize("name", ["ns", "bs", "points", *VIRTUAL])
def test_samples_of_micro_batches_pool(name: str) -> None:
    """Equal micro-batches: means of means, and of variances about the common mean."""
    layer = make(name, momentum=None).double()
    parts = copy.deepcopy(layer)
    parts.accumulate(3)
    micro = [batch(4).double() for _ in range(3)]
    means, variances = [], []
    for x in micro:
        layer.reset_running_stats()
        layer.set_progress(2, 3)
        layer(x), parts(x)
        means.append(layer.running_mean)
        variances.append(layer.running_var)
        assert parts.num_batches_tracked == 1
        means[-1], variances[-1] = means[-1].clone(), variances[-1].clone()
    count = sum(part.values for part in layer._parts(micro[0], (4,))[0])
    mean = torch.stack(means).mean(0)
    biased = torch.stack(variances).mean(0) * (count - 1) / count
    spread = torch.stack([(one - mean) ** 2 for one in means]).mean(0)
    assert torch.allclose(parts.running_mean, mean)
    assert torch.allclose(parts.running_var, (biased + spread) * 3 * count / (3 * count - 1))


def test_what_accumulate_refuses() -> None:
    with pytest.raises(ValueError, match="steps=None"):
        anybatch.accumulate(nn.Sequential(anybatch.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="steps=0"):
        anybatch.accumulate(nn.Sequential(anybatch.BatchNorm1d(3)), 0)
    with pytest.raises(TypeError, match=r"steps=2\.0"):
        anybatch.accumulate(nn.Sequential(anybatch.BatchNorm1d(3)), 2.0)
    with pytest.raises(ValueError, match="no anybatch layer"):
        anybatch.accumulate(nn.Sequential(nn.BatchNorm1d(3)), 2)
    model = nn.Sequential(anybatch.BatchNorm1d(3), anybatch.BatchNorm1d(3, norm_batch_size=2))
    with pytest.raises(ValueError, match="1: norm_batch_size=2"):
        anybatch.accumulate(model, 2)
    assert model[0].step is None


def test_what_accumulate_arranged_can_be_undone() -> None:
    model = nn.Sequential(anybatch.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with anybatch.accumulate(model, optimizer=optimizer):
        assert model[0].step is not None
    assert model[0].step is None
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def test_a_converted_layer_goes_on_accumulating() -> None:
    model = nn.Sequential(anybatch.BatchNorm1d(3))
    anybatch.accumulate(model, 4)
    anybatch.convert(model, "mabn")
    assert model[0].step is not None
    assert model[0].step.steps == 4


def test_momentum_batch_norm_counts_the_examples_of_a_step() -> None:
    micro = anybatch.MomentumBatchNorm1d(3, batch_size=2)
    whole = anybatch.MomentumBatchNorm1d(3, batch_size=8)
    for layer in (micro, whole):
        layer.set_progress(3, 5)
    micro.accumulate(4)
    assert micro.average_weight == whole.average_weight
    assert micro.momentum == whole.momentum
    micro.accumulate(1)
    assert micro.average_weight != whole.average_weight


@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_that_no_optimizer_tells_of_its_steps_says_so(make) -> None:
    net = anybatch.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "bn")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    anybatch.accumulate(net, optimizer=optimizer)
    other = make(net)
    other.eval()(torch.randn(4, 4))
    with anybatch.no_update():
        other.train()(torch.randn(4, 4))
    with pytest.warns(anybatch.NoEffectWarning, match=r"accumulate\(copy, optimizer="):
        other.train()(torch.randn(4, 4))
    other(torch.randn(4, 4))  # once is enough
    theirs = torch.optim.SGD(other.parameters(), 0.1)
    anybatch.accumulate(other, optimizer=theirs)
    counted = anybatch.accumulate(copy.deepcopy(other), 2).model  # which counts by itself
    for network in (net, other, copy.deepcopy(counted)):
        before = network[1].num_batches_tracked.item()
        for forwards in range(4):
            network(torch.randn(4, 4)).square().mean().backward()
            if forwards % 2:
                (optimizer if network is net else theirs).step()
        assert network[1].num_batches_tracked == before + 2


def test_what_is_set_within_an_optimizer_step_stays() -> None:
    """The batch size that the first micro-batch tells, and an epoch that begins between two."""
    layer = make("mbn", batch_size=None)
    layer.accumulate(4)
    train(layer, 2)
    layer.set_progress(3, 3)
    weight = layer.average_weight
    train(layer, 1)
    assert layer.method_state["batch_size"] == 2
    assert layer.average_weight == weight > 0


@pytest.mark.parametrize("resumed", [False, True])
def test_a_window_that_the_first_batch_decides_on_accumulates(resumed: bool) -> None:
    """Its length is not known when the layer is told to, nor when it loads a checkpoint."""

    def built() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
        anybatch.convert(net, "cbn", burn_in=0.0)
        anybatch.accumulate(net, 4)
        return net

    torch.manual_seed(1)
    net, other = built(), None
    for number in range(11):
        if resumed and number == 6:
            other = built()
            other.load_state_dict(net.state_dict())
        x, dy = batch(2, 3), torch.randn(2, 6, 4, 3)
        found = step(net, x, dy)
        if other is not None:
            assert all(map(torch.equal, found, step(other, x, dy)))
    assert net[1].window == 8
    assert net[1].method_state["entries"] == 3
    if other is not None:
        assert same(state(net), state(other))


def test_no_layer_joins_micro_batches_whose_statistics_do_not_pool() -> None:
    """Neither accumulate, nor what it becomes later."""
    net = anybatch.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "bn")
    scheduler = anybatch.NormScheduler(net, 3, switch={2: "l1"})
    anybatch.accumulate(net, 4)
    with pytest.raises(ValueError, match="do not pool over micro-batches"):
        anybatch.convert(net, "range")
    with pytest.raises(ValueError, match="do not pool over micro-batches"):
        scheduler.step()
    assert type(net[1]) is anybatch.BatchNorm2d


@pytest.mark.parametrize("use", ["recalibrate", "average"])
def test_statistics_from_elsewhere_outlive_an_unfinished_step(use: str) -> None:
    """The next micro-batch begins a step; it does not go back to where the old one began."""
    net = anybatch.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "bn")
    anybatch.accumulate(net, 8)
    for _ in range(10):
        net(torch.randn(2, 3, 6, 6))
    if use == "recalibrate":
        anybatch.recalibrate(net, [torch.randn(64, 3, 6, 6) + 5])
    else:
        spawn(_average_within_a_step)
        return
    mean = net[1].running_mean.clone()
    net(torch.randn(2, 3, 6, 6) + 5)
    torch.testing.assert_close(net[1].running_mean, mean, rtol=0.5, atol=0.1)


def _average_within_a_step(rank: int) -> None:
    net = anybatch.BatchNorm1d(2)
    anybatch.accumulate(net, 8)
    net(torch.randn(4, 2))
    net.running_mean.fill_(100.0 * rank)
    anybatch.average_running_stats(net)
    net(torch.randn(4, 2))
    assert float(net.running_mean.min()) > 40


def test_an_optimizer_that_never_steps_is_told() -> None:
    """As one around another, whose own step() is what a loop calls."""
    net = anybatch.BatchNorm1d(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    anybatch.accumulate(net, optimizer=optimizer)
    x = torch.randn(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(999):
            net(x)
    with pytest.warns(NoEffectWarning, match="the optimizer has not made a step"):
        net(x)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layer may run very often in a step
        for _ in range(1001):
            net(x)


def test_a_wrapped_optimizer_is_refused_and_nothing_changed() -> None:
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    net = anybatch.BatchNorm1d(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="give a torch.optim.Optimizer, such as its .optimizer"):
        anybatch.accumulate(net, optimizer=Wrapped(optimizer))
    assert net.step is None


def test_a_handle_undoes_its_own_accumulation_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), anybatch.BatchNorm2d(4))
    first = anybatch.accumulate(net, 4)
    second = anybatch.accumulate(net, 2)
    first.remove()
    for _ in range(4):
        net(torch.randn(2, 3, 6, 6))
    assert net[1].num_batches_tracked == 2
    anybatch.convert(net, "brn")  # which goes on accumulating
    second.remove()
    assert net[1].step is None
