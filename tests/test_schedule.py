"""`NormScheduler`: one step an epoch, method switches, resuming."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import anybatch
from anybatch import NormScheduler
from processes import spawn


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    return anybatch.convert(body, "mbn", batch_size=2)


def test_epoch_1_begins_at_once_and_each_step_begins_the_next() -> None:
    model = network()
    scheduler = NormScheduler(model, total_epochs=4)
    seen = []
    for _ in range(4):
        seen.append((scheduler.epoch, model[1].average_weight))
        scheduler.step()
    rho = 2 / 32  # momentum-bn, equation 11, with rho ** T the share of the ideal batch size
    wanted = [(t, rho ** ((4 - t) / 3) - rho) for t in (1, 2, 3, 4)]
    assert [epoch for epoch, _ in seen] == [epoch for epoch, _ in wanted]
    assert [w for _, w in seen] == pytest.approx([w for _, w in wanted], abs=1e-6)


def test_steps_beyond_the_last_epoch_change_nothing() -> None:
    scheduler = NormScheduler(network(), total_epochs=2)
    for _ in range(5):
        scheduler.step()
    assert scheduler.epoch == 2
    assert scheduler.state_dict()["last_epoch"] == 2


def test_last_epoch_counts_the_epochs_that_are_done() -> None:
    model = network()
    assert NormScheduler(model, 10, switch={3: "bn"}, last_epoch=4).epoch == 5
    assert type(model[1]) is anybatch.BatchNorm1d


def test_a_method_is_switched_at_its_epoch_and_the_optimizer_goes_on() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = list(model.parameters())
    scheduler = NormScheduler(model, 3, switch={2: "mabn", 3: "bn"})
    kinds = []
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        kinds.append(type(model[1]).__name__)
        scheduler.step()
    assert kinds == ["MomentumBatchNorm1d", "MovingAverageBatchNorm1d", "BatchNorm1d"]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert type(model[0]) is nn.Linear  # a switch never centralizes


def test_a_resumed_run_has_the_layers_and_the_output_of_the_first() -> None:
    model = network()
    scheduler = NormScheduler(model, 4, switch={2: "brn"})
    for _ in range(3):
        model(torch.randn(4, 3))
        scheduler.step()
    saved = json.loads(json.dumps(scheduler.state_dict()))
    state = copy.deepcopy(model.state_dict())

    again = network()
    resumed = NormScheduler(again, 4, switch={2: "brn"})
    resumed.load_state_dict(saved)  # before the model's
    again.load_state_dict(state)
    assert resumed.epoch == scheduler.epoch == 4
    assert type(again[1]) is anybatch.BatchRenorm1d
    x = torch.randn(4, 3)
    assert torch.equal(again(x), model(x))


def test_a_switch_cannot_be_undone_by_loading() -> None:
    scheduler = NormScheduler(network(), 4, switch={2: "bn"})
    early = scheduler.state_dict()
    scheduler.step()
    with pytest.raises(ValueError, match="switched to 'bn' at epoch 2, which cannot be undone"):
        scheduler.load_state_dict(early)
    assert scheduler.epoch == 2


def test_a_state_that_lacks_something_is_named() -> None:
    with pytest.raises(ValueError, match="state lacks switch, total_epochs"):
        NormScheduler(network(), 4).load_state_dict({"last_epoch": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_epochs": 0}, "total_epochs=0: give a whole number from 1"),
        ({"total_epochs": 2, "last_epoch": -1}, "last_epoch=-1: give a whole number from 0"),
        ({"total_epochs": 2, "switch": {3: "bn"}}, "switch at epoch 3 never happens"),
        ({"total_epochs": 2, "switch": {0: "bn"}}, "give a whole number from 1"),
        ({"total_epochs": 2, "switch": {1: "mabm"}}, "did you mean 'mabn'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormScheduler(network(), **arguments)


@pytest.mark.parametrize("total", [2.0, True, "2"])
def test_epochs_are_whole_numbers(total: Any) -> None:
    with pytest.raises(TypeError, match="total_epochs=.*give a whole number from 1"):
        NormScheduler(network(), total)


def test_a_model_that_is_itself_a_norm_cannot_be_switched() -> None:
    with pytest.raises(ValueError, match=r"put it into a torch.nn.Sequential"):
        NormScheduler(anybatch.BatchNorm1d(3), 4, switch={2: "brn"})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"last_epoch": 7}, ValueError, "last_epoch=7: training has total_epochs=3"),
        ({"switch": {2: "vdn"}}, ValueError, "'vdn' wraps the network"),
        ({"switch": [2]}, TypeError, "give epochs and methods"),
    ],
)
def test_schedules_that_cannot_be_kept_are_refused_at_once(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    net = nn.Sequential(anybatch.BatchNorm1d(3))
    with pytest.raises(error, match=words):
        NormScheduler(net, 3, **arguments)


def test_a_state_is_a_mapping() -> None:
    scheduler = NormScheduler(nn.Sequential(anybatch.BatchNorm1d(3)), 3)
    with pytest.raises(TypeError, match="state=5: give a state_dict"):
        scheduler.load_state_dict(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last_epoch=4"):
        scheduler.load_state_dict({"last_epoch": 4, "total_epochs": 3, "switch": {}})


def test_a_switch_that_convert_would_refuse_is_refused_when_the_scheduler_is_made() -> None:
    net = nn.Sequential(nn.Linear(3, 4), anybatch.MomentumBatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="(?s)switch to 'in' at epoch 2: .*after a linear layer"):
        NormScheduler(net, 3, switch={2: "in"})
    unbound = nn.Sequential(nn.ReLU(), anybatch.MomentumBatchNorm1d(4))
    with pytest.raises(ValueError, match="(?s)switch to 'cbn' at epoch 3: .*none can be bound"):
        NormScheduler(unbound, 3, switch={3: "cbn"})
    assert isinstance(net[1], anybatch.MomentumBatchNorm1d)
    virtual = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    wrapped = anybatch.VirtualDataset(anybatch.convert(virtual, "vdn"), mean=0.5, std=0.2)
    with pytest.raises(ValueError, match="a VirtualDataset trains no other method"):
        NormScheduler(wrapped, 3, switch={2: "bn"})


def test_a_wrapped_network_is_refused_before_the_epoch_that_switches() -> None:
    net = nn.Sequential(anybatch.BatchNorm1d(3))
    wrapped = nn.DataParallel(net)
    NormScheduler(wrapped, 3)
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        NormScheduler(wrapped, 3, switch={2: "bn"})


def _switch_on_replicas(rank: int, averaged: bool) -> None:
    torch.manual_seed(0)
    net = anybatch.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "bn")
    scheduler = NormScheduler(net, 2, switch={2: "mabn"})
    for _ in range(5):
        net(torch.randn(2, 3, 6, 6) + rank)
    if averaged:
        anybatch.average_running_stats(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step()
    assert any("you have just called anybatch.average" in str(one.message) for one in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a resumed run loads its replicas' statistics
        fresh = anybatch.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "bn")
        resumed = NormScheduler(fresh, 2, switch={2: "mabn"})
        resumed.load_state_dict(scheduler.state_dict())
    shift = net[1].bias.detach()
    shifts = [torch.empty_like(shift) for _ in range(2)]
    dist.all_gather(shifts, shift)
    assert torch.equal(*shifts) == averaged


@pytest.mark.parametrize("averaged", [True, False])
def test_replicas_that_switch_are_told_of_their_own_running_means(averaged: bool) -> None:
    spawn(_switch_on_replicas, averaged)
