"""Costs, and statistics along a training: each number against a case known in closed form."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import anybatch
from anybatch.tools.bench import Bench, Variant, costs
from anybatch.tools.processes import OnProgress, Work
from anybatch.tools.training import train
from papers.cli import app
from papers.networks.pyramid import Pyramid
from papers.reproduction import noise_figures
from papers.reproduction import pages as reproduced_pages
from papers.reproduction import readings as measured
from papers.reproduction import results as reproduced
from papers.reproduction import spec as reproduction
from papers.reproduction.costs import held_bytes
from papers.reproduction.make import estimate
from papers.reproduction.operations import count_flops
from papers.reproduction.readings import distance, law, of_costs, of_noise
from papers.reproduction.recording import Recorder
from papers.reproduction.runs import CostRun, RecordedRun, described, job_of
from papers.reproduction.spec import chosen, read, reproductions, tasks
from papers.reproduction.store import Store

# --- operations -------------------------------------------------------------------------


def test_operations_of_a_network_counted_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    values = 2 * 4 * 6 * 6
    conv = 2 * 3 * 3 * 3 * values
    assert count_flops(lambda: net(x)) == conv + 6 * values + values
    net.eval()
    assert count_flops(lambda: net(x)) == conv + 2 * values + values
    with torch.no_grad():
        assert count_flops(lambda: net(x)) == conv + 2 * values + values


def test_operations_of_a_backward_pass() -> None:
    norm = nn.BatchNorm1d(4)
    x = torch.randn(8, 4, requires_grad=True)
    y, slope = norm(x), torch.ones(8, 4)
    assert count_flops(lambda: y.backward(slope)) == (4 + 4) * 32
    constant = norm.requires_grad_()(x.detach())  # only scale and shift learn, a sum more each
    assert count_flops(lambda: constant.backward(slope)) == 4 * 32 + 2 * 4
    weight = torch.ones(4, 3, requires_grad=True)
    out = x.detach() @ weight
    assert count_flops(lambda: out.backward(torch.ones(8, 3))) == 2 * 8 * 4 * 3


def test_what_moves_data_is_no_operation() -> None:
    x = torch.randn(4, 6)
    assert count_flops(lambda: torch.cat([x, x]).t().contiguous().reshape(-1)[3:].clone()) == 0
    assert count_flops(lambda: torch.arange(5) + 1) == 0  # whole numbers
    assert count_flops(lambda: x.mean(0)) == 24


def test_compiled_kernels_step_aside_to_be_counted() -> None:
    x = torch.randn(2, 4, 5, 5)
    plain, ours = nn.BatchNorm2d(4), anybatch.BatchNorm2d(4)
    ours(x)
    there = count_flops(lambda: ours(x))
    assert abs(there - count_flops(lambda: plain(x))) < 0.2 * 6 * x.numel()


# --- costs ------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def ask(question: str, **variants: Variant) -> dict[str, float]:
    """Amounts of one question."""
    bench = Bench(
        "net", network, ((2, 3, 8, 8),), rounds=2, block_seconds=0.0, questions=(question,)
    )
    found = costs(bench, variants)
    assert found.failed == {}
    return {row.name: row.value for row in found.rows}


def test_memory_is_what_is_held_and_the_most_of_a_step() -> None:
    memory, peak = ask("memory", bn=Variant("bn")), ask("peak", bn=Variant("bn"))
    floats = 4 * 27 + 2 * 4  # parameters, and as many of the optimizer's momentum
    held = 4 * (2 * floats + 2 * 4) + 8  # running statistics, and a counter
    for name in ("torch", "bn"):
        assert 1e6 * (memory[name] - peak[name]) == pytest.approx(held, abs=20)
    x = torch.ones(10)
    assert held_bytes([x, x[1:], torch.ones(2)]) == 48


def test_memory_of_methods_that_remember() -> None:
    window = 8
    mabn = Variant("mabn", (("window", window),))
    found, peak = ask("memory", mabn=mabn), ask("peak", mabn=mabn)
    more = 1e6 * (found["mabn"] - peak["mabn"] - found["torch"] + peak["torch"])
    assert more >= 2 * window * 4 * 4  # two windows of four channels


@pytest.mark.exhaustive
def test_inference_is_folded_where_it_can_be() -> None:
    variants = {"bn": Variant("bn"), "gn": Variant("gn", (("num_groups", 2),))}
    found = ask("folded flops", **variants)
    values = 2 * 4 * 6 * 6
    conv = 2 * 27 * values
    assert found["torch"] == found["bn"] == pytest.approx((conv + values) / 1e6, rel=1e-3)
    assert found["gn"] == pytest.approx((conv + 7 * values) / 1e6, rel=1e-3)
    assert set(ask("folded", **variants)) == {"torch", "bn", "gn"}
    assert set(ask("flops", **variants)) == {"torch", "bn", "gn"}


def test_ratios_and_speeds_of_a_row() -> None:
    methods = (("BN", "torch", ()), ("GN", "gn", ()))
    run = CostRun("mlp", (64,), 4, methods, ("step", "memory"))
    step = {"question": "step", "unit": "ms", "value": 50.0}
    result = {
        "costs": [
            {**step, "name": "BN", "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0},
            {**step, "name": "GN", "ratio": 2.0, "ratio_low": 1.6, "ratio_high": 2.5},
        ]
    }
    base = of_costs(result, run, "BN", "training speed")
    assert base == (1.0, "1 = 20 /s")
    assert of_costs(result, run, "GN", "training speed") == (0.5, "0.50 (0.40 to 0.62)")
    assert of_costs(result, run, "GN", "memory") is None


def test_a_pyramid_has_four_maps_and_norms_that_are_fed() -> None:
    net = Pyramid("resnet18", (2, 2, 2, 2), (64, 128, 256, 512), 8)
    x = torch.randn(1, 3, 64, 64)
    assert [tuple(y.shape) for y in net(x)] == [(1, 8, s, s) for s in (16, 8, 4, 2)]
    converted = anybatch.convert(net, "cbn", batch_size=1)
    assert sum(isinstance(m, anybatch.CrossIterationBatchNorm2d) for m in converted.modules()) == 28


# --- statistics along a training -------------------------------------------------------------


def recorded(**settings: object) -> RecordedRun:
    usual = {"method": "bn", "batch_size": 6, "norm_batch_size": 2, "epochs": 2, "window": 4}
    return RecordedRun(**{**usual, **settings})


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_are_those_of_their_definitions(affine: bool) -> None:
    """Five statistics of three parts of a batch, over several steps, by hand."""
    torch.manual_seed(0)
    norm = anybatch.BatchNorm1d(3, affine=affine, norm_batch_size=2)
    if affine:
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.uniform_(norm.bias, -1, 1)
    net = nn.Sequential(norm)
    recorder = Recorder(recorded(every=2), net, steps=3)
    kept: dict[str, list[Tensor]] = {name: [] for name in measured.STATISTICS}
    for step in range(6):
        x, goal = torch.randn(6, 3), torch.randn(6, 3)
        net(x.clone().requires_grad_()).sub(goal).square().sum(1).mean().backward()
        before = {name: list(parts) for name, parts in kept.items()}
        parts = by_hand(x, goal, norm)
        for name, table in parts.items():
            kept[name].extend(table)
        if step % 2:
            continue
        noted = {name: values[step // 2] for name, values in recorder.series().items()}
        assert noted["step"] == step + 1
        variance = x.double().var(0, correction=0)
        for name, table in parts.items():
            whole = variance if name == "variance" else table.mean(0)
            average = torch.stack([*before[name][-3:], table[0]]).mean(0)
            vectors = {"batch": table[0], "whole": whole, "average": average}
            for which, vector in vectors.items():
                expected = float(vector.norm())
                assert noted[f"{name}, {which}"] == pytest.approx(expected, rel=2e-3), name
                error = float((vector - whole).norm())
                if which != "whole":
                    there = noted[f"{name}, error of {which}"]
                    assert there == pytest.approx(error, rel=2e-3, abs=1e-5), name


def by_hand(x: Tensor, goal: Tensor, norm: nn.Module) -> dict[str, Tensor]:
    """Statistics of each pair of examples, in float64, one after another."""
    rows: dict[str, list[Tensor]] = {name: [] for name in measured.STATISTICS}
    weight = 1.0 if norm.weight is None else norm.weight.detach().double()
    bias = 0.0 if norm.bias is None else norm.bias.detach().double()
    for pair, wanted in zip(x.double().split(2), goal.double().split(2), strict=True):
        mean, variance = pair.mean(0), pair.var(0, correction=0)
        y = ((pair - mean) / (variance + norm.eps).sqrt()).requires_grad_()
        slopes = torch.autograd.grad((y * weight + bias - wanted).square().sum(), y)[0]
        rows["mean"].append(mean)
        rows["variance"].append(variance)
        rows["second moment"].append(pair.square().mean(0))
        rows["g"].append(slopes.mean(0))
        rows["Psi"].append((slopes * y.detach()).mean(0))
    return {name: torch.stack(values) for name, values in rows.items()}


def test_what_stands_for_all_can_be_a_part_of_the_batch() -> None:
    norm = anybatch.BatchNorm1d(2, norm_batch_size=2)
    recorder = Recorder(recorded(reference=4), nn.Sequential(norm), steps=1)
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [7.0, 0.0], [900.0, 5.0], [0.0, 9.0]])
    norm(x)
    noted = recorder.series()
    assert noted["mean, batch"] == [2.0]
    assert noted["mean, whole"] == [4.0]
    assert noted["mean, error of batch"] == [2.0]
    assert noted["variance, whole"] == [5.0]  # of 1, 3, 5 and 7
    norm.eval()
    norm(x)
    assert recorder.series() == noted  # inference is no step


def test_one_channel_from_an_epoch_on() -> None:
    norm = nn.BatchNorm2d(2)
    run = recorded(keeps="channel", channel=1, first_epoch=2, norm_batch_size=None)
    recorder = Recorder(run, nn.Sequential(norm), steps=2)
    for k in range(4):
        norm(torch.full((6, 2, 3, 3), float(k)))
    assert recorder.series() == {"step": [3.0, 4.0], "mean": [2.0, 3.0], "variance": [0.0, 0.0]}


def test_the_noise_of_independent_values_is_the_theorys() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = 3 + 2 * torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    series = {"mean": batches.mean(1).tolist(), "variance": batches.var(1, correction=0).tolist()}
    run = recorded(keeps="channel")
    shrunk = math.sqrt(16 / 15)  # variances are biased by 15 / 16

    def number(measure: str) -> float:
        return of_noise({"series": series}, run, measure).value

    assert number("spread of mean") == pytest.approx(shrunk / 4, rel=0.03)
    assert number("spread of variance") == pytest.approx(math.sqrt(2 / 15), rel=0.03)
    assert number("values of mean") == pytest.approx(15, rel=0.06)
    assert number("values of variance") == pytest.approx(15, rel=0.06)
    for statistic in ("mean", "variance"):
        assert number(f"distance of {statistic}") < 1.36 / math.sqrt(4000)
    swapped = {"mean": series["variance"], "variance": series["mean"]}
    found = of_noise({"series": swapped}, run, "distance of mean")
    assert found.value > 0.04  # variances of 16 are no Gaussian


def test_laws_are_the_ones_of_tables() -> None:
    exponential = torch.tensor([2.0 - 1.0, 2.0 + 1.0], dtype=torch.float64) * 2  # mean 4, std 2
    at = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    shape = 4.0  # mean^2 / variance: an Erlang distribution
    rate = at * 1.0
    erlang = 1 - torch.exp(-rate) * sum(rate**k / math.factorial(k) for k in range(4))
    assert shape == float(exponential.mean() ** 2 / exponential.var(correction=0))
    torch.testing.assert_close(law(at, exponential, True), erlang)
    assert float(law(torch.tensor(6.0).double(), exponential, False)) == pytest.approx(
        0.8413, abs=1e-4
    )
    assert distance([0.0] * 50 + [1.0] * 50, squares=False) == pytest.approx(0.341, abs=1e-3)


def test_errors_of_batches_and_averages() -> None:
    series = {
        "g, whole": [1.0, 3.0],
        "g, error of batch": [4.0, 2.0],
        "g, error of average": [1.0, 1.0],
    }
    run = recorded()
    assert of_noise({"series": series}, run, "error of g") == (1.5, "1.50")
    assert of_noise({"series": series}, run, "average's error of g") == (0.5, "0.50")


def test_a_training_that_was_stopped_records_as_if_it_had_not(tmp_path: Path) -> None:
    run = RecordedRun(
        method="mabn", batch_size=32, norm_batch_size=2, epochs=2, train_size=128, norm=1,
        every=3, options=(("window", 4),),
    )  # fmt: skip
    whole = train(run, tmp_path / "whole", observe=Recorder)

    def stop(epochs: int, row: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "stopped", stop, observe=Recorder)
    again = train(run, tmp_path / "stopped", observe=Recorder)
    assert again["series"] == whole["series"]
    assert whole["series"]["step"] == [1.0, 4.0, 7.0]
    assert train(run, tmp_path / "stopped")["series"] == whole["series"]  # as it was stored
    plain = job_of({k: v for k, v in run.as_dict().items() if k in vars(anybatch_run())})
    assert train(plain, tmp_path / "plain")["accuracy"] == whole["accuracy"]  # noting changes none


def anybatch_run() -> object:
    from papers.paper_run import PaperRun

    return PaperRun()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keeps": "all"}, "keeps='all': give one of channel, norms"),
        ({"every": 0}, "every=0: give a whole number from 1 on"),
        ({"norm": -1}, "norm=-1: give a whole number from 0 on"),
        ({"first_epoch": 3}, "first_epoch=3: give 1 to epochs=2"),
        ({"reference": 3}, "reference=3: give a multiple of 2"),
        ({"reference": 8}, "reference=8: .*up to batch_size=6"),
        ({"norm_batch_size": None, "accumulate": 2}, "accumulate=2"),
    ],
)
def test_what_cannot_be_recorded(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recorded(**settings)


def test_a_norm_that_there_is_not() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="norm=1: give 0 to 0"):
        Recorder(recorded(norm=1), net, 1)
    with pytest.raises(ValueError, match="channel=3: give 0 to 2"):
        Recorder(recorded(channel=3), net, 1)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ((("BN", "bn", ()),), "the first is what others are compared with, torch"),
        ((("BN", "torch", ()), ("BN", "bn", ())), "give each label once"),
        ((("BN", "torch", ()), ("again", "torch", ())), "'again' is torch's batch norm once more"),
        ((("BN", "torch", ()), ("x", "none", ())), "none"),
    ],
)
def test_methods_that_cannot_be_compared(methods: tuple, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        CostRun("mlp", (64,), 4, methods, ("step",))


def test_settings_come_back_as_what_they_were() -> None:
    methods = (("BN", "torch", ()), ("GN", "gn", (("num_groups", 4),)))
    every = (recorded(), CostRun("mlp", (64,), 4, methods, ("step",)), anybatch_run())
    for run in every:
        settings = json.loads(json.dumps(run.as_dict()))
        settings.pop("device")
        assert job_of(settings) == run
        assert job_of(settings).but(device="cuda").identity == run.identity
        assert run.but(seed=1).identity != run.identity
        assert described(run)
    assert len({run.identity for run in every}) == 3
    with pytest.raises(ValueError, match="speed=1: give only"):
        job_of({"methods": [], "speed": 1})


# --- as reproductions ---------------------------------------------------------------------------

COSTS = {
    "paper": "costs",
    "source": "Table 1",
    "title": "Costs",
    "claim": "MABN is slower.",
    "unit": "ratio",
    "down": "method",
    "across": "what it costs",
    "figure": "ratios",
    "rows": [
        {"label": "BN", "run": {"method": "torch"}},
        {"label": "MABN", "run": {"method": "mabn", "options": {"window": 4}}},
    ],
    "columns": [
        {"label": "memory", "measure": "memory"},
        {"label": "speed", "measure": "training speed"},
    ],
    "paper_numbers": {"BN": {"memory": 50.0}, "MABN": {"memory": 55.0}},
    "sizes": {
        size: {
            "run": {
                "model": "mlp", "example": [64], "batch_size": 4, "rounds": 3, "block_seconds": 0,
            },
            "seeds": 1,
            "text": "Small.",
        }
        for size in ("small", "paper")
    },
}  # fmt: skip
NOISE = {
    "paper": "noise",
    "source": "Figure 1",
    "title": "Noise",
    "claim": "It jumps.",
    "unit": "noise",
    "down": "statistic",
    "across": "its error",
    "figure": "series",
    "rows": [{"label": "mean", "measure": "mean"}, {"label": "Psi", "measure": "Psi"}],
    "columns": [
        {"label": "batch of 2", "measure": "error"},
        {"label": "average", "measure": "average's error"},
    ],
    "sizes": {
        size: {
            "run": {
                "method": "bn", "batch_size": 32, "norm_batch_size": 2, "epochs": 1,
                "train_size": 320,
            },
            "seeds": 1,
            "text": "Digits.",
        }
        for size in ("small", "paper")
    },
}  # fmt: skip
CHANNEL = {
    **NOISE,
    "figure": "noise",
    "rows": [{"label": "mean", "measure": "mean"}, {"label": "variance", "measure": "variance"}],
    "columns": [
        {"label": "noise", "measure": "spread"},
        {"label": "values", "measure": "values"},
        {"label": "distance", "measure": "distance"},
    ],
    "sizes": {
        size: {
            "run": {
                "method": "bn", "batch_size": 16, "epochs": 1, "keeps": "channel",
                "train_size": 320,
            },
            "seeds": 1,
            "text": "Digits.",
        }
        for size in ("small", "paper")
    },
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Small measurements in the place of the papers', made in this process."""
    folder = tmp_path / "reproductions"
    folder.mkdir()
    for name, data in (("costs", COSTS), ("noise", NOISE), ("channel", CHANNEL)):
        (folder / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(reproduction, "FOLDER", folder)
    monkeypatch.setattr("papers.reproduction.make.in_processes", in_this_process)
    reproductions.cache_clear()
    yield tmp_path
    reproductions.cache_clear()


def in_this_process(
    runs: list, folder: Path, workers: int, on_progress: OnProgress, work: Work
) -> None:
    assert workers == 1 or not any(isinstance(run, CostRun) for run in runs)
    for one in runs:
        on_progress(one.key, 0, work(one, folder, lambda *_: None))


def reproduce(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.exhaustive
def test_measurements_are_made_once_stored_drawn_and_traced(tiny: Path) -> None:
    store, docs = tiny / "store", tiny / "docs"
    names = ("costs", "noise", "channel", "--store", str(store), "--workers", "2")
    reproduce(*names)
    rows = Store(store / "results.jsonl").rows()
    assert len(rows) == 3
    assert reproduced.checked(rows.values()) == rows
    made = {name: (store / f"{name}-small.png").stat().st_size for name in ("costs", "noise")}
    assert all(made.values())
    reproduce(*names)  # nothing is made again
    assert Store(store / "results.jsonl").rows() == rows
    assert '"done": 1' in reproduce("costs", "--list", "--json", "--store", str(store))
    docs.mkdir()
    (docs / "x.md").write_text("<!-- reproduced: costs small -->\n<!-- reproduced: end -->\n")
    reproduce("--draw", "--docs", str(docs), "--store", str(store))
    page = (docs / "results/reproductions.md").read_text()
    assert "Columns: what it costs." in page
    assert "| MABN | 1." in (docs / "x.md").read_text()
    assert "| 1.1 |" in (docs / "x.md").read_text()  # the paper's 55 of 50
    assert all(path.read_text() == text for path, text in reproduced_pages.pages(docs).items())
    stored = docs / "results" / "costs-small.jsonl"
    text = stored.read_text()
    changed = text.replace('"ratio": 1.', '"ratio": 7.')
    assert changed != text
    stored.write_text(changed)
    assert any(path.read_text() != text for path, text in reproduced_pages.pages(docs).items())
    stored.write_text(text.replace('"batch_size": 4', '"batch_size": 5'))
    with pytest.raises(ValueError, match="not those it is of"):
        reproduced_pages.pages(docs)
    data = json.loads((store / "report.json").read_text())
    assert {cell["paper"] for cell in data[0]["cells"]} >= {1.0, 1.1} or len(data) == 3


def test_what_would_be_measured_is_listed(tiny: Path) -> None:
    store = str(tiny / "none")
    shown = json.loads(reproduce("costs", "noise", "--dry-run", "--json", "--store", store))
    assert {line["name"] for line in shown} == {"costs", "noise", "channel"}  # of the paper "noise"
    assert "3 rounds" in " ".join(reproduce("costs", "--dry-run", "--store", store).split())
    task = tasks(chosen(["costs"]), "small")[0]
    row = {
        "settings": {k: v for k, v in task.run.as_dict().items() if k != "device"},
        "made_with": {"device": "cpu"},
        "seconds": 12.0,
    }
    assert estimate(task, {"x": row}, "cpu") == pytest.approx(12.0)
    assert estimate(task, {}, "cpu") > 0


def test_a_method_that_fails_is_told_and_the_others_are_there(tiny: Path) -> None:
    one = read("costs", COSTS)
    cell = one.sizes["small"].cells[2]
    assert (cell.row, cell.column) == ("MABN", "memory")
    result = {"costs": [], "failed": {"MABN": "no"}}
    row = {"id": cell.run.identity, "seed": 0, "result": result}
    assert reproduced.value(cell, "ratio", 1, {row["id"]: row}) is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**COSTS, "columns": [{"label": "x", "measure": "price"}]}, "measure='price'"),
        ({**NOISE, "columns": [{"label": "x", "measure": "last"}]}, "measure='last'"),
        ({**NOISE, "rows": [{"label": "x", "measure": "median"}]}, "measure='median'"),
        (
            {**COSTS, "rows": [{"label": "BN", "run": {"method": "torch", "lr": 1.0}}]},
            "a method has costs here, and options",
        ),
    ],
)
def test_a_wrong_file_of_readings_is_named(data: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read("wrong", data)


def test_images_of_nothing_are_none() -> None:
    from papers.reproduction.figures import draw

    for data in (COSTS, NOISE, CHANNEL):
        one = read("x", data)
        assert draw(one, one.sizes["small"], {}) is None
    assert noise_figures._BINS > 0
