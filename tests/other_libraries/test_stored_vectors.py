"""Layers compute what other libraries' layers do, where these do what they say."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anybatch
from other_libraries.cases import CASES, VECTORS, load, precise_network

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def vectors(name: str) -> dict[str, Tensor]:
    found: dict[str, dict[str, Tensor]] = torch.load(VECTORS, weights_only=True)
    return found[name]


def compare_steps(layer: nn.Module, expected: dict[str, Tensor], outputs: bool = True) -> None:
    """Take the same steps; compare outputs and gradients, then running statistics."""
    steps = sorted(int(key.split()[0]) for key in expected if key.endswith(" x"))
    for step in steps:
        x = expected[f"{step} x"].requires_grad_()
        y = layer(x)
        if outputs:
            torch.testing.assert_close(y, expected[f"{step} y"], **CLOSE)
            y.backward(expected[f"{step} dy"])
            torch.testing.assert_close(x.grad, expected[f"{step} dx"], **CLOSE)
    for key, value in expected.items():
        if key.startswith("running"):
            torch.testing.assert_close(getattr(layer, key), value, **CLOSE)
    if "evaluated" in expected:
        y = layer.eval()(expected["0 x"])
        torch.testing.assert_close(y, expected["evaluated"], **CLOSE)


def test_batch_renorm_is_that_of_torchrl_before_twice_the_warm_up() -> None:
    layer = anybatch.BatchRenorm1d(
        4, momentum=0.1, warmup_steps=4, max_r=1.2, max_d=0.3, dtype=torch.float64
    )
    compare_steps(layer, vectors("torchrl"))


def test_batch_renorm_tracks_and_evaluates_as_that_of_sb3_contrib() -> None:
    layer = anybatch.BatchRenorm1d(4, eps=1e-3, momentum=0.1, warmup_steps=2, dtype=torch.float64)
    compare_steps(layer, vectors("sb3_contrib"), outputs=False)


def test_batch_norm_is_that_of_torch_geometric_with_a_single_row_too() -> None:
    compare_steps(anybatch.BatchNorm1d(4, dtype=torch.float64), vectors("torch_geometric"))


def test_ghost_batch_norm_normalizes_as_that_of_composer() -> None:
    layer = anybatch.GhostBatchNorm2d(4, ghost_size=3, dtype=torch.float64)
    compare_steps(layer, vectors("composer"))


@pytest.mark.parametrize("method", [None, "bn"])
def test_recalibration_gives_the_statistics_of_fvcore(method: str | None) -> None:
    expected, network = vectors("fvcore"), precise_network()
    if method is not None:
        anybatch.convert(network, method)
    data = [value for key, value in expected.items() if key.endswith(" x")]
    anybatch.recalibrate(network, data, mode="together")
    values = {"0": 4 * 5 * 36, "2": 4 * 5 * 16}
    for key, value in expected.items():
        if "running" not in key:
            continue
        found = network.state_dict()[key]
        if "var" in key:
            count = values[key.split(".")[0]]
            found = found * ((count - 1) / count)  # Bessel's correction, which fvcore leaves out
        torch.testing.assert_close(found, value, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_an_installed_library_gives_the_stored_vectors(name: str) -> None:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    found, expected = CASES[name](load(Path(spec.origin).parents[1], name)), vectors(name)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], **CLOSE)
