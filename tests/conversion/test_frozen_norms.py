"""Frozen norms of other libraries become any method, and any method becomes frozen."""

import copy
import pkgutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.conversion import convert, fold, plan, to_batchnorm
from anybatch.registry import METHODS, get_method
from zoo.listing import randomize


class FrozenOfTorchvision(nn.Module):
    """As torchvision's FrozenBatchNorm2d: eps is an attribute."""

    def __init__(self, num_features: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((num_features,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class FrozenOfDetectron(FrozenOfTorchvision):
    """As detectron2's: a count of batches, and F.batch_norm where nothing needs a gradient."""

    def __init__(self, num_features: int, eps: float = 2e-4) -> None:
        super().__init__(num_features, eps)
        self.num_features = num_features
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return super().forward(x)
        kept = (self.running_mean, self.running_var, self.weight, self.bias)
        return nn.functional.batch_norm(x, *kept, training=False, eps=self.eps)


class WithoutEps(FrozenOfTorchvision):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, 0.0)


class Clipped(FrozenOfTorchvision):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


# Of transformers by model: importing one takes seconds.
DETR = "detr.modeling_detr.DetrFrozenBatchNorm2d"
KINDS = [
    DETR,
    "d_fine.modeling_d_fine.DFineFrozenBatchNorm2d",
    "rt_detr.modeling_rt_detr.RTDetrFrozenBatchNorm2d",
    "rt_detr_v2.modeling_rt_detr_v2.RTDetrV2FrozenBatchNorm2d",
    FrozenOfTorchvision,
    FrozenOfDetectron,
    WithoutEps,
    anybatch.FrozenBatchNorm2d,
]
EXACT = [name for name, method in METHODS.items() if method.exact_eval]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(kind: Any = DETR) -> nn.Module:
    if isinstance(kind, str):
        kind = pkgutil.resolve_name(f"transformers.models.{kind}")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    return randomize(nn.Sequential(*layers))


def inference(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(X)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", EXACT)
def test_a_frozen_norm_becomes_any_method_with_the_same_inference(kind: Any, method: str) -> None:
    model = network(kind)
    before = inference(model)
    convert(model, method)
    assert type(model[1]) is get_method(method).layer(2)
    torch.testing.assert_close(inference(model), before, rtol=1e-5, atol=1e-5)
    assert [p.requires_grad for p in model[1].parameters()] == [True, True]
    if not METHODS[method].wraps:
        model.train()(X).square().mean().backward()
        assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["gn", "ln", "in", "bgn"])
def test_a_frozen_norm_becomes_a_norm_of_groups(method: str) -> None:
    model = convert(network(), method)
    assert type(model[1]) is get_method(method).layer(2)
    assert model[1].weight.requires_grad


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.017])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_eps_is_that_of_the_forward(eps: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(randomize(FrozenOfTorchvision(4, eps)).to(dtype))
    rtol = 1e-2 if dtype is torch.bfloat16 else 1e-6
    assert convert(model, "bn")[0].eps == pytest.approx(eps, rel=rtol)


def test_the_conversion_of_a_frozen_norm_keeps_its_hooks_mode_and_device() -> None:
    model, seen = network().eval(), []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    convert(model, "mabn")
    model(X)
    assert seen == [1]
    assert not model[1].training
    handle.remove()
    with torch.device("meta"):
        model = nn.Sequential(FrozenOfTorchvision(4))
    assert convert(model, "bn")[0].weight.is_meta
    assert model[0].eps == 1e-3


@pytest.mark.filterwarnings("ignore::anybatch.NoEffectWarning")
def test_a_norm_that_computes_something_else_stays_frozen() -> None:
    model = nn.Sequential(randomize(Clipped(4)))
    kind = plan(model, "bn").rows[0]
    assert kind.decision == "keep"
    assert "something else" in kind.reason
    assert type(convert(model, "bn")[0]) is Clipped
    assert type(convert(network(), "bn", where="4")[1]).__name__ == "DetrFrozenBatchNorm2d"


def test_a_conversion_that_fails_leaves_frozen_norms_as_they_were() -> None:
    model = network().append(nn.SyncBatchNorm(6))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        convert(model, "mabn")
    assert type(model[1]).__name__ == "DetrFrozenBatchNorm2d"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_frozen_norms_count_where_it_is_asked_whether_a_network_is_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenOfTorchvision(4))
    assert "fresh" in plan(model, "mabn").notes[0]
    model[1].running_var.fill_(2.0)
    assert "trained" in plan(model, "mabn").notes[0]


# "frozen" as a target


@pytest.mark.parametrize("method", EXACT)
def test_any_method_becomes_frozen_with_the_same_inference(method: str) -> None:
    model = convert(network(), method, centralize=False)
    before, parameters = inference(model), list(model.parameters())
    convert(model, "frozen")
    assert [type(model[i]) for i in (1, 4)] == [anybatch.FrozenBatchNorm2d] * 2
    torch.testing.assert_close(inference(model), before, rtol=1e-5, atol=1e-5)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model.train()(X).square().mean().backward()
    optimizer.step()
    for i in (1, 4):
        now, then = model[i].state_dict(), {k: state[f"{i}.{k}"] for k in model[i].state_dict()}
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert model[0].weight.grad is not None


