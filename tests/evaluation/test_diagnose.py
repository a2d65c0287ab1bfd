"""Diagnosis: measured noise against theory, the readings, and a network left as it was."""

import copy
import dataclasses
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch import Diagnosis, diagnose, theory
from anybatch.evaluation.batches import recut

# --- measured noise against theory -------------------------------------------------


def gaussian(size: int, *shape: int, batches: int = 200) -> Iterator[Tensor]:
    for _ in range(batches):
        yield 3 + 2 * torch.randn(size, *shape)


def random_slopes(output: Tensor, batch: Tensor) -> Tensor:
    """A loss with independent Gaussian gradients."""
    return (output * torch.randn_like(output)).sum()


@pytest.mark.parametrize(
    ("size", "shape"), [(2, (64,)), (8, (64,)), (64, (64,)), (2, (64, 5, 5)), (1, (64, 3, 3))]
)
@pytest.mark.parametrize("ours", [False, True])
def test_noise_of_independent_gaussian_values_is_that_of_theory(
    size: int, shape: tuple[int, ...], ours: bool
) -> None:
    made = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    if ours:
        made = anybatch.BatchNorm2d if len(shape) == 3 else anybatch.BatchNorm1d
    (layer,) = diagnose(
        made(64), gaussian(size, *shape), loss=random_slopes, max_batches=200
    ).layers
    values = size * math.prod(shape[1:])
    source = theory.noise(values)
    assert layer.values == values
    for spread, expected in ((layer.mean, source.mean_std), (layer.var, source.var_std)):
        assert spread.independent == expected
        assert spread.measured == pytest.approx(expected, rel=0.05)
        assert spread.expected == pytest.approx(expected, rel=0.05)
    assert layer.g.measured == pytest.approx(source.mean_std, rel=0.05)
    assert layer.psi.measured == pytest.approx(source.mean_std, rel=0.05)
    assert layer.forward_values == pytest.approx(values, rel=0.1)
    assert layer.effective == pytest.approx(values, rel=0.1)


@pytest.mark.parametrize("correlation", [0.1, 0.5])
def test_correlated_positions_count_as_fewer(correlation: float) -> None:
    def data() -> Iterator[Tensor]:
        for _ in range(200):
            shared = torch.randn(4, 64, 1, 1) * correlation**0.5
            yield shared + torch.randn(4, 64, 4, 4) * (1 - correlation) ** 0.5

    (layer,) = diagnose(nn.BatchNorm2d(64), data(), max_batches=200).layers
    effective = 4 * theory.effective_values(16, correlation)
    assert layer.values == 64
    assert layer.effective == pytest.approx(effective, rel=0.1)
    assert layer.mean.measured == pytest.approx(theory.noise(effective).mean_std, rel=0.05)
    assert layer.mean.expected == pytest.approx(layer.mean.measured, rel=0.05)
    assert layer.var.expected == pytest.approx(layer.var.measured, rel=0.05)


def test_heavy_tails_make_the_variance_noisier() -> None:
    data = (torch.empty(8, 64).exponential_() for _ in range(300))
    (layer,) = diagnose(nn.BatchNorm1d(64), data, max_batches=300).layers
    expected = theory.noise(8, kurtosis=9.0).var_std
    assert layer.var.measured == pytest.approx(expected, rel=0.08)
    assert layer.var.expected == pytest.approx(expected, rel=0.08)
    assert layer.var.independent == theory.noise(8).var_std


def test_without_a_mean_the_second_moment_is_measured() -> None:
    data = (2 * torch.randn(8, 64) for _ in range(200))
    norm = anybatch.MovingAverageBatchNorm1d(64)
    (layer,) = diagnose(norm, data, loss=random_slopes, max_batches=200).layers
    assert layer.mean is None
    assert layer.g is None
    assert layer.var.independent == pytest.approx(0.5)  # sqrt(2 / 8)
    assert layer.var.measured == pytest.approx(0.5, rel=0.05)
    assert layer.var.expected == pytest.approx(0.5, rel=0.05)
    assert layer.psi.measured == pytest.approx(8**-0.5, rel=0.05)


