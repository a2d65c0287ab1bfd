"""The contract of `convert`: what it keeps, what it refuses, and that it is whole or nothing."""

import copy
import math
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.conversion import NoEffectWarning, convert, plan, to_batchnorm
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.weight_centralization import is_centralized
from anybatch.registry import METHODS
from conversion.networks import Tabular, Wave, convnet
from zoo.listing import randomize

EXACT = [name for name, method in METHODS.items() if method.exact_eval]
OURS = [name for name, method in METHODS.items() if issubclass(method.layer(2), NormLayer)]
each_method = pytest.mark.parametrize("method", METHODS)


def eval_output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def no_in(model: nn.Module, method: str) -> Any:
    """What keeps instance norm away from the outputs of linear layers."""
    return (lambda name, module: not name.startswith("body")) if method == "in" else None


def own(method: str) -> dict[str, int]:
    """Options without which a converted network does not train."""
    return {"num_virtual": 1} if METHODS[method].wraps else {}


# What is kept


@each_method
def test_parameters_stay_the_same_objects_and_their_flags(method: str) -> None:
    model = convnet()
    model[1].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    before = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in before.items()}
    convert(model, method)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert flags == {name: p.requires_grad for name, p in after.items()}


@pytest.mark.few(2)
@each_method
def test_an_optimizer_made_before_still_trains_the_model(method: str) -> None:
    torch.manual_seed(0)
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    convert(model, method, **own(method))
    before = [p.detach().clone() for p in model.parameters()]
    y = model.train()(torch.randn(2, 3, 12, 12))
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved[1:])  # instance norm makes the first bias-free weight's gradient tiny, not 0


@each_method
def test_train_and_eval_flags_are_kept_one_by_one(method: str) -> None:
    model = convnet().train()
    model[4].eval()
    convert(model, method)
    assert model.training
    assert model[1].training
    assert not model[4].training


@pytest.mark.few(1)
@each_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_type_are_kept(method: str, dtype: torch.dtype) -> None:
    model = convert(convnet().to(dtype), method, **own(method))
    assert all(p.dtype == dtype for p in model.parameters())
    assert model(torch.randn(4, 3, 12, 12, dtype=dtype)).dtype == dtype
    for name, buffer in model.named_buffers():
        if "running" in name:
            assert buffer.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@each_method
def test_the_meta_device_is_kept(method: str) -> None:
    with torch.device("meta"):
        model = convnet()
    convert(model, method)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


@each_method
def test_hooks_go_along_and_their_handles_still_remove_them(method: str) -> None:
    model, heard = convnet(), []
    handles = [
        model[1].register_forward_pre_hook(lambda *_: heard.append("pre")),
        model[1].register_forward_hook(lambda *_: heard.append("post"), always_call=True),
        model[1].register_forward_hook(
            lambda m, args, kwargs, y: heard.append("named"), with_kwargs=True
        ),
        model[1].register_full_backward_hook(lambda *_: heard.append("backward")),
        model[1].register_state_dict_post_hook(lambda *_: heard.append("state")),
    ]
    convert(model, method, **own(method))
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    model(x).square().sum().backward()
    model.state_dict()
    assert sorted(heard) == ["backward", "named", "post", "pre", "state"]
    for handle in handles:
        handle.remove()
    model(x).square().sum().backward()
    assert len(heard) == 5


def test_marks_that_others_left_on_a_norm_go_along() -> None:
    model = convnet()
    model[1].no_weight_decay = True
    assert convert(model, "brn")[1].no_weight_decay
    assert convert(model, "gn")[4].__dict__.keys() >= {"num_groups"}


