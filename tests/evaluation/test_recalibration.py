"""Recalibrated statistics are those of all the data; a failure leaves no trace."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch
import reference
from anybatch.evaluation.population_moments import Pool
from anybatch.evaluation.recalibration import recalibrate
from conversion.networks import NETWORKS
from processes import spawn
from zoo.listing import randomize

QUICK = sorted(name for name, network in NETWORKS.items() if not network.slow)
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if NETWORKS[n].slow]


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if getattr(m, "running_var", None) is not None}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def small() -> nn.Sequential:
    return randomize(nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
    ))  # fmt: skip


def uneven(x: Tensor) -> list[Tensor]:
    sizes = [7, 1, 5, 2]
    return list(x.split([*sizes, len(x) - sum(sizes)]))


# --- the statistics ----------------------------------------------------------------


def test_pooled_variance_is_exact_for_uneven_batches_and_a_large_mean() -> None:
    x = torch.randn(40, 3, 5, dtype=torch.float64) + 1e6
    pool = Pool.empty(3)
    for part in (*uneven(x), x[:0]):
        pool.add(part)
    mean, var = reference.population(x)
    torch.testing.assert_close(pool.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(pool.var(), var, rtol=1e-9, atol=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_statistics_are_those_of_all_the_data_under_the_final_network(name: str) -> None:
    """In float64; in float32 a deep network's own rounding may come to 2e-5 of a variance."""
    network = NETWORKS[name]
    model = randomize(network.build()).double().eval()
    torch.manual_seed(1)
    parts = [doubled(network.inputs(size)) for size in (3, 1, 4)]
    if isinstance(parts[0], dict):
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    else:
        whole = torch.cat(parts)
    expected = reference.recalibrated(copy.deepcopy(model), whole, list(norms(model)))
    result = recalibrate(model, parts)
    assert {row.status for row in result.layers} == {"recalibrated"}
    assert result.examples == 8
    assert result.settled
    assert result.passes <= len(expected)
    for layer, module in norms(model).items():
        mean, var = expected[layer]
        assert ((module.running_mean - mean).abs() <= 1e-6 * var.sqrt()).all(), layer
        assert ((module.running_var - var).abs() <= 1e-6 * var).all(), layer


def doubled(inputs: object) -> object:
    if isinstance(inputs, dict):
        return {key: value.double() for key, value in inputs.items()}
    return inputs.double()


def test_the_outcome_does_not_depend_on_the_batches() -> None:
    one, other = small().double(), None
    other = copy.deepcopy(one)
    x = torch.randn(33, 3, 8, 8).double()
    recalibrate(one, uneven(x))
    recalibrate(other, x.split(2))
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-9, atol=1e-12)


def test_after_training_at_batch_2_statistics_are_the_training_sets() -> None:
    x, y = torch.randn(200, 6) * 3 + 1, torch.randint(3, (200,))
    model = anybatch.convert(NETWORKS["tabular"].build(), "bn")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for index in torch.randperm(200).split(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    result = recalibrate(model, DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True))
    expected = reference.recalibrated(
        copy.deepcopy(model).double().eval(), x.double(), list(norms(model))
    )
    for layer, module in norms(model).items():
        mean, var = expected[layer]
        assert ((module.running_mean - mean).abs() / var.sqrt()).max() < 1e-5
        assert ((module.running_var - var).abs() / var).max() < 1e-5
    assert result.passes <= 3
    assert model.training
    assert any(row.var_change > 1.01 for row in result.layers)


@pytest.mark.parametrize("method", ["bn", "mbn", "mabn", "brn", "ghost", "bgn"])
def test_every_layer_is_recalibrated_in_its_own_form(method: str) -> None:
    model = anybatch.convert(small().eval(), method)
    x = torch.randn(20, 3, 8, 8)

    def memory() -> dict[str, Tensor]:
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        return {k: v for k, v in state(model).items() if not k.endswith(statistics)}

    before = memory()
    recalibrate(model, uneven(x))
    mean, var = reference.population(model[0](x).detach())
    if method == "mabn":
        n = x.shape[0] * 36
        var, mean = var * (n - 1) / n + mean**2, torch.zeros(6)
    torch.testing.assert_close(model[1].running_mean, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, var.float(), rtol=1e-5, atol=1e-6)
    assert same(before, memory())


def test_together_normalizes_by_batches_as_in_training() -> None:
    model = small()
    x = torch.randn(24, 3, 8, 8)
    result = recalibrate(model, x.split(2), mode="together")
    first = model[0](x).detach()
    parts = [nn.functional.batch_norm(p, None, None, model[1].weight, model[1].bias, True)
             for p in first.split(2)]  # fmt: skip
    second = model[4](torch.cat(parts).relu()).detach()
    for layer, data in ((model[1], first), (model[5], second)):
        mean, var = reference.population(data)
        torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-4, atol=1e-5)
    assert result.passes == 1
    assert "together" in str(result)


