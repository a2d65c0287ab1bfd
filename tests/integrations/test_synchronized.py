"""Layers that synchronize: several processes are one that holds the whole batch."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch
from anybatch.core.norm_layer import NormLayer
from processes import spawn

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]

STEPS = 6
SHARES = {  # examples of each process in each step; then the same again
    "even": [[4, 4]],
    "uneven": [[3, 5], [5, 1], [1, 2]],
    "empty": [[4, 0], [0, 3]],
}
SHORT = {"window": 2, "warmup_steps": 2, "renorm_warmup_steps": 3}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "bn": ("bn", {}),
    "bn, all batches": ("bn", {"momentum": None}),
    "bn, momentum warms up": ("bn", {"momentum_warmup": 3}),
    "mbn": ("mbn", {"batch_size": 8}),
    "mabn": ("mabn", SHORT),
    "mabn, centred": ("mabn", {**SHORT, "centered": True}),
    "brn": ("brn", {"warmup_steps": 2}),
    "cbn, order 0": ("cbn", {"window": 3, "order": 0, "burn_in": 0.0}),
    "l1": ("l1", {}),
    "range": ("range", {}),
    "fs": ("fs", {"size": 2, "seed": 3}),
    "ns, all of it": ("ns", {"ratio": 1.0}),
}


def close(actual: Tensor, expected: Tensor, what: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8, msg=lambda m: f"{what}: {m}")


def layer_of(method: str, options: dict[str, Any], dims: int = 2, **more: Any) -> NormLayer:
    torch.manual_seed(0)
    layer = anybatch.get_method(method).build(6, dims, dtype=torch.float64, **options, **more)
    assert isinstance(layer, NormLayer)
    nn.init.normal_(layer.weight, 1.0, 0.3)
    nn.init.normal_(layer.bias)
    layer.set_progress(2, 3)
    return layer


def whole_batch(step: int, examples: int, *spatial: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, cotangent and mask of all processes' examples."""
    generator = torch.Generator().manual_seed(step)
    shape = (examples, 6, *spatial)
    x = torch.randn(shape, generator=generator).double() * (1 + 0.1 * step) + 0.5 * step
    x = x + torch.arange(6).view(-1, *(1,) * len(spatial))
    dy = torch.randn(shape, generator=generator).double()
    mask = torch.rand((examples, *spatial), generator=generator) < 0.7
    return x, dy, mask


def cut(tensor: Tensor, shares: list[int], rank: int) -> Tensor:
    return tensor.split(shares)[rank]


def one_step(layer: nn.Module, x: Tensor, dy: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, **named)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def _methods(rank: int, world: int, shares_name: str) -> None:
    if world == 4:
        shares = [[2, 1, 3, 0], [0, 4, 1, 1]]
    else:
        shares = SHARES[shares_name]
    for name, (method, options) in METHODS.items():
        for masked in (False, True):
            ours = layer_of(method, options, process_group="world")
            alone = layer_of(method, options)
            for step in range(STEPS):
                counts = shares[step % len(shares)]
                x, dy, mask = whole_batch(step, sum(counts), 4, 3)
                whole = {"mask": mask} if masked else {}
                mine = {"mask": cut(mask, counts, rank)} if masked else {}
                y, dx = one_step(alone, x, dy, **whole)
                my_y, my_dx = one_step(ours, cut(x, counts, rank), cut(dy, counts, rank), **mine)
                what = (name, masked, step, rank)
                close(my_y, cut(y, counts, rank), what)
                close(my_dx, cut(dx, counts, rank), what)
            for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
                total = mine.grad.clone()
                dist.all_reduce(total)
                close(total, theirs.grad, (name, masked))
            for key, value in ours.state_dict().items():
                close(value, alone.state_dict()[key], (name, masked, key))
                agreed = value.double().clone()
                dist.broadcast(agreed, 0)
                assert torch.equal(agreed, value.double()), (name, key)  # to the bit


@pytest.mark.exhaustive
@pytest.mark.parametrize("shares", ["even", "uneven", "empty"])
def test_two_processes_give_what_one_gives(shares: str) -> None:
    spawn(_methods, 2, shares)


@pytest.mark.exhaustive
def test_four_processes_give_what_one_gives() -> None:
    spawn(_methods, 4, "", world_size=4)


# --- cross-iteration BN, with the convolution that feeds it -----------------------------


FEEDERS = {
    "grouped, strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "linear": lambda: nn.Linear(4, 6),
}