@pytest.mark.parametrize("method", OURS)
def test_statistics_are_kept(method: str) -> None:
    model = randomize(convnet())
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    convert(model, method)
    second = model[1].running_var + model[1].running_mean ** 2
    torch.testing.assert_close(second, var + mean**2)
    assert model[1].num_batches_tracked == 7
    if method != "mabn":
        assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("build", "shape"), [(convnet, (3, 12, 12)), (Tabular, (6,)), (Wave, (2, 20))]
)
def test_a_trained_network_keeps_its_eval_output(
    method: str, affine: bool, build: Any, shape: Any
) -> None:
    model, x = randomize(build()), torch.randn(4, *shape)
    if not affine:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight, module.bias, module.affine = None, None, False
    before = eval_output(model, x)
    options = {"centered": True} if method == "mabn" and not affine else {}
    convert(model, method, **options)
    torch.testing.assert_close(eval_output(model, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", OURS)
@pytest.mark.parametrize("second", EXACT)
def test_layers_convert_to_each_other(first: str, second: str) -> None:
    model, x = randomize(convnet()), torch.randn(4, 3, 12, 12)
    convert(model, first)
    for module in model.modules():
        if isinstance(module, NormLayer):
            module.example_weight = 0.0
    before = eval_output(model, x)
    convert(model, second)
    assert type(model[1]).__name__ == f"{METHODS[second].class_name}2d"
    if first != "bgn":
        torch.testing.assert_close(eval_output(model, x), before, rtol=1e-5, atol=1e-5)


def test_settings_of_inference_and_batch_go_along_from_layer_to_layer() -> None:
    model = nn.Sequential(anybatch.GhostBatchNorm1d(4, norm_batch_size=8, example_weight=0.25))
    assert convert(model, "brn")[0].norm_batch_size == 8
    assert model[0].example_weight == 0.25
    assert convert(model, "bn", example_weight=0.0)[0].example_weight == 0.0


def test_frozen_layers_stay_frozen() -> None:
    model = anybatch.freeze(convert(randomize(convnet()), "bn"))
    convert(model, "brn")
    assert model[1].frozen
    assert model[4].frozen


# Where norms sit


def test_a_module_at_several_paths_is_converted_once_and_still_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d(4)
            self.one, self.two = norm, norm
            self.list = nn.ModuleList([norm])
            self.dict = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})

    model = convert(Twice(), "brn")
    assert isinstance(model.one, anybatch.BatchRenorm1d)
    assert model.one is model.two is model.list[0] is model.dict["a"] is model.dict["b"][0]


def test_the_order_of_modules_is_kept() -> None:
    model = Wave()
    names = list(model.state_dict())
    assert list(convert(model, "bn").state_dict()) == names


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].binds])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_root_that_is_a_norm_gets_a_new_root(method: str, dims: int) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4)
    new = convert(norm, method)
    assert type(new) is METHODS[method].layer(dims)
    assert new.weight is norm.weight


@pytest.mark.parametrize("method", OURS)
def test_converting_twice_changes_nothing_more(method: str) -> None:
    model = convert(convnet(), method)
    norm = model[1]
    assert convert(model, method)[1] is norm  # and no warning: it is what was asked for


def test_converting_again_with_another_option_does() -> None:
    model = convert(convnet(), "mabn", window=8)
    norm = model[1]
    assert convert(model, "mabn", window=8)[1] is norm
    assert convert(model, "mabn", window=4)[1].window == 4


def test_a_mapping_gives_each_norm_its_method_and_its_options() -> None:
    model = convert(Tabular(), {"first": "bn", "body.1": "ghost", "*": "mabn"}, ghost_size=4)
    kinds = [type(m).__name__ for m in (model.first, model.body[1], model.body[4])]
    assert kinds == ["BatchNorm1d", "GhostBatchNorm1d", "MovingAverageBatchNorm1d"]
    assert model.body[1].ghost_size == 4


def test_where_leaves_the_others_as_they_are() -> None:
    model = convert(Tabular(), "brn", where="body.*")
    assert type(model.first) is nn.BatchNorm1d
    assert type(model.body[4]) is anybatch.BatchRenorm1d


# Arguments


