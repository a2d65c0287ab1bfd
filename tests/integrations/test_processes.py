"""Several processes: DistributedDataParallel and FSDP2 train what a single process trains."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch
from anybatch.core.norm_layer import NormLayer
from processes import spawn

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]

METHODS = {
    "bn": {},
    "mbn": {"batch_size": 2},
    "mabn": {"warmup_steps": 2, "renorm_warmup_steps": 3, "window": 3},
    "cbn": {"window": 3, "burn_in": 0.0},
    "brn": {"warmup_steps": 1},
    "ghost": {"ghost_size": 2},
    "bgn": {"num_groups": 4},
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    return anybatch.convert(Network().double(), method, **METHODS[method])


def data(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    x = torch.randn(2, 3, 8, 8, generator=generator).double() + rank
    return x, torch.randint(4, (2,), generator=generator)


def memory(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, NormLayer)]
    return [t.clone() for layer in layers for t in layer.method_state.values()]


def _train_all(rank: int) -> None:
    """DDP and FSDP2 beside loops that average the gradients of both processes by hand.

    DDP also broadcasts rank 0's buffers before each forward: running statistics, by which mabn and
    brn renormalize.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for method in METHODS:
        by_hand, with_broadcast, replicated, sharded = (network(method) for _ in range(4))
        wrapped = nn.parallel.DistributedDataParallel(replicated)
        for block in (sharded.stem, sharded.body, sharded.head, sharded):
            fully_shard(block, mesh=mesh)
        models = [by_hand, with_broadcast, wrapped, sharded]
        optimizers = [torch.optim.SGD(model.parameters(), 0.05) for model in models]
        for step in range(6):
            x, y = data(rank, step)
            losses = []
            for model, optimizer in zip(models, optimizers, strict=True):
                if model is with_broadcast:
                    for buffer in model.buffers():
                        dist.broadcast(buffer, 0)
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                if model in (by_hand, with_broadcast):
                    for parameter in model.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= 2
                optimizer.step()
                losses.append(loss.item())
            assert losses[2] == pytest.approx(losses[1], rel=1e-9), (method, step)
            assert losses[3] == pytest.approx(losses[0], rel=1e-9), (method, step)
        for one, other in ((by_hand, sharded), (with_broadcast, replicated)):
            for mine, theirs in zip(memory(one), memory(other), strict=True):
                torch.testing.assert_close(mine, theirs)


@pytest.mark.exhaustive
def test_replicas_and_shards_train_as_a_loop_by_hand() -> None:
    spawn(_train_all)


def _memory_is_its_own(rank: int) -> None:
    """What a process remembers is not overwritten by rank 0's, and is in its checkpoint."""
    for method in ("mbn", "mabn", "cbn"):
        model = nn.parallel.DistributedDataParallel(network(method))
        alone = network(method)
        for step in range(4):
            x, y = data(rank, step)
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                alone.train()(x)
        layer = model.module.stem[1]
        name = {"mbn": "mean", "mabn": "window", "cbn": "var"}[method]
        mine = layer.method_state[name].clone()
        torch.testing.assert_close(mine, alone.stem[1].method_state[name])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert not torch.allclose(*both)
        fresh = network(method)
        fresh.load_state_dict(copy.deepcopy(model.module.state_dict()))
        assert torch.equal(fresh.stem[1].method_state[name], mine)


@pytest.mark.exhaustive
def test_memory_survives_the_broadcast_of_buffers() -> None:
    spawn(_memory_is_its_own)


def _sharded_apart(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network("cbn")
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.stem, *model.body):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match="shard the block that holds both"):
        model(data(rank, 0)[0])


@pytest.mark.exhaustive
def test_a_weight_that_was_given_back_is_named() -> None:
    spawn(_sharded_apart)


def _mixed_precision(rank: int) -> None:
    """FSDP2 gathers bfloat16 weights: statistics and state are float32, and training is close."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for method in METHODS:
        torch.manual_seed(0)
        sharded = anybatch.convert(Network(), method, **METHODS[method])
        exact = copy.deepcopy(sharded)
        for block in (sharded.stem, sharded.body, sharded.head, sharded):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        optimizers = [torch.optim.SGD(model.parameters(), 0.05) for model in (sharded, exact)]
        for step in range(6):
            x, y = data(rank, step)
            losses = []
            for model, optimizer in zip((sharded, exact), optimizers, strict=True):
                loss = F.cross_entropy(model(x.float()).float(), y)
                optimizer.zero_grad()
                loss.backward()
                if model is exact:
                    for parameter in model.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= 2
                optimizer.step()
                losses.append(loss.item())
            # How far rounding leads apart within six steps depends on the processor's convolutions.
            assert losses[0] == pytest.approx(losses[1], rel=0.15, abs=0.05), (method, losses)
        ours = [m for m in sharded.modules() if isinstance(m, NormLayer)]
        theirs = [m for m in exact.modules() if isinstance(m, NormLayer)]
        for mine, other in zip(ours, theirs, strict=True):
            floats = [
                t for t in (*mine.buffers(), *mine.method_state.values()) if t.is_floating_point()
            ]
            assert {t.dtype for t in floats} == {torch.float32}
            assert all(p.dtype == torch.float32 for p in mine.parameters())
            close = {"rtol": 0.1, "atol": 0.05}
            torch.testing.assert_close(mine.running_var, other.running_var, **close)


@pytest.mark.exhaustive
def test_shards_in_bfloat16_keep_their_statistics_in_float32() -> None:
    spawn(_mixed_precision)


def _whole_of_shards(rank: int) -> None:
    """A whole state dict of shards is the network's, and a sharded target follows."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    whole = StateDictOptions(full_state_dict=True)

    def sharded(method: str) -> nn.Module:
        model = network(method)
        apart = [] if method == "cbn" else [*model.stem, *model.body]
        for block in (*apart, model.stem, model.body, model.head, model):
            fully_shard(block, mesh=mesh)
        return model

    for method in METHODS:
        model, target = sharded(method), sharded(method)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(2):
            x, y = data(rank, step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        fresh = network(method)
        fresh.load_state_dict(get_model_state_dict(model, options=whole))
        x = data(rank, 9)[0]
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x))
        before, now = (
            copy.deepcopy(get_model_state_dict(m, options=whole)) for m in (target, model)
        )
        anybatch.update_target(target, model, 0.25)
        for name, value in get_model_state_dict(target, options=whole).items():
            if name.endswith(("weight", "bias", "running_mean", "running_var")):
                torch.testing.assert_close(value, torch.lerp(before[name], now[name], 0.25))


@pytest.mark.exhaustive
def test_the_whole_state_of_shards_is_the_networks_and_targets_follow() -> None:
    spawn(_whole_of_shards)