def _cross_iteration(rank: int) -> None:
    for feeder, build in FEEDERS.items():
        for order, masked in ((1, False), (2, False), (1, True), (2, True)):
            options = {"window": 3, "burn_in": 0.0, "order": order, "gradient_sample": None}
            options["backward_stats"] = "window" if order == 1 else "batch"
            dims = 1 if feeder == "linear" else 2
            pairs = []
            for group in ("world", None):
                torch.manual_seed(0)
                feed = build().double()
                pairs.append((feed, layer_of("cbn", options, dims, process_group=group).bind(feed)))
            (conv, ours), (lone_conv, alone) = pairs
            for step in range(STEPS):
                counts = SHARES["empty"][step % 2] if step > 3 else SHARES["uneven"][step % 3]
                size = () if feeder == "linear" else (5, 6)
                x, _, _ = whole_batch(step, sum(counts), *size)
                x = x[:, :4].contiguous()
                y = alone(lone_conv(x)) if not masked else None
                shape = lone_conv(x).shape
                mask = torch.rand(shape[0], *shape[2:], generator=torch.manual_seed(step)) < 0.7
                dy = torch.randn(shape, generator=torch.manual_seed(9)).double()
                if masked:
                    y = alone(lone_conv(x), mask=mask)
                assert y is not None
                y.backward(dy)
                my_mask = cut(mask, counts, rank) if masked else None
                my_y = ours(conv(cut(x, counts, rank)), mask=my_mask)
                my_y.backward(cut(dy, counts, rank))
                close(my_y, cut(y, counts, rank), (feeder, order, masked, step))
                grad = conv.weight.grad.clone()
                dist.all_reduce(grad)
                close(grad, lone_conv.weight.grad, (feeder, order, masked, step))
                with torch.no_grad():
                    for weight in (conv.weight, lone_conv.weight):
                        weight -= 0.05 * grad
                        weight.grad = None
            for key, value in ours.state_dict().items():
                close(value, alone.state_dict()[key], (feeder, order, masked, key))


@pytest.mark.exhaustive
def test_windows_of_several_processes_are_those_of_one() -> None:
    spawn(_cross_iteration)


# --- groups of examples keep statistics of their own ------------------------------------


def _groups(rank: int) -> None:
    for method, options in (("ghost", {"ghost_size": 2}), ("bgn", {"num_groups": 2})):
        for masked in (False, True):
            ours = layer_of(method, options, process_group="world")
            alone = layer_of(method, options)
            for step in range(4):
                counts = [[2, 4], [4, 0], [0, 2], [6, 2]][step]
                x, dy, mask = whole_batch(step, sum(counts), 4, 3)
                whole = {"mask": mask} if masked else {}
                mine = {"mask": cut(mask, counts, rank)} if masked else {}
                y, dx = one_step(alone, x, dy, **whole)
                my_y, my_dx = one_step(ours, cut(x, counts, rank), cut(dy, counts, rank), **mine)
                close(my_y, cut(y, counts, rank), (method, step))
                close(my_dx, cut(dx, counts, rank), (method, step))
            for key, value in ours.state_dict().items():
                close(value, alone.state_dict()[key], (method, masked, key))


@pytest.mark.exhaustive
def test_groups_are_local_and_their_running_statistics_common() -> None:
    spawn(_groups)


# --- samples ----------------------------------------------------------------------------


def _by_formula(x: Tensor, layer: Any, values: list[Tensor], shares: list[float]) -> Tensor:
    """Normalization by a mixture of the statistics of some values, ``(n, C)`` each."""
    mean = sum(w * v.mean(0) for w, v in zip(shares, values, strict=True))
    var = sum(w * v.var(0, correction=0) for w, v in zip(shares, values, strict=True))
    column = (1, -1, 1, 1)
    z = (x - mean.view(column)) / (var + layer.eps).sqrt().view(column)
    return layer.weight.view(column) * z + layer.bias.view(column)


def _rows(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).t()