def test_batch_size_goes_to_the_methods_that_use_it() -> None:
    assert convert(convnet(), "mbn", batch_size=4)[1].batch_size == 4
    assert not hasattr(convert(convnet(), "bn", batch_size=4)[1], "batch_size")


@pytest.mark.parametrize("method", OURS)
def test_running_statistics_start_fast(method: str) -> None:
    k = 10 if method in ("mabn", "mbn", "brn", "cbn") else 0
    fresh = convert(convnet(), method, example_inputs=torch.randn(2, 3, 12, 12))
    by_hand = convert(convert(convnet(), "bn", momentum_warmup=20), method)
    asked = convert(convert(convnet(), "bn", momentum_warmup=20), method, momentum_warmup=3)
    for model, expected in ((fresh, k), (by_hand, 20), (asked, 3)):
        layers = [m for m in model.modules() if isinstance(m, NormLayer)]
        assert layers
        assert {layer.momentum_warmup for layer in layers} == {expected}
    if not METHODS[method].binds:
        assert anybatch.norm_layer(method)(4).momentum_warmup == k


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("method", ["mabn", "mbn", "brn"])
def test_trained_norms_of_a_network_do_not_start_anew(method: str, counted: bool) -> None:
    """A trained backbone, whose batches may not be counted, and a head that was added to it."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    trained, new = model[0], model[3]
    trained.running_var.fill_(7.0)
    trained.num_batches_tracked.fill_(5000 if counted else 0)
    convert(model, method)
    x = torch.randn(4, 4, 8, 8)
    model(x)
    momentum = model[0].momentum
    moved = (1 - momentum) * 7 + momentum * x.var((0, 2, 3))
    if method != "mabn":  # which follows second moments
        torch.testing.assert_close(model[0].running_var, moved)
    assert ((model[0].running_var - 7).abs() < 2 * momentum * 7).all()
    assert (model[3].running_var < 0.9).all(), "its initial values are gone"
    assert new.num_batches_tracked == 1


@pytest.mark.every_case
@pytest.mark.filterwarnings("ignore:.*that are not centred")
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_loaded_network_starts_fast_where_its_batches_were_counted(
    trained: bool, counted: bool
) -> None:
    """Old checkpoints have no count: their statistics are not of the first batch."""
    source, model = convnet(), convert(convnet(), "mabn")
    if trained:
        for _ in range(3):
            source(torch.randn(8, 3, 12, 12))
    state = source.state_dict()
    if not counted:
        state = OldCheckpoint((k, v) for k, v in state.items() if "num_batches" not in k)
    model.load_state_dict(state)
    layers = [m for m in model.modules() if isinstance(m, NormLayer)]
    assert {layer.momentum_warmup for layer in layers} == {10}
    before = layers[0].running_var.clone()
    model.train()(torch.randn(2, 3, 12, 12) * 9)
    moved = (layers[0].running_var / before - 1).abs().max()
    assert (moved < 1) == (trained and not counted)


@pytest.mark.every_case
@pytest.mark.filterwarnings("ignore:.*that are not centred")
@pytest.mark.parametrize("start", ["uncounted", "uncounted after a batch", "few", "recalibrated"])
@pytest.mark.parametrize("method", ["mabn", "mbn", "brn", "cbn"])
def test_training_resumes_in_a_fresh_network_wherever_it_started(method: str, start: str) -> None:
    """Running statistics that were there before the first counted batch, and a checkpoint."""
    data = [torch.randn(8, 3, 12, 12) * 2 + 1 for _ in range(12)]

    def fresh() -> nn.Module:
        return convert(convnet(), method, example_inputs=data[0]).train()

    source, model = convnet(), fresh()
    for x in data * 5:
        source(x)
    state = source.state_dict()
    if start == "few":
        source = convnet()
        for x in data[:3]:
            source(x)
        model = convert(source, method, example_inputs=data[0])
    elif start == "recalibrated":
        anybatch.recalibrate(model, data)
        model.train()
    else:
        if start == "uncounted after a batch":
            model(torch.randn(2, 3, 12, 12))
        counts = [key for key in state if "num_batches" in key]
        for key in counts:
            del state[key]
        model.load_state_dict(OldCheckpoint(state))
    first = next(m for m in model.modules() if isinstance(m, NormLayer))
    before = first.running_var.clone()
    model(torch.randn(2, 3, 12, 12) * 1e-3)
    if start != "few":
        assert (first.running_var > 0.8 * before).all(), "one batch does not replace them"
    resumed = fresh()
    resumed.load_state_dict(model.state_dict())
    for x in data[:5]:
        for one in (model, resumed):
            one(x)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0)


class OldCheckpoint(dict):
    """A state of before torch counted batches."""

    _metadata: ClassVar[dict] = {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (16, 0.02)),
        ({"norm_batch_size": 2}, (64, 0.005)),
        ({"norm_batch_size": 2, "window": 8}, (8, 0.005)),
        ({"norm_batch_size": 2, "momentum": 0.1}, (64, 0.1)),
        ({"norm_batch_size": 2, "memories": 4}, (16, 0.02)),  # each moves once a step
    ],
)
def test_a_window_covers_steps_where_batches_are_cut(options: dict, expected: tuple) -> None:
    model = convert(convnet(), "mabn", **options)
    layers = [m for m in model.modules() if isinstance(m, NormLayer)]
    assert {(layer.window, layer.momentum) for layer in layers} == {expected}
    made = anybatch.norm_layer("mabn", **options)(4)
    assert (made.window, made.momentum) == expected
    again = plan(model, "mabn", **options).rows
    assert {row.reason for row in again if row.decision == "keep"} == {"already mabn"}
    cut = convert(convnet(), "bn", norm_batch_size=2)
    convert(cut, "mabn")  # it keeps cutting
    assert {m.window for m in cut.modules() if isinstance(m, NormLayer)} == {64}


def test_momentum_stays_where_it_means_the_same() -> None:
    def with_momentum(momentum: float | None) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4, momentum=momentum))

    assert convert(with_momentum(0.3), "bn")[0].momentum == 0.3
    assert convert(with_momentum(None), "ghost")[0].momentum is None
    assert convert(with_momentum(0.3), "mabn")[0].momentum == 0.02
    assert convert(with_momentum(0.3), "mabn", momentum=0.1)[0].momentum == 0.1


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("momentum", [0, 0.0, None])
def test_momentum_0_and_none_mean_the_same_to_every_method(
    method: str, momentum: float | None
) -> None:
    model = convert(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, momentum=momentum)), method)
    assert model[1].momentum == momentum
    if METHODS[method].folds:
        assert to_batchnorm(model)[1].momentum == momentum


def test_eps_and_missing_affine_and_statistics_are_kept() -> None:
    norm = nn.BatchNorm2d(4, eps=1e-3, affine=False, track_running_stats=False)
    new = convert(nn.Sequential(norm), "bn")[0]
    assert (new.eps, new.affine, new.weight, new.running_mean) == (1e-3, False, None, None)
    assert convert(nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)), "gn")[0].eps == 1e-3


@pytest.mark.parametrize(
    ("channels", "asked", "groups"),
    [(64, 32, 32), (48, 32, 24), (37, 32, 1), (4, 32, 2), (1, 32, 1), (64, 8, 8)],
)
@pytest.mark.parametrize("method", ["gn", "bgn"])
def test_channel_groups_divide_and_hold_two_channels(
    method: str, channels: int, asked: int, groups: int
) -> None:
    new = convert(nn.Sequential(nn.BatchNorm2d(channels)), method, num_groups=asked)[0]
    assert new.num_groups == groups


def test_weight_centralization_follows_the_plan() -> None:
    assert is_centralized(convert(convnet(), "mabn")[0])
    trained, x = randomize(convnet()), torch.randn(2, 3, 12, 12)
    before = eval_output(trained, x)
    assert not is_centralized(convert(trained, "mabn")[0])
    torch.testing.assert_close(eval_output(trained, x), before, rtol=1e-5, atol=1e-5)
    assert is_centralized(convert(randomize(convnet()), "mabn", centralize=True)[0])


def test_an_unknown_method_is_an_error_with_the_close_one() -> None:
    with pytest.raises(ValueError, match="'mabm': did you mean 'mabn'"):
        convert(convnet(), "mabm")
    with pytest.raises(TypeError, match="method=3"):
        convert(convnet(), 3)
    with pytest.raises(TypeError, match="method={}"):
        convert(convnet(), {})


def test_an_unknown_option_is_an_error_with_the_methods_options() -> None:
    with pytest.raises(TypeError, match=r"windw=8: mabn .* did you mean 'window'\? .*warmup_steps"):
        convert(convnet(), "mabn", windw=8)
    with pytest.raises(TypeError, match="momentum=0.1: gn has no such option"):
        convert(convnet(), "gn", momentum=0.1)
    with pytest.raises(TypeError, match="ghost_size=2: bn, brn has no such option"):
        convert(Tabular(), {"first": "bn", "*": "brn"}, ghost_size=2)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_a_batch_size_is_a_whole_number(batch_size: Any) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=f"batch_size={batch_size}: give a whole number from 1"
    ):
        convert(convnet(), "mbn", batch_size=batch_size)


def test_a_model_is_a_module() -> None:
    with pytest.raises(TypeError, match="give a torch.nn.Module"):
        convert([nn.BatchNorm1d(3)], "bn")


def test_a_value_that_the_method_refuses_is_named() -> None:
    with pytest.raises(ValueError, match="ghost_size=0"):
        convert(convnet(), "ghost", ghost_size=0)


# What is refused


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class OwnTrain(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "OwnTrain":
        return super().train(False)


class Renamed(nn.BatchNorm2d):
    """A subclass that changes nothing, as libraries have them."""


class Checking(nn.BatchNorm2d):
    """Takes inputs of other shapes."""

    def _check_input_dim(self, input: Tensor) -> None: ...


class Asked(nn.BatchNorm2d):
    """Has something to call."""

    @property
    def gate(self) -> Tensor:
        return self.weight.sigmoid()


def holding(name: str) -> nn.Module:
    norm = nn.BatchNorm2d(4)
    if name == "gate":
        norm.gate = nn.Parameter(torch.zeros(4))
    else:
        norm.register_buffer(name, torch.zeros(4))
    return norm


def patched() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: x
    return norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (OwnForward(4), r"OwnForward is a batch norm with its own forward\(\)"),
        (OwnTrain(4), r"its own train\(\)"),
        (Checking(4), r"its own _check_input_dim\(\)"),
        (Asked(4), r"its own gate\(\)"),
        (holding("gate"), "it holds gate, which a replacement would lose"),
        (holding("importance"), "it holds importance, which a replacement would lose"),
        (patched(), "its forward was replaced on the instance"),
        (nn.LazyBatchNorm2d(), "run one batch through the model before"),
        (nn.SyncBatchNorm(4), "convert the model before torch.nn.SyncBatchNorm.convert_sync"),
        (nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "parametrized"),
    ],
)
def test_norms_it_does_not_understand_are_refused_by_name(norm: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), norm)
    before = list(model)
    with pytest.raises(ValueError, match=rf"1 norm cannot be:\n  1: .*{reason}"):
        convert(model, "bn")
    assert list(model) == before
    assert type(convert(model, "bn", where="0")[0]) is anybatch.BatchNorm2d


class Listed(nn.Module):
    """Goes through plain containers of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.steps = [self.conv, ("then", {"norm": self.norm})]

    def forward(self, x: Tensor) -> Tensor:
        (conv, (_, rest)) = self.steps
        return rest["norm"](conv(x))


