"""Gradients that do not depend on the scale of the loss."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch

STATES = {
    "mabn": {"warmup_steps": 2, "renorm_warmup_steps": 2},
    "mabn, ema": {"warmup_steps": 2, "renorm_warmup_steps": 2, "backward_stats": "ema"},
    "mabn, memories": {
        "warmup_steps": 2,
        "renorm_warmup_steps": 2,
        "norm_batch_size": 2,
        "memories": 2,
    },
    "cbn": {"window": 3, "burn_in": 0.0, "backward_stats": "window"},
    "bn": {},
    "gn": {},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        *(nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3)),
    )
    return anybatch.convert(net, name.partition(",")[0], **STATES[name])


class Scaler(torch.amp.GradScaler):
    """One that changes its scale when it is told to."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__("cpu", init_scale=scales[0])
        self.scales = iter(scales[1:])

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(next(self.scales))


def gradients(name: str, scales: list[float], accumulates: bool = False) -> list[Tensor]:
    """The unscaled gradients of the first weights, at each scale."""
    net = network(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    if accumulates:
        anybatch.accumulate(net, optimizer=optimizer)
    found, scaler = [], Scaler([*scales, 1.0])
    for step in range(len(scales)):
        torch.manual_seed(step)
        for _ in range(2 if accumulates else 1):
            x, y = torch.randn(4, 3, 8, 8), torch.randint(3, (4,))
            scaler.scale(F.cross_entropy(net(x), y)).backward()
        scaler.unscale_(optimizer)
        found.append(next(net.parameters()).grad.clone())
        scaler.step(optimizer)
        anybatch.update_scaler(scaler, net)
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_do_not_change_with_the_scale(name: str, accumulates: bool) -> None:
    if accumulates and "memories" in name:
        pytest.skip("norm_batch_size does not accumulate")
    scales = [1.0, 1.0, 1.0, 1.0, 64.0, 128.0, 2.0, 2.0, 1.0]
    wanted = gradients(name, [1.0] * len(scales), accumulates)
    for ours, theirs in zip(gradients(name, scales, accumulates), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_step_that_the_scaler_skips_ends() -> None:
    net = network("mabn")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    anybatch.accumulate(net, optimizer=optimizer)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), copy.deepcopy(net[6].weight)
    for _ in range(2):
        scaler.scale(net(torch.randn(2, 3, 8, 8)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    anybatch.update_scaler(scaler, net)
    assert torch.equal(net[6].weight, before)
    assert scaler.get_scale() == 2
    assert int(net[1].step.tensors["micro_batches"]) == 0


def test_a_scaler_that_is_off_changes_nothing() -> None:
    net = network("mabn")
    anybatch.update_scaler(torch.amp.GradScaler("cpu", enabled=False), net)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"scaler=.*: give a torch.amp.GradScaler"):
        anybatch.update_scaler(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(TypeError, match="model"):
        anybatch.update_scaler(torch.amp.GradScaler("cpu"), 3)


def train(net: nn.Module, steps: range, scaler: torch.amp.GradScaler | None = None) -> list[Tensor]:
    """The unscaled gradients of the first weights in each step."""
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.01), []
    for step in steps:
        torch.manual_seed(step)
        loss = F.cross_entropy(net(torch.randn(4, 3, 8, 8)), torch.randint(3, (4,)))
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            found.append(next(net.parameters()).grad.clone())
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append(next(net.parameters()).grad.clone())
        scaler.step(optimizer)
        anybatch.update_scaler(scaler, net)
    return found


@pytest.mark.parametrize("name", ["mabn", "mabn, ema", "cbn"])
@pytest.mark.parametrize("then", [None, 256.0])
@pytest.mark.parametrize("first", [None, 65536.0])
def test_training_goes_on_at_another_scale(
    name: str, first: float | None, then: float | None
) -> None:
    """From a checkpoint, and in the same network."""
    wanted, (start, end) = train(network(name), range(10)), (range(6), range(6, 10))
    net, after = network(name), network(name)
    train(net, start, first and torch.amp.GradScaler("cpu", init_scale=first))
    after.load_state_dict(net.state_dict())
    for one in (net, after):
        scaler = then and torch.amp.GradScaler("cpu", init_scale=then)
        if one is net or then is not None:  # a checkpoint is of a loss without a scale
            anybatch.set_loss_scale(one, then or 1.0)
        for ours, theirs in zip(train(one, end, scaler), wanted[6:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_checkpoint_is_read_at_the_scale_of_its_network(accumulates: bool) -> None:
    net, other = network("mabn"), network("mabn")
    for one in (net, other):
        if accumulates:
            anybatch.accumulate(one, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    train(net, range(3), None if accumulates else scaler)
    if accumulates:  # in the middle of a step
        anybatch.set_loss_scale(net, 64.0)
        (net(torch.randn(4, 3, 8, 8)).square().mean() * 64).backward()
    anybatch.set_loss_scale(other, 16.0)
    other.load_state_dict(net.state_dict())
    for layer, read in ((net[1], other[1]), (net[4], other[4])):
        torch.testing.assert_close(
            read.method_state["backward_average"] * 4, layer.method_state["backward_average"]
        )
        if accumulates:
            steps, theirs = layer.step.tensors, read.step.tensors
            for key in ("backward_var", "start_backward_average"):
                torch.testing.assert_close(theirs[key] * 4, steps[key])
            torch.testing.assert_close(theirs["backward_count"], steps["backward_count"])
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[key])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), None, True, "64"])
def test_a_wrong_scale_is_named(scale: object) -> None:
    with pytest.raises(ValueError, match=r"scale=.*get_scale"):
        anybatch.set_loss_scale(network("mabn"), scale)
