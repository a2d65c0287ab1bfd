"""Who feeds each norm: by symbolic trace, by a recorded forward, and part by part."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.conversion.producers import Feeder, find_feeders

Forward = Callable[..., Any]


def net(forward: Forward, **modules: nn.Module) -> nn.Module:
    """A network of these modules and this forward."""
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def untraceable(forward: Forward) -> Forward:
    """The same forward, with a question about values that no symbolic trace can answer."""

    def asking(self: nn.Module, x: Tensor, **others: Any) -> Any:
        return forward(self, x, **others) if bool((x == x).all()) else x

    return asking


def conv(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(4, channels, 3, padding=1)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


X = torch.randn(1, 4, 5, 5)
both_ways = pytest.mark.parametrize("how", ["traced", "recorded"])


def feeders(how: str, forward: Forward, **modules: nn.Module) -> dict[str, Feeder]:
    if how == "traced":
        return find_feeders(net(forward, **modules))
    return find_feeders(net(untraceable(forward), **modules), X)


# What feeds a norm


@both_ways
def test_a_convolution_feeds_the_norm_after_it(how: str) -> None:
    found = feeders(how, lambda self, x: self.bn(self.conv(x)), conv=conv(), bn=norm())
    assert found == {"bn": Feeder("conv")}
    assert found["bn"].sole


@both_ways
def test_an_identity_passes_on_what_it_is_given(how: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn(self.skip(self.conv(x)))

    found = feeders(how, forward, conv=conv(), skip=nn.Identity(), bn=norm())
    assert found["bn"] == Feeder("conv")


@both_ways
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: s.bn(s.conv(x) + x), "fed by an addition"),
        (lambda s, x: s.bn(torch.add(s.conv(x), x)), "fed by an addition"),
        (lambda s, x: s.bn(torch.cat([s.conv(x)], 1)), "fed by a concatenation"),
        (lambda s, x: s.bn(s.conv(x).relu()), "pre-activation: fed by relu"),
        (lambda s, x: s.bn(s.conv(x).relu_()), "pre-activation: fed by relu"),
        (lambda s, x: s.bn(F.gelu(s.conv(x))), "pre-activation: fed by gelu"),
        (lambda s, x: s.bn(s.other(s.conv(x))), "fed by the norm 'other'"),
    ],
)
def test_what_else_feeds_a_norm_is_said(how: str, forward: Forward, reason: str) -> None:
    found = feeders(how, forward, conv=conv(), other=nn.BatchNorm2d(4), bn=norm())
    assert found["bn"] == Feeder(None, reason)


def test_a_norm_on_the_input() -> None:
    assert find_feeders(nn.Sequential(norm()))["0"] == Feeder(None, "fed by the input")


def test_modules_between_are_named() -> None:
    model = nn.Sequential(conv(), nn.MaxPool2d(2), norm(), nn.ReLU(), norm())
    found = find_feeders(model)
    assert found["2"] == Feeder(None, "fed by MaxPool2d '1'")
    assert found["4"] == Feeder(None, "pre-activation: fed by relu")


@both_ways
def test_something_in_place_between_breaks_the_pair(how: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)

    assert not feeders(how, forward, conv=conv(), bn=norm())["bn"].sole


def test_a_change_in_place_that_nothing_shows_is_seen_by_the_version() -> None:
    class Doubling(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if input.mul_(2).dim() else input

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.other(y) + self.bn(y)

    found = feeders("recorded", forward, conv=conv(), other=Doubling(4), bn=norm())
    assert found["bn"] == Feeder(None, "the output of 'conv' is changed in place")


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 1), nn.ConvTranspose1d(4, 6, 2)]
)
def test_linear_and_transposed_layers_feed_too(layer: nn.Module) -> None:
    assert find_feeders(nn.Sequential(layer, nn.BatchNorm1d(6)))["1"] == Feeder("0")


# How often


@both_ways
def test_other_consumers_of_the_output_are_counted(how: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.relu() + y

    found = feeders(how, forward, conv=conv(), bn=norm())
    assert found["bn"] == Feeder("conv", None, 2)
    assert str(found["bn"]) == "conv (+2 more using it)"


@both_ways
def test_an_output_of_the_network_is_a_consumer(how: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        return {"out": self.bn(y), "features": [y]}

    assert feeders(how, forward, conv=conv(), bn=norm())["bn"].other_consumers == 1


@both_ways
def test_looking_at_a_shape_is_no_use_of_the_output(how: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).reshape(y.shape[0], y.size(1), -1)

    assert feeders(how, forward, conv=conv(), bn=norm())["bn"].sole


@both_ways
def test_a_norm_called_twice_has_no_feeder(how: str) -> None:
    found = feeders(how, lambda s, x: s.bn(s.conv(s.bn(x))), conv=conv(), bn=norm())
    assert found["bn"] == Feeder(None, "called twice")


@both_ways
def test_a_feeder_called_twice_is_none(how: str) -> None:
    found = feeders(how, lambda s, x: s.bn(s.conv(s.conv(x))), conv=conv(), bn=norm())
    assert found["bn"] == Feeder(None, "its feeder 'conv' is called twice")


@both_ways
def test_a_norm_that_is_not_called(how: str) -> None:
    found = feeders(how, lambda s, x: s.conv(x), conv=conv(), bn=norm())
    assert found["bn"] == Feeder(None, "not called")


@both_ways
def test_a_weight_that_others_use_makes_no_feeder(how: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(self.bn(self.conv(x)), self.conv.weight)

    found = feeders(how, forward, conv=conv(), bn=norm())
    assert found["bn"] == Feeder(None, "the weight of its feeder 'conv' is used elsewhere")


def test_a_shared_module_goes_by_its_first_name() -> None:
    shared = norm()
    model = net(lambda s, x: s.b(s.conv(x)), conv=conv(), a=shared, b=shared)
    assert find_feeders(model) == {"a": Feeder("conv")}


# What can and cannot be traced


def test_a_branch_on_an_optional_argument_is_taken_as_by_default() -> None:
    def forward(self: Any, x: Tensor, skip: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.conv(x)
        return self.bn(y if skip is None else torch.cat([y, skip], 1))

    assert find_feeders(net(forward, conv=conv(), bn=norm()))["bn"] == Feeder("conv")


def test_without_a_trace_example_inputs_are_asked_for() -> None:
    model = net(untraceable(lambda s, x: s.bn(s.conv(x))), conv=conv(), bn=norm())
    assert find_feeders(model)["bn"] == Feeder(None, "model does not trace; pass example_inputs")
    assert find_feeders(model, X)["bn"] == Feeder("conv")


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}])
def test_example_inputs_are_a_tensor_a_tuple_or_a_mapping(inputs: Any) -> None:
    model = net(untraceable(lambda s, x: s.bn(s.conv(x))), conv=conv(), bn=norm())
    assert find_feeders(model, inputs)["bn"] == Feeder("conv")


def test_example_inputs_that_do_not_fit_are_an_error() -> None:
    model = net(untraceable(lambda s, x: s.bn(s.conv(x))), conv=conv(), bn=norm())
    with pytest.raises(ValueError, match="example_inputs: the model's forward failed .* TypeError"):
        find_feeders(model, (X, X))


def test_parts_that_trace_are_traced_on_their_own() -> None:
    block = net(lambda s, x: s.bn(s.conv(s.first(x))), first=norm(), conv=conv(), bn=norm())
    model = net(untraceable(lambda s, x: s.body[0](x)), body=nn.ModuleList([block]))
    found = find_feeders(model)
    assert found["body.0.bn"] == Feeder("body.0.conv")
    assert found["body.0.first"].name is None
    assert "fed from outside 'body.0'" in str(found["body.0.first"])


def test_a_part_whose_modules_are_used_outside_it_is_not_trusted() -> None:
    block = nn.Sequential(conv(), norm())
    model = net(untraceable(lambda s, x: s.block(x) + s.twin(x)), block=block, twin=block[0])
    found = find_feeders(model)["block.1"]
    assert found.name is None
    assert "used outside 'block' too" in str(found)


def test_a_forward_put_on_the_instance_is_followed_by_recording() -> None:
    model = nn.Sequential(conv(), norm())
    model.forward = lambda x: model[1](x)
    assert find_feeders(model)["1"].name is None
    assert find_feeders(model, X)["1"].reason == "fed by the input or a view"


def test_lazy_layers_stay_lazy() -> None:
    model = net(untraceable(lambda s, x: s.bn(s.conv(x))), conv=nn.LazyConv2d(4, 3), bn=norm())
    assert find_feeders(model, X)["bn"].name is None
    assert type(model.conv) is nn.LazyConv2d


def test_a_norm_alone_has_no_producer() -> None:
    assert find_feeders(norm()) == {"": Feeder(None, "the model is this norm alone")}


# Leaving no trace


class Restless(nn.Module):
    """Changes itself in its forward in every way it can."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.traceable = traceable
        self.conv, self.bn, self.drop = conv(), norm(), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable:
            bool(x.sum() > 0)
        self.calls.add_(1)
        self.last = x
        self.seen.append(x)
        torch.rand(3)
        return self.drop(self.bn(self.conv(x)))