def test_norms_in_plain_containers_of_a_module_are_exchanged() -> None:
    model, x = Listed(), torch.randn(2, 3, 8, 8)
    convert(model, "mabn")(x)
    assert model.norm.num_batches_tracked == 1
    assert model.steps[1][1]["norm"] is model.norm
    anybatch.to_batchnorm(model)(x)
    assert type(model.norm) is nn.BatchNorm2d
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("way", ["convert", "schedule"])
def test_what_all_methods_take_is_kept_by_another_conversion(way: str) -> None:
    given = {"process_group": "world", "outlier_limit": 9.0, "example_weight": 0.5}
    model = convert(nn.Sequential(nn.BatchNorm2d(4)), "mbn", batch_size=2, **given)
    if way == "convert":
        convert(model, "bn")
    else:
        anybatch.NormScheduler(model, 2, switch={1: "bn"}).step()
    assert type(model[0]) is anybatch.BatchNorm2d
    assert {name: getattr(model[0], name) for name in given} == given
    convert(model, "brn", process_group=None, norm_batch_size=2)
    assert model[0].process_group is None
    convert(convert(model, "brn", process_group="world", norm_batch_size=None), "bn")
    convert(model, "brn", norm_batch_size=2)  # which cuts what the group would join
    assert model[0].process_group is None