def test_ghost_groups_are_what_shares_statistics() -> None:
    norm = anybatch.GhostBatchNorm1d(64, ghost_size=4)
    (layer,) = diagnose(norm, gaussian(16, 64, batches=60)).layers
    assert (layer.examples, layer.values) == (4, 4)
    assert layer.mean.measured == pytest.approx(0.5, rel=0.05)


def test_backward_statistics_are_those_of_the_equation() -> None:
    """Equation 5 by hand, through an in-place ReLU and a frozen scale."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Linear(7, 3)
    )
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    model.requires_grad_(False)
    data = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(5)]
    (layer,) = diagnose(model, data).layers
    g, psi, slopes, products = [], [], [], []
    for x, target in data:
        z = model[0](x)
        y = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        y.requires_grad_(True)
        out = model[3]((model[1].weight * y + model[1].bias).relu())
        (dy,) = torch.autograd.grad(nn.functional.cross_entropy(out, target), y)
        g.append(dy.mean(0))
        psi.append((y.detach() * dy).mean(0))
        slopes.append(dy)
        products.append(y.detach() * dy)
    for spread, batch, each in ((layer.g, g, slopes), (layer.psi, psi, products)):
        single = torch.cat(each).var(0, correction=0)
        alive = single > 0
        expected = (torch.stack(batch).var(0)[alive] / single[alive]).mean().sqrt()
        assert spread.measured == pytest.approx(float(expected), rel=1e-4)


# --- readings ------------------------------------------------------------------------


def trained(batch_size: int, epochs: int = 3) -> tuple[nn.Module, Any]:
    """The network of `anybatch compare` after some epochs, and batches of the next."""
    from anybatch.tools import classification, training
    from anybatch.tools.data import load
    from anybatch.tools.run import Run

    run = Run(batch_size=batch_size, epochs=12)
    data = load(run)
    made = training.prepare(run, data)
    for epoch in range(1, epochs + 1):
        training.train_epoch(run, made, data, epoch)
    return made.model, classification.batches(run, data, epochs + 1)


@pytest.mark.exhaustive
def test_the_demo_network_at_batch_2_has_the_problem() -> None:
    found = diagnose(*trained(2))
    assert found.reading.problem == "yes"
    assert found.reading.noisy == ("2", "5", "8", "11")
    assert found.reading.method == "mabn"
    assert 16 <= found.reading.options["window"] <= 32
    assert found.batch_size == 2
    assert "Batch normalization is the problem here, in every norm" in str(found)


def test_the_demo_network_at_batch_64_has_not() -> None:
    found = diagnose(*trained(64))
    assert found.reading.problem == "no"
    assert found.reading.noisy == ()
    assert found.reading.method is None
    assert {found.word(layer) for layer in found.layers} == {"quiet"}
    assert found.eval_loss < found.train_loss  # the input noise of training is in both


def test_the_reading_follows_the_measurement_and_not_the_batch_size() -> None:
    """Batches of 64 copies of 2 examples, and batches of 2 examples of 256 positions."""
    copies = [torch.randn(2, 8).repeat(32, 1) for _ in range(60)]
    assert diagnose(nn.BatchNorm1d(8), copies).reading.problem == "yes"
    wide = [torch.randn(2, 8, 16, 16) for _ in range(60)]
    assert diagnose(nn.BatchNorm2d(8), wide).reading.problem == "no"


@pytest.mark.parametrize(
    ("size", "problem", "method"),
    [(3, "yes", "mabn"), (6, "yes", "mbn"), (11, "perhaps", None), (32, "no", None)],
)
def test_problem_and_method_by_noise(size: int, problem: str, method: str | None) -> None:
    reading = diagnose(nn.BatchNorm1d(64), gaussian(size, 64, batches=100)).reading
    assert (reading.problem, reading.method) == (problem, method)
    if method == "mbn":
        assert reading.options["batch_size"] == 6
        assert reading.options["ideal_batch_size"] == pytest.approx(32, abs=3)
    if method is not None:
        converted = anybatch.convert(nn.Sequential(nn.BatchNorm1d(64)), method, **reading.options)
        assert isinstance(converted[0], anybatch.core.norm_layer.NormLayer)


def test_only_the_noisy_norms_are_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16),
    )  # fmt: skip
    found = diagnose(model, [torch.randn(4, 1, 12, 12) for _ in range(50)])
    assert found.reading.noisy == ("6",)
    assert "where=" in str(found)
    assert "in 1 of 2 norms" in str(found)


class SideBySide(nn.Module):
    """Norms of the same input; one behind another would see what the first has normalized."""

    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x).mean() for head in self.heads]).sum()


@pytest.mark.parametrize(
    ("size", "count", "problem"),
    [(24, 4, "no"), (24, 6, "perhaps"), (24, 16, "yes"), (12, 1, "perhaps"), (120, 16, "no")],
)
def test_the_noise_of_all_norms_adds_up(size: int, count: int, problem: str) -> None:
    model = SideBySide(*(nn.BatchNorm1d(256) for _ in range(count)))
    found = diagnose(model, gaussian(size, 256, batches=40))
    assert found.reading.noisy == ()
    each = [layer.forward_values for layer in found.layers]
    assert found.reading.network_values == pytest.approx(1 / sum(1 / one for one in each))
    assert found.reading.network_values == pytest.approx(size / count, rel=0.15)
    assert found.reading.problem == problem
    assert found.to_dict()["reading"]["network_values"] == found.reading.network_values
    if problem == "yes":
        assert found.reading.method == "mbn"
        assert found.reading.options["ideal_batch_size"] == pytest.approx(8 * count, rel=0.15)
        assert "where=" not in str(found)
        assert "no norm is very noisy alone" in " ".join(str(found).split())


@pytest.mark.parametrize(("positions", "whole"), [(100, False), (3, True)])
def test_other_norms_are_converted_as_well_where_they_are_noisy_together(
    positions: int, whole: bool
) -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(64))
    model = SideBySide(*(nn.BatchNorm1d(64) for _ in range(8)), pooled)
    found = diagnose(model, [torch.randn(4, 64, positions) for _ in range(40)])
    assert found.reading.noisy == ("heads.8.2",)
    assert ("where=" in str(found)) is not whole


def test_norms_that_average_are_read_so() -> None:
    model = nn.Sequential(anybatch.MomentumBatchNorm1d(8), anybatch.BatchRenorm1d(8))
    found = diagnose(model, gaussian(2, 8, batches=40))
    assert {found.word(layer) for layer in found.layers} == {"averaged"}
    assert found.reading.problem == "no"
    assert "averages over steps already" in str(found)


def test_examples_that_are_alike_are_noticed() -> None:
    alike = [torch.randn(1, 32) + 0.3 * torch.randn(64, 32) for _ in range(40)]
    assert "examples of a batch are alike" in str(diagnose(nn.BatchNorm1d(32), alike))
    mixed = list(torch.cat(alike)[torch.randperm(40 * 64)].split(64))
    assert "alike" not in str(diagnose(nn.BatchNorm1d(32), mixed))


def test_stale_running_statistics_are_named() -> None:
    model, batches = trained(64)
    data = list(batches)
    assert diagnose(model, data).reading.stale == ()
    before = diagnose(model, data).eval_loss
    model[5].running_mean += 2 * model[5].running_var.sqrt()
    found = diagnose(model, data)
    assert found.reading.stale == ("5",)
    assert found.eval_loss > before + 0.1
    assert "anybatch.recalibrate" in str(found)
    layer = next(layer for layer in found.layers if layer.name == "5")
    assert layer.stale == pytest.approx(2, abs=0.2)
    assert layer.gap == pytest.approx(layer.stale, abs=0.2)


def test_a_fresh_network_has_no_gap_and_no_loss_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    data = [(torch.randn(16, 4), torch.randint(4, (16,))) for _ in range(4)]
    found = diagnose(model, data)
    assert found.eval_loss is None
    assert found.train_loss is not None
    assert (found.layers[0].gap, found.layers[0].stale) == (None, None)


# --- which norms, which batches --------------------------------------------------------


def test_norms_that_use_no_batch_statistics_are_left_out_with_a_word() -> None:
    model = anybatch.convert(
        nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)), "bn", where="0"
    )
    anybatch.freeze(model)
    model[1].eval()
    model.append(anybatch.BatchGroupNorm1d(4, num_groups=2))
    model.unused = nn.Identity()
    found = diagnose(model, gaussian(8, 4, batches=5))
    assert [layer.name for layer in found.layers] == ["2"]
    assert "0: it uses no statistics of a batch; it is not measured." in found.notes
    assert "1: it uses no statistics of a batch; it is not measured." in found.notes
    assert "3: its channels share statistics; it is not measured." in found.notes


def test_a_network_in_evaluation_mode_is_measured_in_training_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    assert len(diagnose(model, gaussian(8, 4, batches=5)).layers) == 1
    assert not model.training
    assert not model[0].training


def test_batches_are_cut_and_joined() -> None:
    batches = [{"x": torch.arange(k).float(), "other": [k]} for k in (3, 4, 2)]
    cut = list(recut(batches, 4))
    assert [part["x"].tolist() for part in cut] == [[0, 1, 2, 0], [1, 2, 3, 0]]
    assert [len(part["x"]) for part in recut(batches, None)] == [3, 4, 2]
    pairs = [(torch.arange(5), torch.arange(5))]
    assert [tuple(map(len, part)) for part in recut(pairs, 2)] == [(2, 2), (2, 2)]
    with pytest.raises(ValueError, match="batch_size=10: the loader has 9 examples"):
        list(recut(batches, 10))


def test_other_batches_forwards_and_losses() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            out = self.norm(values)
            return {"out": out, "loss": nn.functional.cross_entropy(out, labels)}

    data = [{"values": torch.randn(8, 8), "labels": torch.randint(8, (8,))} for _ in range(6)]
    assert diagnose(Named(), data).layers[0].psi is not None
    pairs = [(batch["labels"], batch["values"]) for batch in data]
    model = nn.Sequential(nn.BatchNorm1d(8))
    found = diagnose(
        model,
        pairs,
        forward=lambda net, batch: net(batch[1]),
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[0]),
    )
    assert found.layers[0].psi is not None
    assert diagnose(model, [batch["values"] for batch in data]).layers[0].psi is None


def test_a_norm_called_twice_and_maps_of_several_sizes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x)[:, :, ::2])

    sizes = (4, 6, 8)
    found = diagnose(Twice(), [torch.randn(3, 4, k, k) for k in sizes], loss=random_slopes)
    mean_positions = sum(k * k + k * k / 2 for k in sizes) / 6
    assert found.layers[0].values == pytest.approx(3 * mean_positions)


def test_no_more_batches_than_asked_for_and_progress() -> None:
    seen: list[tuple[int, int | None]] = []
    endless = iter(lambda: torch.randn(4, 4), None)
    found = diagnose(
        nn.BatchNorm1d(4), endless, max_batches=3, progress=lambda *done: seen.append(done)
    )
    assert found.batches == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


class Checkpointed(nn.Module):
    """Its body is computed again in the backward pass."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