def _samples(rank: int) -> None:
    x, dy, _ = whole_batch(1, 12, 4, 3)
    counts = [8, 4]
    mine, my_dy = cut(x, counts, rank), cut(dy, counts, rank)

    def check(layer: NormLayer, whole: Tensor, values: list[Tensor], shares: list[float]) -> None:
        expected = _by_formula(whole, layer, values, shares)
        dx, dw = torch.autograd.grad(expected, (whole, layer.weight), dy)
        y, my_dx = one_step(layer, mine, my_dy)
        close(y, cut(expected, counts, rank), layer)
        close(my_dx, cut(dx, counts, rank), layer)
        total = layer.weight.grad.clone()
        dist.all_reduce(total)
        close(total, dw, layer)

    whole = x.clone().requires_grad_()
    # Naive: the first examples of each process, of 16 values or more.
    layer = layer_of("ns", {"ratio": 0.25}, process_group="world")
    check(layer, whole, [_rows(torch.cat([whole[:2], whole[8:10]]))], [1.0])
    # A subset of the processes, the same on each, another in another draw.
    layer = layer_of("bs", {"ratio": 1.0, "seed": 5 + rank, "ranks": 1}, process_group="world")
    chosen = set()
    for epoch in range(1, 9):
        layer.set_progress(epoch, 8)
        alone = [_rows(whole[:8]), _rows(whole[8:])]
        y = layer(mine)
        fits = [
            r
            for r in range(2)
            if torch.allclose(y, cut(_by_formula(whole, layer, [alone[r]], [1.0]), counts, rank))
        ]
        assert len(fits) == 1
        chosen.add(fits[0])
        gathered = [None, None]
        dist.all_gather_object(gathered, fits[0])
        assert gathered[0] == gathered[1]
        check(layer, whole, [alone[fits[0]]], [1.0])
        layer.weight.grad = None
    assert chosen == {0, 1}
    # Virtual rows in one process only, mixed with patches of all.
    layer = layer_of("fs+vdn", {"ratio": 1.0, "mix": 0.3}, process_group="world")
    layer.wrapped_rows = 2 if rank == 0 else 0
    real = torch.cat([whole[2:8], whole[8:]])
    check(layer, whole, [_rows(whole[:2]), _rows(real)], [0.3, 0.7])
    # Virtual rows alone.
    layer = layer_of("vdn", {}, process_group="world")
    layer.wrapped_rows = 2 if rank == 0 else 0
    check(layer, whole, [_rows(whole[:2])], [1.0])


@pytest.mark.exhaustive
def test_samples_of_several_processes_are_their_definition() -> None:
    spawn(_samples)


def _virtual_dataset(rank: int) -> None:
    def network(group: Any) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).double()
        return anybatch.convert(net, "vdn", process_group=group)

    x = whole_batch(0, 6, 5, 5)[0][:, :3]
    net = anybatch.VirtualDataset(network("world"), 0.5, 2.0, 3, seed=1, ranks=[1])
    net(cut(x, [2, 4], rank)).sum().backward()
    alone = anybatch.VirtualDataset(network(None), 0.5, 2.0, 3, seed=1)
    alone(x)
    close(net.model[1].running_var, alone.model[1].running_var, "virtual examples of one process")
    with pytest.raises(ValueError, match=r"ranks=\[1\]: 1 does not synchronize"):
        anybatch.VirtualDataset(network(None), 0.5, 2.0, 3, ranks=[1])(x)


@pytest.mark.exhaustive
def test_virtual_examples_of_some_processes() -> None:
    spawn(_virtual_dataset)


# --- networks ---------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


def _networks(rank: int) -> None:
    """Replicas train as one process with the whole batch, gradient accumulation included."""
    settings: dict[str, dict[str, Any]] = {
        "sync": {},
        "mabn": {"warmup_steps": 2, "renorm_warmup_steps": 3, "window": 3},
        "mbn": {},  # reads the batch size of all processes from the first batch
        "cbn": {"burn_in": 0.0, "gradient_sample": None},
        "fs": {"ratio": 0.25},
    }
    for method, options in settings.items():
        for micro in (1, 2):
            group = {} if method == "sync" else {"process_group": "world"}
            torch.manual_seed(0)
            network = Network().double()
            seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
            given = [{"generator": s} if method == "fs" else {} for s in seeds]
            ours = anybatch.convert(copy.deepcopy(network), method, **options, **group, **given[0])
            plain = "bn" if method == "sync" else method
            alone = anybatch.convert(copy.deepcopy(network), plain, **options, **given[1])
            for model in (ours, alone):
                if micro > 1:
                    anybatch.accumulate(model, micro)
            replica = nn.parallel.DistributedDataParallel(ours)
            optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (replica, alone)]
            for step in range(5):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                for part in range(micro):
                    generator = torch.Generator().manual_seed(10 * step + part)
                    x = torch.randn(4, 3, 8, 8, generator=generator).double() + part
                    y = torch.randint(4, (4,), generator=generator)
                    lone = F.cross_entropy(alone(x), y)
                    loss = F.cross_entropy(replica(cut(x, [2, 2], rank)), cut(y, [2, 2], rank))
                    lone.backward()
                    loss.backward()
                    total = loss.detach() / 2
                    dist.all_reduce(total)
                    assert math.isclose(float(total), float(lone), rel_tol=1e-8), (method, step)
                for optimizer in optimizers:
                    optimizer.step()
            for key, value in alone.state_dict().items():
                # A process's loss is the mean of its own half: its outputs' gradients are double.
                double = value.is_floating_point() and "backward_" in key and "count" not in key
                twice = 2 if double else 1
                close(ours.state_dict()[key], twice * value, (method, micro, key))
            plain_model = anybatch.to_batchnorm(ours.eval())
            close(plain_model(x), alone.eval()(x), method)


