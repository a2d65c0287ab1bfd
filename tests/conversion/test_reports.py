"""Conversion tells its user what it did: a log line, warnings, and errors in place of silence."""

import copy
import logging
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch import NoEffectWarning, NormScheduler, convert, plan
from conversion.networks import Tabular, convnet
from zoo.listing import randomize


class Untraceable(nn.Module):
    """A network that depends on its input's values, so that it cannot be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(-y if x.sum() > 0 else y)


def line_of(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [r for r in caplog.records if r.name == "anybatch"]
    return record.getMessage()


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "anybatch"):
        yield caplog


# The line that convert logs


def test_convert_logs_one_line_with_what_it_centralized(info: pytest.LogCaptureFixture) -> None:
    convert(convnet(), "mabn")
    assert line_of(info) == (
        "convert: of 2 norms in a fresh network converted 2 to mabn; weights of 2 layers "
        "centralized. anybatch.plan lists every norm."
    )


def test_the_log_line_names_what_stays_and_what_is_left_to_do(
    info: pytest.LogCaptureFixture,
) -> None:
    convert(Tabular(), "mbn", where="body.*")
    line = line_of(info)
    assert "of 3 norms in a fresh network converted 2 to mbn; 1 kept: left out by where" in line
    assert "step an anybatch.NormScheduler once an epoch" in line


def test_verbose_prints_the_line_and_convert_is_silent_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert(convnet(), "bn")
    assert capsys.readouterr().out == ""
    convert(convnet(), "bn", verbose=True)
    assert capsys.readouterr().out.startswith("convert: of 2 norms in a fresh network converted 2")


def test_a_layer_that_is_kept_says_with_which_options(info: pytest.LogCaptureFixture) -> None:
    model = convert(convnet(), "mabn", window=8)
    info.clear()
    convert(model, "mabn")
    assert "2 kept: already mabn, keeps window=8" in line_of(info)
    assert plan(model, "mabn", window=8).rows[0].reason == "already mabn"


@pytest.mark.parametrize("method", ["gn", "bgn"])
def test_groups_that_do_not_fit_are_said(method: str, info: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm2d(48), nn.BatchNorm2d(64))
    rows = plan(model, method, num_groups=32).rows
    assert "num_groups=24 in place of 32" in rows[0].reason
    assert "num_groups" not in rows[1].reason
    convert(model, method, num_groups=32)
    assert "num_groups reduced to fit the channels of 1 norm" in line_of(info)


def test_a_batch_size_that_a_method_does_not_use_is_said(info: pytest.LogCaptureFixture) -> None:
    assert plan(convnet(), "bn", batch_size=4).notes[1] == "batch_size=4 is not used by bn."
    assert len(plan(convnet(), "mbn", batch_size=4).notes) == 1
    convert(convnet(), "bn", batch_size=4)
    assert "batch_size=4 is not used by bn" in line_of(info)


# Centralization that tracing prevents


@pytest.mark.parametrize("trained", [False, True])
def test_weights_that_only_tracing_keeps_from_being_centralized_are_warned_of(
    trained: bool,
) -> None:
    model = randomize(Untraceable()) if trained else Untraceable()
    with pytest.warns(NoEffectWarning, match="weights before 1 norm were not .*example_inputs="):
        convert(model, "mabn", centralize=True if trained else None)


def test_weights_that_were_not_to_be_centralized_are_not_warned_of() -> None:
    convert(randomize(Untraceable()), "mabn")
    convert(Untraceable(), "mabn", centralize=False)
    convert(Untraceable(), "mabn", example_inputs=torch.randn(2, 3, 8, 8))
    convert(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "mabn")  # nothing there to centralize


# Batch renormalization of a trained network


def trained_step(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model).train()(x)


def test_batch_renorm_of_a_trained_network_corrects_from_the_first_step(
    info: pytest.LogCaptureFixture,
) -> None:
    model, x = randomize(convnet()), torch.randn(4, 3, 12, 12)
    plain = trained_step(model, x)
    convert(model, "brn")
    assert model[1].warmup_steps == 0
    assert not torch.allclose(trained_step(model, x), plain, atol=1e-2)
    assert "brn starts with warmup_steps=0, as the network is trained" in line_of(info)


def test_batch_renorm_of_a_fresh_network_and_a_given_warm_up_stay() -> None:
    assert convert(convnet(), "brn")[1].warmup_steps == 10000
    assert convert(randomize(convnet()), "brn", warmup_steps=50)[1].warmup_steps == 50


def test_batch_renorm_stays_open_in_a_network_that_is_built_fresh_and_loaded() -> None:
    trained, x = convert(randomize(convnet()), "brn"), torch.randn(4, 3, 12, 12)
    again = convert(convnet(), "brn")
    again.load_state_dict(trained.state_dict())
    assert torch.equal(trained_step(again, x), trained_step(trained, x))


def test_batch_renorm_that_loads_a_trained_batch_norm_is_open() -> None:
    plain, x = randomize(convnet()), torch.randn(4, 3, 12, 12)
    loaded = convert(convnet(), "brn")
    loaded.load_state_dict(plain.state_dict())
    opened = trained_step(convert(plain, "brn"), x)
    torch.testing.assert_close(trained_step(loaded, x), opened)


# Methods that a scheduler moves


def test_momentum_batch_norm_without_a_scheduler_warns_once_for_a_network() -> None:
    model = convert(convnet(), "mbn", batch_size=4)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randn(4, 3, 12, 12))
    (warning,) = [w for w in given if issubclass(w.category, NoEffectWarning)]
    assert "anybatch.NormScheduler(model, total_epochs)" in str(warning.message)


def test_momentum_batch_norm_with_a_scheduler_or_in_evaluation_does_not_warn() -> None:
    model, x = convert(convnet(), "mbn"), torch.randn(4, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(x)
        with anybatch.no_update():
            model.train()(x)
        NormScheduler(model, 2)
        model(x)


@pytest.mark.parametrize("build", [convnet, lambda: nn.Linear(2, 2)])
def test_a_scheduler_refuses_a_network_without_layers_to_schedule(build: object) -> None:
    with pytest.raises(ValueError, match="no anybatch layer, so nothing would be scheduled"):
        NormScheduler(build(), 4)  # type: ignore[operator]


def test_a_scheduler_has_nothing_to_do_for_group_norms() -> None:
    scheduler = NormScheduler(convert(convnet(), "gn"), 4)
    scheduler.step()
    assert scheduler.last_epoch == 1


def test_a_scheduler_takes_a_plain_network_that_it_switches() -> None:
    assert isinstance(NormScheduler(convnet(), 4, switch={1: "bn"}).model[1], anybatch.BatchNorm2d)
    with pytest.raises(ValueError, match="nothing would be scheduled"):
        NormScheduler(nn.Linear(2, 2), 4, switch={2: "bn"})


# Names and values


@pytest.mark.parametrize("name", ["MABN", "Mabn"])
def test_method_names_are_taken_in_any_case(name: str) -> None:
    assert plan(convnet(), name).method == "mabn"
    assert plan(convnet(), {"*": name}).method == {"*": "mabn"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("MovingAverageBatchNorm2d", "mabn"),
        ("BatchRenorm", "brn"),
        (anybatch.GhostBatchNorm2d, "ghost"),
        (nn.LayerNorm, "ln"),
        (nn.InstanceNorm2d, "in"),
        (nn.SyncBatchNorm, "sync"),
        ("group normalization", "gn"),
        ("batch_renorm", "brn"),
    ],
)
def test_a_class_name_in_place_of_a_method_names_the_method(given: object, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        convert(convnet(), given)  # type: ignore[arg-type]


def test_a_wrong_value_is_refused_once_and_not_once_per_norm() -> None:
    with pytest.raises(ValueError, match="ghost_size=0") as refusal:
        convert(convnet(), "ghost", ghost_size=0)
    assert str(refusal.value).count("ghost_size") == 1


def test_one_norm_that_cannot_be_converted_is_one_norm() -> None:
    with pytest.raises(ValueError, match="as 1 norm cannot be"):
        convert(nn.Sequential(nn.LazyBatchNorm2d()), "bn")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: convert(model, "bn"),
        lambda model: plan(model, "bn"),
        lambda model: anybatch.fold(model),
        lambda model: anybatch.to_batchnorm(model),
        lambda model: anybatch.decay_plan(model),
        lambda model: anybatch.param_groups(model, 0.1),
        lambda model: NormScheduler(model, 3),
        lambda model: anybatch.diagnose(model, []),
        lambda model: anybatch.recalibrate(model, []),
        lambda model: anybatch.freeze(model),
    ],
)
def test_a_state_dict_is_no_network_and_is_not_printed(call: object) -> None:
    with pytest.raises(TypeError, match="state_dict .* is no network; build the network") as error:
        call(convnet().state_dict())  # type: ignore[operator]
    assert len(str(error.value)) < 200
    with pytest.raises(TypeError, match="the class BatchNorm2d is no network; give an instance"):
        call(nn.BatchNorm2d)  # type: ignore[operator]


@pytest.mark.exhaustive
def test_the_remedy_for_a_wrapped_network_names_where_the_model_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it imports
        compiled, inner = torch.compile(convnet()), convnet()
        inner.compile()
        traced = torch.jit.trace(convnet().eval(), torch.randn(1, 3, 12, 12))
    for wrapped, inside in ((nn.DataParallel(convnet()), "module"), (compiled, "_orig_mod")):
        with pytest.raises(ValueError, match=rf"the model inside it is its \.{inside}\."):
            convert(wrapped, "bn")  # type: ignore[arg-type]
        convert(getattr(wrapped, inside), "bn")
    for given in (inner, traced):
        with pytest.raises(ValueError, match="afterwards.$") as refusal:
            convert(given, "bn")
        assert "inside it" not in str(refusal.value)


def test_a_network_of_other_norms_gets_a_hint() -> None:
    with pytest.warns(NoEffectWarning, match="build the network with torch.nn.BatchNorm"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), "mabn")


@pytest.mark.parametrize(
    "build", [Untraceable, lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))]
)
def test_cbn_refuses_a_network_in_which_no_norm_can_be_bound(build: object) -> None:
    model = build()  # type: ignore[operator]
    with pytest.raises(ValueError, match="none can be bound:\n  "):
        convert(model, "cbn")
    assert not any("anybatch" in type(module).__module__ for module in model.modules())