def test_a_recomputed_forward_counts_once() -> None:
    torch.manual_seed(1)
    norms = [nn.BatchNorm1d(8), nn.ReLU(inplace=True), anybatch.BatchNorm1d(8)]
    body = nn.Sequential(nn.Linear(4, 8), *norms, nn.Linear(8, 3))
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(5)]
    plain = diagnose(body, batches).to_dict()["layers"]
    again = diagnose(Checkpointed(body), batches).to_dict()["layers"]
    assert [layer | {"name": ""} for layer in again] == [layer | {"name": ""} for layer in plain]


def test_the_network_inside_a_wrapper_is_measured() -> None:
    batches = list(gaussian(8, 4, batches=3))
    wrapped = nn.DataParallel(nn.Sequential(nn.BatchNorm1d(4)))
    assert [layer.name for layer in diagnose(wrapped, batches).layers] == ["0"]


def test_a_diagnosis_of_few_batches_says_so() -> None:
    assert "Only 3 batches" in str(diagnose(nn.BatchNorm1d(4), gaussian(8, 4, batches=3)))
    assert "Only" not in str(diagnose(nn.BatchNorm1d(4), gaussian(8, 4, batches=20)))


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("made", [anybatch.BatchNorm1d, nn.BatchNorm1d])
def test_one_value_a_channel_has_no_variance_and_no_psi(made: Any, tracks: bool) -> None:
    norm = made(8, track_running_stats=tracks)
    found = diagnose(norm, gaussian(1, 8, batches=20), loss=random_slopes)
    assert "forward" not in vars(norm)
    assert found.layers[0].psi is None
    assert found.layers[0].var.measured == 0
    assert found.reading.problem == "yes"


