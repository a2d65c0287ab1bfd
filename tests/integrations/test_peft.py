"""Adapters of PEFT: a converted network's norms are in them, for plain code and for anybatch."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.registry import METHODS
from zoo.listing import randomize

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EXACT = [m.name for m in METHODS.values() if m.exact_eval and not (m.wraps or m.binds)]


def network() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return randomize(transformers.ResNetForImageClassification(config))


def adapted(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            target_modules=["convolution"], modules_to_save=["normalization", "classifier"], r=2
        ),
    )


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(steps):
        loss = model.train()(pixel_values=X).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(pixel_values=X).logits


@pytest.mark.parametrize("method", EXACT)
def test_an_adapter_loads_onto_the_plain_network(tmp_path: Path, method: str) -> None:
    model = adapted(anybatch.convert(network(), method))
    train(model)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(network(), tmp_path)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mabn", "mbn", "brn"])
def test_an_adapter_trains_on_over_the_converted_network(tmp_path: Path, method: str) -> None:
    model = adapted(anybatch.convert(network(), method))
    train(model)
    model.save_pretrained(tmp_path)
    again = anybatch.convert(network(), method)
    again = peft.PeftModel.from_pretrained(again, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert train(again) == pytest.approx(train(model), rel=1e-5)


def test_a_norm_that_is_bound_to_a_convolution_says_that_it_was_copied_away() -> None:
    model = adapted(anybatch.convert(network(), "cbn"))
    with pytest.raises(RuntimeError, match="the layer it is bound to has not run"):
        train(model)
