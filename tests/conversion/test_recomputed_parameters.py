"""Norms whose weight or bias is recomputed: pruned, parametrized, weight norm, spectral norm."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import anybatch
from anybatch import NoEffectWarning
from conversion.networks import convnet
from zoo.listing import randomize


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def deprecated(function: Callable[..., nn.Module]) -> Callable[[nn.Module], object]:
    def apply(norm: nn.Module) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(norm)

    return apply


RECOMPUTED = [
    (lambda norm: prune.l1_unstructured(norm, "weight", 2), "its weight is pruned: .*prune.remove"),
    (lambda norm: prune.random_unstructured(norm, "bias", 2), "its bias is pruned"),
    (lambda norm: parametrize.register_parametrization(norm, "weight", Doubled()), "parametrized"),
    (deprecated(nn.utils.weight_norm), "a weight norm: call torch.nn.utils.remove_weight_norm"),
    (deprecated(nn.utils.spectral_norm), "a spectral norm: call .*remove_spectral_norm"),
]
each = pytest.mark.parametrize(("recompute", "reason"), RECOMPUTED)


@each
@pytest.mark.parametrize("method", ["bn", "mabn", "gn"])
@pytest.mark.parametrize("ours", [False, True])
def test_convert_refuses_the_norm_by_name_and_leaves_the_network_as_it_was(
    recompute: Callable[[nn.Module], object], reason: str, method: str, ours: bool
) -> None:
    model, x = randomize(convnet()).eval(), torch.randn(2, 3, 12, 12)
    if ours:
        anybatch.convert(model, "brn")
    recompute(model[4])
    before, norms = model(x), (model[1], model[4])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"(?s)as 1 norm cannot be:\n  4: .*{reason}"):
        anybatch.convert(model, method)
    assert (model[1], model[4]) == norms
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@each
def test_to_batchnorm_refuses_the_layer_by_name(
    recompute: Callable[[nn.Module], object], reason: str
) -> None:
    model, x = anybatch.convert(randomize(convnet()), "mabn").eval(), torch.randn(2, 3, 12, 12)
    recompute(model[4])
    before = model(x)
    with pytest.raises(ValueError, match=f"(?s)nothing was changed.*\n  4: .*{reason}"):
        anybatch.to_batchnorm(model)
    assert torch.equal(model(x), before)


@each
def test_fold_leaves_the_norm_and_says_why(
    recompute: Callable[[nn.Module], object], reason: str
) -> None:
    model, x = randomize(convnet()).eval(), torch.randn(2, 3, 12, 12)
    recompute(model[4])
    before = model(x)
    with pytest.warns(NoEffectWarning, match=f"  4: .*{reason}"):
        anybatch.fold(model, x)
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_pruning_made_permanent_is_converted() -> None:
    model, x = randomize(convnet()).eval(), torch.randn(2, 3, 12, 12)
    prune.l1_unstructured(model[4], "weight", 2)
    before = model(x)
    prune.remove(model[4], "weight")
    assert (anybatch.convert(model, "mabn")[4].weight == 0).sum() == 2
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [RECOMPUTED[0][0], RECOMPUTED[2][0]])
def test_a_centralized_layer_whose_weight_is_recomputed_is_refused(
    recompute: Callable[[nn.Module], object],
) -> None:
    model, x = anybatch.convert(convnet(), "mabn").eval(), torch.randn(2, 3, 12, 12)
    recompute(model[0])
    before = model(x)
    with pytest.raises(ValueError, match="(?s)nothing was changed.*\n  0: its weight is p"):
        anybatch.to_batchnorm(model)
    with pytest.warns(NoEffectWarning, match="  1: .*'0'"):
        anybatch.fold(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [RECOMPUTED[0][0], RECOMPUTED[2][0], RECOMPUTED[3][0]])
def test_param_groups_treat_what_a_scale_is_computed_from_as_a_scale(
    recompute: Callable[[nn.Module], object],
) -> None:
    model = convnet()
    recompute(model[1])
    groups = anybatch.param_groups(model, 0.1, norm_decay=0.5)
    (norms,) = [group for group in groups if group["weight_decay"] == 0.5]
    inside = list(model[1].parameters())
    assert {id(p) for p in inside} <= {id(p) for p in norms["params"]}