def test_a_group_that_a_layer_keeps_is_in_the_plan() -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(4)), "sync")
    assert anybatch.plan(model, "bn").rows[0].reason == "already bn, keeps process_group=world"


@pytest.mark.parametrize("methods", [("bn",), ("mabn", "brn"), ("bn", "cbn")])
def test_tags_of_other_libraries_outlast_all_conversions(methods: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1]._no_weight_decay = True
    for method in methods:
        convert(model, method)
        assert model[1]._no_weight_decay
    anybatch.to_batchnorm(model)
    assert model[1]._no_weight_decay


def test_a_weight_that_another_layer_shares_is_not_centralized() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    model[2].weight = model[0].weight
    reason = anybatch.plan(model, "mabn").rows[0].reason
    assert reason.endswith("weights not centralized: '0' shares its weight with '2'")


def test_subclasses_that_change_nothing_are_converted() -> None:
    assert type(convert(nn.Sequential(Renamed(4)), "bn")[0]) is anybatch.BatchNorm2d


def test_a_lazy_norm_is_converted_once_it_knows_its_channels() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(2, 5))
    assert convert(model, "bn")[0].num_features == 5


@pytest.mark.parametrize(
    ("method", "norm", "reason"),
    [
        ("mabn", nn.BatchNorm2d(4, track_running_stats=False), "track_running_stats=False"),
        ("mbn", nn.BatchNorm2d(4, track_running_stats=False), "track_running_stats=False"),
        ("mabn", randomize(nn.BatchNorm2d(4, affine=False)), "use centered=True"),
    ],
)
def test_what_a_method_cannot_take_over_is_refused_by_name(
    method: str, norm: nn.Module, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"  0: .*{reason}"):
        convert(nn.Sequential(norm), method)


