"""Checkpoints between methods, through files of both kinds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anybatch
from anybatch.registry import METHODS

KEEPING = [name for name, method in METHODS.items() if method.exact_eval and not method.wraps]
OPTIONS = {
    "mbn": {"batch_size": 4},
    "mabn": {"warmup_steps": 1, "window": 2, "renorm_warmup_steps": 1},
    "cbn": {"window": 3, "burn_in": 0.0},
    **{name: {"ratio": 1 / 2} for name in ("ns", "bs", "fs", "points")},
}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3))


def trained(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = anybatch.convert(network(), method, **OPTIONS.get(method, {}))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    return model


def written(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Through a file, of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_file(state, path)
        return load_file(path)
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.few(2)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("method", [*KEEPING, "bgn"])
def test_training_goes_on_from_a_file_bit_for_bit(method: str, suffix: str, tmp_path: Path) -> None:
    model = trained(method)
    fresh = anybatch.convert(network(), method, **OPTIONS.get(method, {}))
    fresh.load_state_dict(written(model.state_dict(), tmp_path / f"weights{suffix}"))
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        outputs = [net.train()(x) for net in (model, fresh)]
        assert torch.equal(*outputs)
        for net, y in zip((model, fresh), outputs, strict=True):
            net.zero_grad()
            y.square().mean().backward()
        for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize("into", KEEPING)
def test_a_batch_norm_s_checkpoint_keeps_its_outputs(into: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network()
    for _ in range(3):
        model(2 * torch.randn(4, 3, 6, 6) + 1)
    other = network()
    other.load_state_dict(written(model.state_dict(), tmp_path / "bn.safetensors"))
    anybatch.convert(other, into, **OPTIONS.get(into, {}))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("first", KEEPING)
def test_from_any_method_to_any_other(first: str) -> None:
    model = trained(first).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x).detach()
    for second in KEEPING:
        other = anybatch.convert(network(), first, **OPTIONS.get(first, {}))
        other.load_state_dict(model.state_dict())
        anybatch.convert(other, second, **OPTIONS.get(second, {}))
        torch.testing.assert_close(other.eval()(x), expected, rtol=1e-4, atol=1e-5)
        plain = anybatch.to_batchnorm(other)
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        target = network()
        target.load_state_dict(plain.state_dict())
        torch.testing.assert_close(target.eval()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["mbn", "mabn", "cbn", "fs"])
def test_another_method_s_memory_is_refused_by_name(first: str) -> None:
    state = trained(first).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*1\."):
        anybatch.convert(network(), "bn").load_state_dict(state)