@pytest.mark.exhaustive
def test_replicas_are_one_process_with_the_whole_batch() -> None:
    spawn(_networks)


def _average(rank: int) -> None:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, momentum=None))
    model = model.double()
    mine = torch.randn(40 * (rank + 1), 3).double() + rank
    for layer in model:
        layer(mine)
    parts = [torch.empty(40 * (r + 1), 3).double() for r in range(2)]
    for r, part in enumerate(parts):
        if r == rank:
            part.copy_(mine)
        dist.broadcast(part, r)
    shares = [1 / 3, 2 / 3]
    mean = sum(w * p.mean(0) for w, p in zip(shares, parts, strict=True))
    var = sum(w * (p.var(0) + (p.mean(0) - mean) ** 2) for w, p in zip(shares, parts, strict=True))
    anybatch.average_running_stats(model, weight=len(mine))
    for layer in model:
        close(layer.running_mean, mean, "mean")
        close(layer.running_var, var, "var")
    with pytest.raises(ValueError, match="weight"):
        anybatch.average_running_stats(model, weight=-1)
    with pytest.raises(ValueError, match="0 on every process"):
        anybatch.average_running_stats(model, weight=0)


@pytest.mark.exhaustive
def test_running_statistics_are_averaged_on_demand() -> None:
    spawn(_average)


def _compiled(rank: int) -> None:
    for method in ("bn", "mabn", "mbn", "brn", "l1", "fs"):
        options = {"mabn": SHORT, "mbn": {"batch_size": 4}}.get(method, {})
        layer = layer_of(method, options, process_group="world")
        twin = copy.deepcopy(layer)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for step in range(3):
            x, dy, _ = whole_batch(step, 4, 4, 3)
            pieces = (cut(x, [2, 2], rank), cut(dy, [2, 2], rank))
            y, dx = one_step(compiled, *pieces)
            expected, grad = one_step(twin, *pieces)
            close(y, expected, method)
            close(dx, grad, method)
    # What is read from the first batch runs outside a graph: whole, it is refused.
    for whole in (True, False):
        torch._dynamo.reset()
        layer = layer_of("mbn", {}, process_group="world")
        compiled = torch.compile(layer, fullgraph=whole, backend="aot_eager")
        if whole:
            with pytest.raises(torch._dynamo.exc.TorchDynamoException):
                compiled(pieces[0])
        else:
            compiled(pieces[0])
            assert layer.batch_size == 4


@pytest.mark.exhaustive
def test_a_synchronized_layer_compiles_whole() -> None:
    spawn(_compiled)


# --- what it refuses, and one process ---------------------------------------------------


def _part(rank: int) -> None:
    alone = dist.new_group([1])
    x = torch.randn(4, 3).double()
    if rank == 0:
        with pytest.raises(ValueError, match="this process is not one of the group"):
            anybatch.BatchNorm1d(3, process_group=alone)
    else:
        layer = anybatch.BatchNorm1d(3, process_group=alone).double()
        close(layer(x), nn.BatchNorm1d(3).double()(x), "a group of one")
    group = dist.new_group([0, 1])
    layer = anybatch.BatchNorm1d(3, process_group=group).double()
    copied = copy.deepcopy(layer)
    assert copied.process_group is group
    close(copied(x), layer(x), "a copy")
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(layer)


@pytest.mark.exhaustive
def test_a_group_of_some_processes() -> None:
    spawn(_part)


def test_one_process_needs_no_group() -> None:
    x = torch.randn(4, 3).double()
    layer = pickle.loads(pickle.dumps(anybatch.BatchNorm1d(3, process_group="world").double()))
    assert layer.process_group == "world"
    close(layer(x), nn.BatchNorm1d(3).double()(x), "alone")
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    model[0](x)
    before = model[0].running_var.clone()
    anybatch.average_running_stats(model)
    assert torch.equal(before, model[0].running_var)


def test_synchronized_statistics_refuse_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="process_group='all': give"):
        anybatch.BatchNorm1d(3, process_group="all")
    with pytest.raises(ValueError, match="norm_batch_size=2: it cuts"):
        anybatch.BatchNorm1d(3, process_group="world", norm_batch_size=2)
    with pytest.raises(ValueError, match="ranks=1: give the process_group"):
        anybatch.SampledBatchNorm1d(3, ranks=1)
    with pytest.raises(ValueError, match="no batch norm"):
        anybatch.average_running_stats(nn.Linear(2, 2))