def test_statistics_that_are_not_finite_are_mended() -> None:
    model = small()
    model[1].running_var[0] = math.nan
    model[5].running_mean.fill_(math.inf)
    recalibrate(model, torch.randn(10, 3, 8, 8).split(4))
    assert all(value.isfinite().all() for value in model.state_dict().values())


class Augmented:
    """A loader with noise of its own, drawn anew each time it is read."""

    def __iter__(self):
        torch.manual_seed(4)
        return iter([torch.randn(5, 3, 8, 8) for _ in range(3)])


class Draws(Augmented):
    def __iter__(self):
        return iter([torch.randn(5, 3, 8, 8) for _ in range(3)])


def test_augmentation_is_the_same_in_each_pass() -> None:
    torch.manual_seed(4)
    model = small()
    other = copy.deepcopy(model)
    torch.manual_seed(4)
    recalibrate(model, Draws())
    recalibrate(other, Augmented())
    assert same(state(model), state(other))


def test_a_layer_used_twice_pools_both_uses() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Linear(3, 3), norm)
    x = torch.randn(50, 3)
    result = recalibrate(model, [x])
    assert result.layers[0].values == 100
    model.eval()
    both = torch.cat([x, model[1](norm(x))]).detach()
    mean, var = reference.population(both)
    torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.running_var, var.float(), rtol=1e-3, atol=1e-3)


def test_a_group_norm_collects_averages_that_are_in_no_checkpoint() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    keys, x = list(model.state_dict()), torch.randn(9, 3, 6, 6)
    result = recalibrate(model, x.split(2))
    mean, var = reference.population(model[0](x).detach())
    torch.testing.assert_close(model[1].running_mean, mean.float())
    torch.testing.assert_close(model[1].running_var, var.float())
    assert list(model.state_dict()) == keys
    assert result.passes == 1
    assert recalibrate(model, x[:3].split(2)).layers[0].mean_change > 0


def test_types_of_the_statistics_stay() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = small().to(dtype)
        recalibrate(model, [torch.randn(8, 3, 8, 8, dtype=dtype)])
        assert model[1].running_var.dtype == dtype
        assert model[1].running_var.isfinite().all()


def test_a_custom_forward_and_max_batches() -> None:
    model, seen = small(), []

    def forward(net: nn.Module, batch: dict[str, Tensor]) -> None:
        seen.append(batch["id"])
        net(batch["image"])

    loader = [{"id": k, "image": torch.randn(2, 3, 8, 8)} for k in range(5)]
    result = recalibrate(model, loader, forward=forward, max_batches=3, mode="together")
    assert seen == [0, 1, 2]
    assert result.layers[0].values == 2 * 3 * 36


# --- what is left alone ----------------------------------------------------------------