def test_instance_norm_after_a_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"body.1: after a linear layer .*\n  body.4: after"):
        convert(Tabular(), "in")


def test_a_parameter_of_two_norms_is_refused_where_it_would_be_rewritten() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="mabn rewrites its scale and shift, which '1' uses too"):
        convert(model, "mabn")
    convert(model, "brn")
    assert model[0].weight is model[1].weight


def compiled_in_place() -> nn.Module:
    model = convnet()
    model.compile()
    return model


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.DataParallel, "wrap it in DataParallel afterwards; the model inside it is its .module"),
        (torch.compile, "compile it afterwards|call torch.compile afterwards"),
        (
            lambda model: torch.jit.trace(model, torch.ones(2, 3, 12, 12)),
            "script or trace it after",
        ),
        (lambda model: compiled_in_place(), "compile it afterwards|call torch.compile afterwards"),
        (lambda model: nn.Sequential(nn.DataParallel(model)), "its part '0' is wrapped in DataPar"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrapped_model_is_refused_with_the_remedy(wrap: Any, remedy: str) -> None:
    model = wrap(convnet().eval())
    with pytest.raises(ValueError, match=remedy):
        convert(model, "bn")
    with pytest.raises(ValueError, match=remedy):
        to_batchnorm(model)


def test_distributed_models_are_refused_with_the_remedy() -> None:
    class DistributedDataParallel(nn.Module):
        __module__ = "torch.nn.parallel.distributed"

        def __init__(self) -> None:
            super().__init__()
            self.module = convnet()

    with pytest.raises(ValueError, match="Work on the bare model and wrap it in Distr"):
        convert(DistributedDataParallel(), "bn")


# Whole or nothing


def test_nothing_to_convert_is_a_warning() -> None:
    with pytest.warns(NoEffectWarning, match="the model has no norm"):
        convert(nn.Sequential(nn.Linear(2, 2)), "bn")
    with pytest.warns(NoEffectWarning, match="0: no batch norm"):
        convert(nn.Sequential(nn.LayerNorm(2)), "bn")
    with pytest.warns(NoEffectWarning, match="left out by where"):
        convert(convnet(), "bn", where="nowhere.*")


def test_one_norm_that_cannot_be_converted_leaves_all_as_they_were() -> None:
    model = randomize(nn.Sequential(*convnet(), OwnForward(4)))
    modules, state = list(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing was converted"):
        convert(model, "mabn", centralize=True)
    assert list(model) == modules
    assert not is_centralized(model[0])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("when", ["replacement", "weight_centralization"])
def test_a_failure_in_the_middle_is_undone(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    module = __import__("anybatch.conversion.convert", fromlist=["convert"])
    real, calls = getattr(module, when), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return real(*args)

    monkeypatch.setattr(module, when, failing)
    model = randomize(convnet())
    modules, state = list(model), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="power cut"):
        convert(model, "mabn", centralize=True)
    assert list(model) == modules
    assert not any(is_centralized(m) for m in model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# Life after conversion


@pytest.mark.parametrize("method", OURS)
def test_a_converted_network_copies_pickles_and_saves(method: str) -> None:
    torch.manual_seed(0)
    model, x = convert(convnet(), method, **own(method)), torch.randn(2, 3, 12, 12)
    for _ in range(3):
        model(x).square().mean().backward()
    fresh = convert(convnet(), method, **own(method))
    fresh.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(eval_output(twin, x), eval_output(model, x))


@pytest.mark.parametrize("method", OURS)
def test_a_plain_checkpoint_loads_strictly_into_a_converted_network(method: str) -> None:
    plain, x = randomize(convnet()), torch.randn(2, 3, 12, 12)
    model = convert(convnet(), method, centralize=False)
    model.load_state_dict(plain.state_dict())
    if METHODS[method].exact_eval:
        difference = eval_output(model, x) - eval_output(plain, x)
        assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_converted_network_trains_at_any_batch_size(method: str, batch: int) -> None:
    torch.manual_seed(0)
    model = convert(convnet(), method, **own(method))
    loss = model(torch.randn(batch, 3, 12, 12)).square().mean()
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("patterns", "unused"), [({"g*": "mabn", "*": "bn"}, "g\\*"), ({"*": "bn", "h*": "gn"}, "h\\*")]
)
def test_a_pattern_that_chooses_nothing_is_told(patterns: dict[str, str], unused: str) -> None:
    net = nn.ModuleDict({"head": nn.BatchNorm1d(4), "body": nn.BatchNorm1d(4)})
    with pytest.warns(NoEffectWarning, match=f"patterns that choose nothing: {unused};"):
        convert(net, patterns)
