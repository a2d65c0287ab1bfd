"""`to_batchnorm`: plain torch afterwards, with the same eval output, whole or not at all."""

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.weight_centralization import is_centralized
from anybatch.registry import METHODS
from conversion.networks import Tabular, Wave, convnet
from zoo.listing import randomize


def test_a_centralized_weight_that_another_layer_has_as_it_is_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    anybatch.weight_centralization(model[0])
    for back in (anybatch.to_batchnorm, anybatch.plain_state_dict):
        with pytest.raises(ValueError, match="0: its weight is centralized, and not in '1'"):
            back(model)
    anybatch.weight_centralization(model[1])
    before = eval_output(model, torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(
        eval_output(anybatch.to_batchnorm(model), torch.ones(1, 3, 8, 8)), before
    )


EXACT = [name for name, method in METHODS.items() if method.exact_eval]


def eval_output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def trained(method: str, build: Any = convnet, **options: Any) -> nn.Module:
    """A network of the method with statistics as after training."""
    torch.manual_seed(0)
    return anybatch.convert(randomize(build()), method, centralize=True, **options)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(
    ("build", "shape"), [(convnet, (3, 12, 12)), (Tabular, (6,)), (Wave, (2, 20))]
)
def test_the_eval_output_stays_and_nothing_of_anybatch(
    method: str, build: Any, shape: tuple[int, ...]
) -> None:
    model, x = trained(method, build), torch.randn(4, *shape)
    before = eval_output(model, x)
    anybatch.to_batchnorm(model)
    torch.testing.assert_close(eval_output(model, x), before, rtol=1e-5, atol=1e-5)
    assert not any(type(m).__module__.startswith("anybatch") for m in model.modules())
    plain = build()
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(eval_output(plain, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_the_saved_network_loads_where_there_is_no_anybatch(tmp_path: Path) -> None:
    model, x = anybatch.to_batchnorm(trained("mabn")).eval(), torch.randn(2, 3, 12, 12)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    program = (
        "import sys; sys.modules['anybatch'] = None\n"
        "import torch\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.allclose(model(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_state_dict_holds_tensors_alone() -> None:
    saved = io.BytesIO()
    torch.save(anybatch.to_batchnorm(trained("mabn")).state_dict(), saved)
    saved.seek(0)
    assert set(torch.load(saved, weights_only=True)) == set(convnet().state_dict())


def test_parameters_flags_hooks_and_sharing_are_kept() -> None:
    norm = nn.BatchNorm1d(4, momentum=0.3, eps=1e-3)
    model = anybatch.convert(nn.ModuleDict({"a": norm, "b": norm}), "ghost")
    weight, heard = model["a"].weight.requires_grad_(False), []
    handle = model["a"].register_forward_hook(lambda *_: heard.append(1))
    model["a"].eval()
    anybatch.to_batchnorm(model)
    assert model["a"] is model["b"]
    assert model["a"].weight is weight
    assert not weight.requires_grad
    assert not model["a"].training
    assert (model["a"].momentum, model["a"].eps) == (0.3, 1e-3)
    model["a"](torch.randn(2, 4))
    handle.remove()
    model["a"](torch.randn(2, 4))
    assert heard == [1]


def test_a_root_that_is_a_layer_gets_a_new_root() -> None:
    assert type(anybatch.to_batchnorm(anybatch.BatchRenorm3d(4))) is nn.BatchNorm3d


def test_frozen_layers_become_norms_in_eval_mode() -> None:
    model = anybatch.to_batchnorm(anybatch.freeze(trained("bn").train()))
    assert model.training
    assert not model[1].training


def test_layers_without_statistics_stay_so() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False, affine=False)
    model = anybatch.convert(nn.Sequential(norm), "bn")
    back = anybatch.to_batchnorm(model)[0]
    assert (back.running_mean, back.weight, back.track_running_stats) == (None, None, False)


@pytest.mark.parametrize("method", ["gn", "ln"])
def test_torchs_own_norms_pass_as_they_are(method: str) -> None:
    model = anybatch.convert(convnet(), method)
    norm = model[1]
    assert anybatch.to_batchnorm(model)[1] is norm


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [("bgn", {}, "example_weight=0.5"), ("brn", {"example_weight": 0.1}, "example_weight=0.1")],
)
def test_layers_that_are_no_batch_norm_are_refused_by_name_and_nothing_is_done(
    method: str, options: dict[str, Any], reason: str
) -> None:
    model = anybatch.convert(convnet(), {"4": method, "1": "mabn"}, **options)
    anybatch.weight_centralization(model[0])
    with pytest.raises(ValueError, match=rf"(?s)nothing was changed.*\n  4: {reason}"):
        anybatch.to_batchnorm(model)
    assert isinstance(model[1], NormLayer)
    assert is_centralized(model[0])


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(
    ("build", "shape"), [(convnet, (3, 12, 12)), (Tabular, (6,)), (Wave, (2, 20))]
)
def test_a_plain_state_dict_loads_strictly_and_leaves_the_model(
    method: str, build: Any, shape: tuple[int, ...]
) -> None:
    model, x = trained(method, build), torch.randn(4, *shape)
    anybatch.freeze(model, where=lambda name, norm: norm.num_features > 6)
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    state, plain = anybatch.plain_state_dict(model), build()
    plain.load_state_dict(state)
    torch.testing.assert_close(eval_output(plain, x), eval_output(model, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert kinds == [type(m) for m in model.modules()]


def test_no_plain_state_dict_of_layers_that_have_no_plain_equal() -> None:
    with pytest.raises(ValueError, match="example_weight=0.5"):
        anybatch.plain_state_dict(trained("bgn"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["bn", "mabn", "cbn", "brn", "mbn", "ghost"])
def test_a_network_of_16_bits_is_restored_to_one_that_runs(method: str, dtype: torch.dtype) -> None:
    """Its layers are of torch, whose norms have one type."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).to(dtype)
    x = torch.randn(2, 3, 9, 9).to(dtype)
    net = anybatch.convert(net, method)
    for _ in range(3):
        net(x)
    expected = net.eval()(x)
    plain = anybatch.to_batchnorm(net)
    torch.testing.assert_close(plain(x), expected, rtol=0.02, atol=0.02)
    plain.train()(x)  # as any network of torch
    assert {t.dtype for t in plain.state_dict().values() if t.is_floating_point()} == {dtype}


def test_statistics_beyond_the_reach_of_float16_are_restored_in_float32() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).half()
    net = anybatch.convert(net, "bn").eval()
    net[1].running_var.fill_(1e5)
    x = torch.randn(2, 3, 9, 9).half() * 100
    expected = net(x)
    torch.testing.assert_close(anybatch.to_batchnorm(net)(x), expected, rtol=0.01, atol=0.01)
