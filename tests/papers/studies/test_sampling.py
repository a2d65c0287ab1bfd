"""What sampling estimates and costs: against theory, the layers themselves, and planted facts."""

import copy
import math
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.evaluation.figures import png
from anybatch.layers import sample_positions
from anybatch.tools.classification import batches, evaluate
from anybatch.tools.data import Dataset
from anybatch.tools.run import Run
from anybatch.tools.timing import Quartiles
from anybatch.tools.training import prepare, step
from papers.studies.sampling import figures, times
from papers.studies.sampling.averages import Average, Averages, moving_average_influence
from papers.studies.sampling.errors import METHODS, estimation_errors
from papers.studies.sampling.times import (
    NO_NORM,
    PHASES,
    NormShare,
    PassTime,
    norm_share,
    regularity_and_speed,
)

REAL = [sample for sample in METHODS if sample != "virtual"]


def noise(draws: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(draws, *shape, generator=torch.Generator().manual_seed(seed))


def blobs(examples: int = 128, features: int = 6) -> Dataset:
    x, y = noise(1, examples, features)[0], torch.arange(examples) % 3
    x = x + y[:, None]
    return Dataset("blobs", x, y, x[:32], y[:32], 3)


# --- errors --------------------------------------------------------------------


@pytest.mark.parametrize("sample", METHODS)
def test_errors_of_independent_values_are_those_of_theory(sample: str) -> None:
    inputs = noise(20, 32, 64, 8, 8)
    errors = estimation_errors(nn.BatchNorm2d(64), inputs, sample, ratio=1 / 16)
    n, whole = 2 * 64, 32 * 64
    assert errors.values == (n,)
    # A sample of the batch shares its values with it; virtual examples share none.
    unit = 1 / n + (1 / whole if sample == "virtual" else -1 / whole)
    assert errors.typical("mean") == pytest.approx(math.sqrt(unit), rel=0.1)
    assert errors.typical("var") == pytest.approx(math.sqrt(2 * unit), rel=0.1)


@pytest.mark.parametrize("sample", REAL)
def test_a_sample_of_everything_makes_no_error(sample: str) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    errors = estimation_errors(net, noise(3, 4, 3, 6, 6), sample, ratio=1.0)
    assert errors.values == (4 * 36, 4 * 16)
    assert errors.mean.abs().max() == errors.var.abs().max() == 0


@pytest.mark.parametrize("sample", REAL)
def test_what_is_measured_is_what_the_layer_takes(sample: str) -> None:
    inputs = noise(3, 16, 3, 6, 6) * torch.arange(1, 17).view(1, 16, 1, 1, 1)
    norm = nn.BatchNorm2d(3)
    found = estimation_errors(norm, inputs, sample, ratio=1 / 4, seed=5)
    options = {} if sample == "naive" else {"seed": 5}
    net = nn.Sequential(copy.deepcopy(norm))
    layer = anybatch.convert(net, METHODS[sample], ratio=1 / 4, momentum=1.0, **options)[0]
    (n,) = found.values
    for k, x in enumerate(inputs):
        layer.redraw()
        layer.train()(x)
        values = x.double().transpose(0, 1).flatten(1)
        true_mean, true_var = values.mean(1), values.var(1, correction=0)
        mean = (layer.running_mean - true_mean).norm() / true_var.sum().sqrt()
        var = (layer.running_var * (n - 1) / n - true_var).norm() / true_var.norm()
        assert float(found.mean[k, 0]) == pytest.approx(float(mean), rel=1e-4)
        assert float(found.var[k, 0]) == pytest.approx(float(var), rel=1e-4)


def test_virtual_rows_are_no_part_of_the_truth() -> None:
    inputs = noise(8, 16, 8, 8, 8)
    errors = estimation_errors(nn.BatchNorm2d(8), inputs, "virtual", moments=(3.0, 1.0))
    assert errors.typical("mean") == pytest.approx(3.0, rel=0.05)
    assert errors.values == (64,)


def test_a_planted_correlation_is_found_and_batch_sampling_breaks_it() -> None:
    # Examples of very different size: those at hand decide on the error, in every layer.
    inputs = noise(60, 32, 4, 4, 4) * noise(60, 32, 1, 1, 1, seed=1).exp()
    net = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(4)))
    for way in ("batch", "sample"):
        naive, batch = (
            estimation_errors(net, inputs, sample, ratio=1 / 8, normalize_by=way)
            for sample in ("naive", "batch")
        )
        assert naive.between("var") > 0.95
        assert abs(batch.between("var")) < 0.3
        assert naive.correlation("var").diagonal() == pytest.approx([1.0] * 4)


def test_errors_reach_the_layers_above_only_where_norms_sample() -> None:
    inputs = noise(4, 32, 3, 6, 6)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3))
    found = [
        estimation_errors(net, inputs, "batch", ratio=1 / 16, normalize_by=way)
        for way in ("batch", "sample")
    ]
    assert torch.equal(found[0].mean[:, 0], found[1].mean[:, 0])
    assert not torch.allclose(found[0].mean[:, 1], found[1].mean[:, 1], rtol=1e-3)


