"""Several sets of statistics for a norm: each is the norm of a network of its own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.registry import METHODS
from zoo.listing import randomize

COPIED = [m.name for m in METHODS.values() if m.builder is None and not m.binds and not m.wraps]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    return nn.Sequential(*layers)


def domain(number: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * number + step)
    return torch.randn(4, 3, 8, 8, generator=generator) * (1 + number) + number


@pytest.mark.parametrize("method", COPIED)
def test_each_copy_is_the_norm_of_a_network_of_its_own(method: str) -> None:
    several = anybatch.convert(network(), method, copies=2)
    alone = [anybatch.convert(network(), method) for _ in range(2)]
    for step in range(5):
        for number in (0, 1):
            x = domain(number, step)
            with anybatch.use_copy(several, number):
                y = several(x)
            torch.testing.assert_close(y, alone[number](x), rtol=0, atol=0)
    for number in (0, 1):
        kept = anybatch.keep_copy(copy.deepcopy(several), number)
        assert [type(m) for m in kept.modules()] == [type(m) for m in alone[number].modules()]
        torch.testing.assert_close(kept.state_dict(), alone[number].state_dict(), rtol=0, atol=0)
        x = domain(number)
        if not METHODS[method].folds:
            continue
        plain = anybatch.to_batchnorm(kept).eval()
        torch.testing.assert_close(plain(x), alone[number].eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_scale_and_shift_are_shared_or_not(share: bool) -> None:
    model = network()
    parameters, optimizer = list(model.parameters()), torch.optim.SGD(model.parameters(), 0.1)
    anybatch.convert(model, "brn", copies=3, share_affine=share)
    layers = list(model[1].copies)
    assert len({id(layer.weight) for layer in layers}) == (1 if share else 3)
    assert layers[0].weight is parameters[2]
    assert len(list(model.parameters())) == len(parameters) + (0 if share else 8)
    weight = layers[1].weight.detach().clone()
    with anybatch.use_copy(model, 1):
        model(domain(1)).square().mean().backward()
    optimizer.step()
    assert torch.equal(layers[1].weight, weight) != share


def test_a_trained_network_keeps_its_output_in_every_copy() -> None:
    model, x = randomize(network()).eval(), domain(0)
    before = model(x)
    anybatch.convert(model, "mabn", copies=2)
    for number in (0, 1):
        with anybatch.use_copy(model, number):
            torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_copies_keep_hooks_mode_and_device_and_are_saved() -> None:
    model, seen = network().eval(), []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    anybatch.convert(model, "bn", copies=2)
    with anybatch.use_copy(model, 1):
        model(domain(0))
    assert seen == [1]
    assert not model[1].training
    again = anybatch.convert(network(), "bn", copies=2)
    again.load_state_dict(model.train().state_dict())
    anybatch.keep_copy(model, 0)(domain(0))
    assert seen == [1, 1]
    handle.remove()
    assert not model[1]._forward_hooks


def test_a_call_chooses_a_copy_and_a_context_nests() -> None:
    norm = anybatch.NormCopies(anybatch.BatchNorm1d(3), 3)
    with anybatch.use_copy(norm, 1):
        with anybatch.use_copy(norm, 2):
            norm(torch.randn(4, 3))
        norm(torch.randn(4, 3), copy=0)
        norm(torch.randn(4, 3), torch.ones(4, dtype=torch.bool))
    assert [layer.num_batches_tracked.item() for layer in norm.copies] == [1, 1, 1]
    assert norm.active == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: anybatch.convert(m, "gn", copies=2), "gn keeps no statistics"),
        (lambda m: anybatch.convert(m, "cbn", copies=2), "cbn follows one convolution"),
        (lambda m: anybatch.convert(m, "bn", copies=0), "copies=0"),
        (lambda m: anybatch.use_copy(m, 0).__enter__(), "has no copies of norms"),
        (lambda m: anybatch.keep_copy(m, 0), "has no copies of norms"),
    ],
)
def test_wrong_calls_say_what_would_do(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(network())


def test_copies_are_no_plain_network_and_are_not_copied_again() -> None:
    model = anybatch.convert(network(), "bn", copies=2)
    for function in (anybatch.to_batchnorm, anybatch.plain_state_dict):
        with pytest.raises(ValueError, match="keep_copy"):
            function(model)
    with pytest.raises(ValueError, match="copy=2: give a whole number from 0 to 1"):
        anybatch.use_copy(model, 2).__enter__()
    before = list(model.modules())
    anybatch.convert(model, "bn", copies=2)
    assert list(model.modules()) == before
    assert "2 sets of statistics" in anybatch.plan(network(), "bn", copies=2).notes[-1]


def test_norm_keys_are_what_a_client_keeps() -> None:
    model = anybatch.convert(network(), "mabn")
    keys = anybatch.norm_keys(model)
    assert {key.split(".")[0] for key in keys} == {"1", "4"}
    assert {"1.weight", "1.window", "4.running_var"} <= set(keys)
    assert set(keys) | {"0.weight", "0.bias", "3.weight", "3.bias"} == set(model.state_dict())
    assert not {"1.weight", "1.bias"} & set(anybatch.norm_keys(model, affine=False))
    assert anybatch.norm_keys(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == []
    clients = [anybatch.convert(network(), "mabn") for _ in range(2)]
    for number, client in enumerate(clients):
        client(domain(number))
    local = {key: clients[1].state_dict()[key].clone() for key in keys}
    clients[1].load_state_dict(clients[0].state_dict() | local)
    torch.testing.assert_close({k: clients[1].state_dict()[k] for k in keys}, local)