def test_frozen_layers_and_others_are_left_alone_and_said_so() -> None:
    model = nn.Sequential(
        anybatch.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3),
    )  # fmt: skip
    model.never = nn.BatchNorm1d(3)
    anybatch.freeze(model)
    before = state(model)
    result = recalibrate(
        model, [torch.randn(8, 3) * 2],
        where=lambda name, _: name != "3", forward=lambda m, x: m[3](m[2](m[1](m[0](x)))),
    )  # fmt: skip
    assert [row.status for row in result.layers] == [
        "left alone: frozen",
        "recalibrated",
        "left alone: no running statistics",
        "left alone: not in where",
        "left alone: no batch reached it",
    ]
    changed = {key for key in before if not torch.equal(before[key], model.state_dict()[key])}
    assert changed == {"1.running_mean", "1.running_var"}
    assert "left alone: frozen" in str(result)
    assert result.to_dict()["layers"][1]["name"] == "1"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), {}, "no batch norm or group norm"),
        (anybatch.freeze(anybatch.BatchNorm1d(3)), {}, "no layer to recalibrate: .*frozen"),
        (nn.BatchNorm1d(3), {"where": "head.*"}, "where='head.*': there is no layer"),
        (nn.BatchNorm1d(3), {"mode": "fast"}, "mode='fast': give one of 'layerwise', 'together'"),
        (nn.BatchNorm1d(3), {"tolerance": -1.0}, "tolerance=-1.0"),
        (nn.BatchNorm1d(3), {"max_batches": 0}, "max_batches=0"),
        (nn.BatchNorm1d(3), {"forward": lambda m, b: None}, "no batch reached"),
        (nn.Sequential(nn.LazyBatchNorm1d()), {}, "does not know its channels"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_recalibrate_refuses_wrong_arguments(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recalibrate(model, [torch.randn(4, 3)], **options)


def test_recalibrate_refuses_wrong_data() -> None:
    with pytest.raises(ValueError, match="gave no batch"):
        recalibrate(nn.BatchNorm1d(3), [])
    with pytest.raises(ValueError, match="one value per channel"):
        recalibrate(nn.BatchNorm1d(3), [torch.randn(1, 3)])
    with pytest.raises(ValueError, match="can be read once, and mode=.layerwise."):
        recalibrate(small(), iter([torch.randn(4, 3, 8, 8)]))
    recalibrate(small(), iter([torch.randn(4, 3, 8, 8)]), mode="together")
    model, x = small(), torch.randn(4, 3, 8, 8)
    x[0, 0, 0, 0] = math.inf
    before = state(model)
    with pytest.raises(ValueError, match="input of 1 is not finite"):
        recalibrate(model, [x])
    assert same(before, state(model))


class DiskError(OSError):
    """Of Python, so that it can be watched."""


class Breaks:
    """A loader that fails in the middle of its n-th reading."""

    def __init__(self, reading: int) -> None:
        self.left = reading

    def __iter__(self):
        self.left -= 1
        yield torch.randn(4, 3, 8, 8)
        if not self.left:
            raise DiskError("disk")
        yield torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("mode", ["layerwise", "together"])
@pytest.mark.parametrize("method", ["torch", "mabn", "mbn", "gn"])
def test_a_failure_leaves_everything_as_it_was(mode: str, method: str) -> None:
    model = small() if method == "torch" else anybatch.convert(small(), method)
    model.train()
    model[3].eval()
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8))
    before, flags = state(model), [m.training for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    buffers = [name for name, _ in model.named_buffers()]
    random = torch.get_rng_state()
    with pytest.raises(OSError, match="disk"):
        recalibrate(model, Breaks(2 if mode == "layerwise" and method != "gn" else 1), mode=mode)
    assert same(before, state(model))
    assert [m.training for m in model.modules()] == flags
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert [name for name, _ in model.named_buffers()] == buffers
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    recalibrate(model, torch.randn(8, 3, 8, 8).split(4), mode=mode)
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.exhaustive
def test_an_error_is_gone_with_its_handler() -> None:
    """One that stays in a cycle keeps its frames, and a process group's threads, to the end."""
    gc.collect()
    gc.disable()
    try:
        watched = None
        try:
            recalibrate(small(), Breaks(1))
        except DiskError as error:
            watched = weakref.ref(error)
        assert watched is not None
        assert watched() is None
    finally:
        gc.enable()


# --- several processes ------------------------------------------------------------------


def _recalibrate_in_processes(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    model = small().double()
    x = torch.randn(21, 3, 8, 8).double()
    mine = x[:5].split(2) if rank == 0 else x[5:].split(3)
    result = recalibrate(model, mine)
    assert result.examples == 21
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    expected = "gave no batch" if rank == 0 else "another process failed"
    with pytest.raises((ValueError, RuntimeError), match=expected):
        recalibrate(model, [] if rank == 0 else mine)


@pytest.mark.exhaustive
@pytest.mark.dist
def test_recalibrate_pools_the_data_of_processes(tmp_path) -> None:
    spawn(_recalibrate_in_processes, str(tmp_path))
    torch.manual_seed(0)
    model = small().double()
    recalibrate(model, torch.randn(21, 3, 8, 8).double().split(4))
    for rank in range(2):
        pooled = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(pooled[key], value, rtol=1e-9, atol=1e-12)


def test_all_memories_of_a_layer_are_recalibrated() -> None:
    model = anybatch.convert(small(), "brn", norm_batch_size=2, memories=2, warmup_steps=0)
    for _ in range(3):
        model(torch.randn(4, 3, 9, 9)).sum().backward()
    recalibrate(model, [torch.randn(8, 3, 9, 9)], mode="layerwise")
    for layer in norms(model).values():
        (other,) = layer.further_memories
        assert torch.equal(other.running_mean, layer.running_mean)
        assert torch.equal(other.running_var, layer.running_var)


def test_a_virtual_dataset_is_recalibrated_layer_by_layer() -> None:
    model = anybatch.VirtualDataset(anybatch.convert(small(), "vdn"), 0.0, 1.0, 4)
    data = [torch.randn(8, 3, 9, 9)]
    with pytest.raises(ValueError, match="mode='together': a VirtualDataset"):
        recalibrate(model, data, mode="together")
    assert recalibrate(model, data).settled