def test_the_sampling_study_leaves_the_network_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = copy.deepcopy(net.state_dict())
    errors = estimation_errors(net, noise(2, 8, 3, 6, 6), "feature")
    assert errors.layers == ("1",)
    assert type(net[1]) is nn.BatchNorm2d
    assert not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_sampling_study_refuses_wrong_arguments() -> None:
    norm, inputs = nn.BatchNorm2d(3), noise(2, 4, 3, 2, 2)
    with pytest.raises(ValueError, match="sample='rows'"):
        estimation_errors(norm, inputs, "rows")
    with pytest.raises(ValueError, match="normalize_by='batch'"):
        estimation_errors(norm, inputs, "virtual", normalize_by="batch")
    with pytest.raises(ValueError, match="give two or more"):
        estimation_errors(norm, inputs[:1], "batch")
    with pytest.raises(ValueError, match="has no batch norm"):
        estimation_errors(nn.ReLU(), inputs, "batch")
    with pytest.raises(ValueError, match="momenta="):
        moving_average_influence(Run(), blobs(), momenta=[0.0])


# --- the moving average ----------------------------------------------------------


@pytest.mark.parametrize("method", ["torch", "bs"])
def test_averages_are_those_of_a_training_with_that_weight(method: str) -> None:
    data = blobs()
    run = Run(method=method, batch_size=32, epochs=2, noise=0.0)
    found = moving_average_influence(run, data, momenta=[0.05, 0.3])
    training = prepare(run, data)
    for module in training.model.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 0.3
    for epoch in (1, 2):
        training.model.train()
        for x, y in batches(run, data, epoch):
            step(run, training, x, y)
            training.learning_rate.step()
        if training.progress is not None:
            training.progress.step()
    loss, accuracy = evaluate(run, training.model, data)
    assert found.rows[1].loss == pytest.approx(loss, rel=1e-4)
    assert found.rows[1].accuracy == pytest.approx(accuracy, abs=1e-6)
    some = [x for x, _ in islice(batches(run, data, 3), 16)]
    anybatch.recalibrate(training.model, some, progress=False)
    assert found.loss == pytest.approx(evaluate(run, training.model, data)[0], rel=1e-4)
    assert found.best in found.rows


def test_a_small_weight_is_still_at_the_start_and_a_large_one_is_noise() -> None:
    run = Run(method="bs", batch_size=64, epochs=12, noise=0.0, options=(("ratio", 1 / 8),))
    run = run.but(lr=3e-3)  # weights hardly move: what is left is the noise of the sample
    found = moving_average_influence(run, blobs(256), momenta=[1e-3, 0.15, 1.0])
    late, good, noisy = (row.var_error for row in found.rows)
    assert good < late
    assert good < noisy


# --- time ------------------------------------------------------------------------


def test_redrawn_samples_are_drawn_before_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {}
    place = sample_positions.place

    def note(kind, shape, first, numbers, *rest):
        seen.setdefault(kind, []).append(numbers)
        return place(kind, shape, first, numbers, *rest)

    monkeypatch.setattr(times, "place", note)
    rows = regularity_and_speed((8, 4, 6, 6), rounds=3)
    assert len(rows) == 2 * (1 + 3 * 2)
    assert {row.ratio.middle for row in rows if row.sample == "torch"} == {1.0}
    for numbers in seen.values():
        assert len(numbers) == 3 + 2  # in each round
        assert len(set(numbers)) == 5
    assert all(0 < row.ratio.low <= row.ratio.middle <= row.ratio.high for row in rows)


def test_the_share_is_what_goes_with_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(model, optimizer, x, y):
        norms = sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
        assert norms in (0, 4)
        return {"forward": 4.0 if norms else 1.0, "backward": 3.0, "step": 8.0 if norms else 4.0}

    monkeypatch.setattr(times, "_timed_step", planted)
    run = Run(batch_size=16)
    rows = norm_share({"torch": run, "bs": run.but(method="bs")}, blobs(), rounds=3)
    assert [row.method for row in rows] == [NO_NORM, "torch", "bs"]
    for row in rows[1:]:
        assert row.share["forward"] == (0.75,) * 3
        assert row.share["backward"] == (0.0,) * 3
        assert row.share["step"] == (0.5,) * 3
        assert row.milliseconds["step"] == 8e3


def test_a_step_is_timed_by_phase() -> None:
    (none, row) = norm_share({"gn": Run(method="gn", batch_size=16)}, blobs(), rounds=2)
    for one in (none, row):
        phases = one.milliseconds
        assert 0 < phases["forward"] < phases["step"]
        assert 0 < phases["backward"] < phases["step"]


@pytest.mark.exhaustive
def test_figures_of_the_sampling_study_are_drawn() -> None:
    inputs = noise(3, 8, 3, 6, 6)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    errors = [estimation_errors(net, inputs, sample) for sample in ("batch", "feature")]
    row = Average(0.1, 0.2, 0.3, 1.0, 0.5)
    middle = Quartiles(0.1, 0.2, 0.3)
    times = [PassTime("layer", sample, "static", 1.0, middle) for sample in ("torch", "batch")]
    phases = dict.fromkeys(PHASES, 1.0)
    shares = [NormShare(m, phases, dict.fromkeys(PHASES, middle)) for m in ("none", "bs")]
    for figure in (
        figures.error_figure(errors),
        figures.correlation_figure(errors),
        figures.average_figure([Averages("bs", (row, row), 1.0, 0.5)]),
        figures.regularity_figure(times),
        figures.share_figure({"one": shares, "two": shares}),
    ):
        assert png(figure)[:4] == b"\x89PNG"