# --- left as it was ----------------------------------------------------------------------


class Everything(nn.Module):
    """Norms of many kinds, dropout, an in-place ReLU, a hook and a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2),
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
            anybatch.MovingAverageBatchNorm1d(8, window=3, warmup_steps=1),
            nn.Linear(8, 8), anybatch.MomentumBatchNorm1d(8), nn.BatchNorm1d(8, momentum=None),
            nn.Linear(8, 3),
        )  # fmt: skip
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


def prepared() -> nn.Module:
    torch.manual_seed(5)
    model = Everything()
    for _ in range(4):
        model(torch.randn(6, 4)).square().sum().backward()
    model.body[2].register_forward_hook(lambda *_: None)
    model.body[8].eval()
    return model


def everything_of(model: nn.Module) -> dict[str, Any]:
    """All that could have changed; tensors by value."""
    state = {f"state {k}": v.clone() for k, v in model.state_dict().items()}
    state |= {f"grad {k}": p.grad.clone() for k, p in model.named_parameters()}
    state |= {f"grad id {k}": id(p.grad) for k, p in model.named_parameters()}
    state |= {f"flags {k}": p.requires_grad for k, p in model.named_parameters()}
    for name, module in model.named_modules():
        hooks = (len(v) for k, v in module.__dict__.items() if "hooks" in k and v is not None)
        state[f"module {name}"] = (module.training, *hooks, getattr(module, "momentum", None))
        for key, tensor in getattr(module, "method_state", {}).items():
            state[f"memory {name} {key}"] = tensor.clone()
    state["calls"] = model.calls
    state["torch"] = torch.get_rng_state()
    state["python"] = str(random.getstate())
    state["numpy"] = str(np.random.get_state())
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert equal, key


class Broken(RuntimeError):
    """Raised on purpose."""


def data(broken: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(5):
        if broken and step == 3:
            raise Broken
        random.random()
        yield torch.randn(6, 4) + np.random.normal(), torch.randint(3, (6,))


def raising(*_: Any) -> Any:
    raise Broken


def test_diagnose_leaves_the_network_as_it_was() -> None:
    model = prepared()
    before = everything_of(model)
    found = diagnose(model, data())
    assert len(found.layers) == 3
    same(before, everything_of(model))


@pytest.mark.parametrize(
    "arguments",
    [{"loader": "broken"}, {"forward": raising}, {"loss": raising}, {"progress": raising}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_diagnose_leaves_the_network_as_it_was_after_an_error(arguments: dict[str, Any]) -> None:
    model = prepared()
    before = everything_of(model)
    broken = arguments.pop("loader", None) is not None
    with pytest.raises(Broken):
        diagnose(model, data(broken), **arguments)
    same(before, everything_of(model))
    assert anybatch.layers.control.updates.enabled


def test_parameter_hooks_are_not_run() -> None:
    """An optimizer that steps in the backward pass must not step here."""
    model = prepared()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(raising)
    diagnose(model, data())


# --- what it looks like --------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("<b>first</b>", nn.Linear(4, 8))
    model.add_module("<script>norm$</script>", nn.BatchNorm1d(8))
    model.add_module("last", nn.Linear(8, 3))
    batches = [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(20)]
    return diagnose(model, batches)


def test_a_diagnosis_is_available_as_data(found: Diagnosis) -> None:
    made = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert made["reading"]["problem"] == "yes"
    (layer,) = made["layers"]
    assert layer["name"] == "<script>norm$</script>"
    assert layer["reading"] == "noisy"
    assert layer["mean"]["independent"] == 0.5
    assert sum(layer["mean_histogram"]["counts"]) <= layer["mean_histogram"]["total"] == 20 * 8


def test_a_diagnosis_is_printed_as_a_table(found: Diagnosis) -> None:
    lines = str(found).splitlines()
    assert lines[0].split()[:5] == ["norm", "acts", "as", "mean", "var"]
    assert lines[2].endswith("noisy")
    assert max(map(len, lines)) <= 80
    name = "backbone.features.block." * 3 + "norm"
    long = dataclasses.replace(found.layers[0], name=name, gap=2.0)
    lines = str(dataclasses.replace(found, layers=(long,))).splitlines()
    assert max(map(len, lines)) <= 80
    column = "".join(line.partition(" ")[0] for line in lines[2 : lines.index("")])
    assert column == name  # wrapped, not cut


@pytest.mark.few(1)
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_diagnosis_is_drawn_as_an_image(found: Diagnosis, tmp_path: Path, ending: str) -> None:
    path = found.plot(tmp_path / f"noise.{ending}")
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if ending == "png" else b"<?xml" in start


def test_a_diagnosis_is_written_as_a_page(found: Diagnosis, tmp_path: Path) -> None:
    text = found.report(str(tmp_path / "page.html")).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;norm$&lt;/script&gt;" in text
    assert "http://" not in text
    assert "https://" not in text
    assert 'src="data:image/png;base64,' in text


def test_pictures_of_a_norm_without_a_mean_and_of_many(tmp_path: Path) -> None:
    norms = [anybatch.MovingAverageBatchNorm1d(4) for _ in range(30)]
    made = diagnose(nn.Sequential(*norms), gaussian(4, 4, batches=4))
    assert made.plot(tmp_path / "many.png").stat().st_size > 1000


@pytest.mark.parametrize("package", ["matplotlib.figure", "jinja2"])
def test_without_the_extra_the_error_says_which(
    found: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'anybatch\[tools\]'"):
        found.report(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_dead_channels_are_counted_and_left_out() -> None:
    data = [torch.cat([torch.randn(16, 3), torch.ones(16, 1)], 1) for _ in range(10)]
    (layer,) = diagnose(nn.BatchNorm1d(4), data).layers
    assert layer.dead == 1
    assert layer.mean.measured == pytest.approx(0.25, rel=0.4)
    made = diagnose(nn.BatchNorm1d(1), [torch.ones(4, 1)] * 3)
    assert made.word(made.layers[0]) == "dead"
    json.dumps(made.to_dict(), allow_nan=False)


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: diagnose("x", []), TypeError, "model='x': give a torch.nn.Module"),
        (lambda: diagnose(nn.LayerNorm(3), []), ValueError, "LayerNorm has no batch norm"),
        (lambda: diagnose(nn.BatchNorm1d(3), []), ValueError, "gave no batch"),
        (lambda: diagnose(nn.BatchNorm1d(3), torch.randn(8, 3)), TypeError, "is one batch; give"),
        (
            lambda: diagnose(nn.BatchNorm1d(3), torch.ones(8, 3), batch_size=2),
            TypeError,
            "one batch",
        ),
        (
            lambda: diagnose(nn.BatchNorm1d(3), {"x": 1}),
            TypeError,
            "a dict of 1 entry is one batch",
        ),
        (
            lambda: diagnose(nn.BatchNorm1d(3), "digits"),
            TypeError,
            "loader='digits': give something",
        ),
        (lambda: diagnose(nn.BatchNorm1d(3), [torch.randn(4, 3)]), ValueError, "1 batch of its"),
        (lambda: diagnose(nn.LazyBatchNorm1d(), []), ValueError, "run one batch through it"),
        (
            lambda: diagnose(nn.BatchNorm1d(3), [], batch_size=0),
            ValueError,
            "batch_size=0: give a whole number from 1 on",
        ),
        (
            lambda: diagnose(nn.BatchNorm1d(3), [], max_batches=2.5),
            TypeError,
            "max_batches=2.5: give a whole number",
        ),
        (
            lambda: diagnose(nn.BatchNorm1d(3), gaussian(4, 3), loss=lambda *_: 3.0),
            TypeError,
            "loss: it gave 3.0",
        ),
        (lambda: diagnose(nn.BatchNorm1d(3), ["x"]), TypeError, "loader gave a batch of type str"),
        (lambda: diagnose(nn.BatchNorm1d(3), ["x"], batch_size=2), ValueError, "holds no examples"),
    ],
)
def test_errors_of_diagnose_name_the_argument_and_the_remedy(call, error, words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)


def test_a_copy_measures_the_same() -> None:
    model = prepared()
    twin = copy.deepcopy(model)
    batches = list(data())
    assert diagnose(model, batches).to_dict() == diagnose(twin, batches).to_dict()


@pytest.mark.parametrize("ran", [False, True])
def test_a_diagnosis_leaves_all_memories_alone(ran: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    anybatch.convert(model, "mabn", norm_batch_size=2, memories=2)
    loader = [torch.randn(4, 3, 6, 6) for _ in range(6)]
    for x in loader[: 3 * ran]:
        model(x).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    anybatch.diagnose(model, loader)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


class TwoFaced(nn.Module):
    """Losses in training and predictions in evaluation, as torchvision's detectors give them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return {"loss": y.square().mean()} if self.training else [y]