def test_frozen_and_back_leaves_an_optimizer_valid() -> None:
    model = convert(network(nn.BatchNorm2d), "bn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(convert(model, "frozen"), "bn")
    before = model[1].weight.detach().clone()
    model.train()(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    assert model[1].num_batches_tracked.item() == 1


def test_frozen_norms_that_are_frozen_already_stay() -> None:
    model = network(FrozenOfTorchvision)
    convert(model, "frozen")
    assert type(model[1]) is FrozenOfTorchvision
    assert type(model[4]) is anybatch.FrozenBatchNorm2d


def test_freezing_norms_that_counted_no_batch_warns_of_them_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[2](torch.randn(2, 4, 3, 3))
    with pytest.warns(anybatch.NoEffectWarning, match="1 norm became constants") as told:
        convert(model, "frozen")
    assert [line.split(":")[0].strip() for line in str(told[0].message).splitlines()[1:]] == ["1"]
    with torch.device("meta"):  # its numbers are loaded afterwards
        convert(nn.Sequential(nn.BatchNorm2d(4)), "frozen")


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"example_weight": 0.5}])
def test_what_has_no_constants_is_refused(options: Any) -> None:
    model = nn.Sequential(anybatch.BatchNorm2d(4, **options))
    with pytest.raises(ValueError, match="no constants give its output|leave it True"):
        convert(model, "frozen")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_frozen_layer_is_torchs_batch_norm_in_evaluation(dims: int) -> None:
    torchs = randomize(getattr(nn, f"BatchNorm{dims}d")(4)).eval()
    ours = getattr(anybatch, f"FrozenBatchNorm{dims}d")(4).train()
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 4, *[5] * dims)
    torch.testing.assert_close(ours(x), torchs(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="takes a channel dimension"):
        ours(torch.randn(2, 4, *[5] * (dims + 1)))
    with pytest.raises(ValueError, match="leave it True"):
        type(ours)(4, track_running_stats=False)


def test_a_schedule_freezes_late_and_resumes() -> None:
    def course() -> tuple[nn.Module, anybatch.NormScheduler]:
        model = convert(network(), "mbn", batch_size=4)
        return model, anybatch.NormScheduler(model, 4, switch={3: "frozen"})

    model, scheduler = course()
    for _ in range(3):
        model.train()(X)
        scheduler.step()
    assert type(model[1]) is anybatch.FrozenBatchNorm2d
    again, other = course()
    other.load_state_dict(scheduler.state_dict())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


def test_a_schedule_thaws_a_network_of_frozen_norms() -> None:
    model = network()[:3]
    anybatch.NormScheduler(model, 2, switch={2: "bn"}).step()
    assert type(model[1]) is anybatch.BatchNorm2d


# Back to plain torch


@pytest.mark.parametrize("kind", [DETR, anybatch.FrozenBatchNorm2d])
def test_frozen_norms_fold(kind: Any) -> None:
    model = network(kind).eval()
    before = inference(model)
    fold(model, X)
    assert [type(model[i]) for i in (1, 4)] == [nn.Identity] * 2
    torch.testing.assert_close(inference(model), before, rtol=1e-5, atol=1e-5)


def test_frozen_layers_become_torchs_in_evaluation_mode() -> None:
    model = convert(network(), "frozen").train()
    before = inference(model)
    convert(model, "bn")
    convert(model, "frozen")
    to_batchnorm(model)
    assert [type(model[i]) for i in (1, 4)] == [nn.BatchNorm2d] * 2
    assert not model[1].training
    torch.testing.assert_close(inference(model), before, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_a_frozen_network_loads_into_its_library() -> None:
    model = convert(network(), "mabn")
    model.train()(X)
    state = convert(model, "frozen").state_dict()
    theirs = network()
    theirs.load_state_dict(state)
    torch.testing.assert_close(theirs.eval()(X), model.eval()(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["frozen", "gn", "ln", "in"])
def test_a_network_whose_norms_depend_on_no_batch_takes_every_setting(method: str) -> None:
    """A training script with the method in its configuration runs with these, too."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    net(torch.randn(4, 3, 6, 6))
    anybatch.convert(net, method)
    x = torch.randn(2, 3, 6, 6)
    wanted = net(x)
    anybatch.NormScheduler(net, 2).step()
    with anybatch.accumulate(net, 4) as steps:
        assert torch.equal(net(x), wanted)
        steps.end_step()
    anybatch.freeze(net)
    with anybatch.masked(net, torch.ones(2, 1, 6, 6, dtype=torch.bool)):
        torch.testing.assert_close(net(x), wanted)
    with pytest.raises(ValueError, match="depend on no batch, there is nothing to thaw"):
        anybatch.thaw(net)
    with pytest.raises(ValueError, match="depend on no batch"):
        anybatch.explain(net, x)


def test_a_network_with_plain_batch_norms_beside_frozen_ones_is_refused() -> None:
    net = nn.Sequential(anybatch.FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    for call in (anybatch.freeze, partial(anybatch.accumulate, steps=2)):
        with pytest.raises(ValueError, match="has no anybatch layer"):
            call(net)