@pytest.mark.parametrize("traceable", [True, False])
def test_finding_producers_leaves_the_network_as_it_was(traceable: bool) -> None:
    model = Restless(traceable)
    model.drop.eval()
    heard: list[str] = []
    model.register_forward_hook(lambda *_: heard.append("root"))
    model.drop.register_forward_hook(lambda *_: heard.append("drop"))
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    modes = [module.training for module in model.modules()]

    assert find_feeders(model, X)["bn"] == Feeder("conv")

    assert model.last is None
    assert model.seen == []
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(model.bn._forward_hooks) == 0
    assert heard == [] if traceable else heard == ["drop", "root"]


class Skipped(nn.Module):
    """A block that training leaves out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() + random.random() < 1:
            return x
        return x + torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("method", ["mabn", "cbn"])
def test_blocks_that_training_leaves_out_at_random_are_converted(method: str) -> None:
    made = [type(module) for module in converted_blocks(0, method).modules()]
    assert made == [type(module) for module in converted_blocks(1, method).modules()]
    assert nn.BatchNorm2d not in made


def converted_blocks(seed: int, method: str) -> nn.Module:
    torch.manual_seed(seed)
    random.seed(seed)
    return anybatch.convert(nn.Sequential(*[Skipped() for _ in range(6)]), method)


class WithHead(nn.Module):
    """A head of its own for training, on the output of a convolution or of a norm."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head, self.head_norm = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
        self.before = before

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.norm(y)
        return (z, self.head_norm(self.head(y if self.before else z))) if self.training else z


@pytest.mark.parametrize("before", [False, True])
def test_a_head_that_only_training_runs_counts(before: bool) -> None:
    model = WithHead(before)
    for training in (True, False):
        feeders = find_feeders(model.train(training))
        assert feeders["head_norm"].name == "head"
        assert feeders["norm"].name == "conv"
        assert feeders["norm"].other_consumers == before


class Either(nn.Module):
    """Another convolution feeds the norm in training."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm((self.other if self.training else self.one)(x))
        return y


def test_a_norm_that_training_feeds_otherwise_has_no_feeder() -> None:
    feeder = find_feeders(Either())["norm"]
    assert feeder.name is None
    assert feeder.reason == "fed by 'one' in evaluation, by 'other' in training"