def test_a_loss_that_training_alone_gives() -> None:
    model, batches = TwoFaced(), [(torch.randn(2, 3, 8, 8),) for _ in range(3)]
    model(*batches[0])  # it is not fresh
    found = diagnose(model, batches, forward=lambda m, b: m(*b), loss=lambda o, b: o["loss"])
    assert found.train_loss is not None
    assert found.eval_loss is None
    assert any("cannot be taken of what the model gives in evaluation" in n for n in found.notes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_not_finite_are_named(value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(6)]
    batches[3][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="the input of 1 is not finite on these data"):
        diagnose(model, batches)


@pytest.mark.parametrize("method", ["ns", "bs", "fs", "points"])
def test_statistics_of_a_sample_are_not_measured_as_those_of_the_batch(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    anybatch.convert(model, method, where="1")
    data = [torch.randn(8, 3, 6, 6) for _ in range(8)]
    found = diagnose(model, data)
    assert [layer.name for layer in found.layers] == ["2"]
    assert any("1: its statistics are those of a sample" in note for note in found.notes)
    with pytest.raises(ValueError, match="those of a sample"):
        diagnose(anybatch.convert(nn.Sequential(nn.BatchNorm2d(3)), method), data)


@pytest.mark.parametrize("method", ["l1", "range"])
def test_running_statistics_that_are_no_variances_have_no_gap(method: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(8, momentum=0.5))
    anybatch.convert(model, method)
    data = [torch.randn(32, 8, 6, 6) for _ in range(20)]
    for x in data:
        model(x)
    found = diagnose(model, data)
    assert found.layers[0].gap is None
    assert "stale" not in str(found)
