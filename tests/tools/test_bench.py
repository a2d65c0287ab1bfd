"""Benchmarks time, count and draw what they say; `anybatch bench` as a person meets it."""

import csv
import html.parser
import importlib
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import anybatch
from anybatch.cli import app
from anybatch.tools import measurement_figures
from anybatch.tools.bench import Bench, Variant, costs
from anybatch.tools.measurements import Measurement, Setting, counted, surroundings, timed
from anybatch.tools.memory import kept_bytes, peak_bytes, tensors_of
from anybatch.tools.network_factory import factory
from anybatch.tools.timing import WARM_UP, interleaved, summaries
from benchmarks.measurement_files import as_table, mean_ratio, read_csv, write_csv

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))

class Broken(nn.Module):
    def __init__(self):
        raise OSError("no weights here")

def number():
    return 3

def plain():
    return nn.Conv2d(3, 4, 3)

def two():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
        def forward(self, x, y):
            return {"out": [self.norm(x) * y], "name": "two"}
    return Two()
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with networks of a user's own."""
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(NETWORK)
    return path


# --- timing -------------------------------------------------------------------------


def test_calls_have_their_turns_round_by_round() -> None:
    made: list[str] = []
    calls = {name: (lambda name=name: made.append(name)) for name in ("one", "two", "three")}
    done: list[int] = []
    times = interleaved(calls, 6, on_round=done.append)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(calls, 6)
    assert done == [1, 2, 3, 4, 5, 6]
    rounds = made[WARM_UP * len(calls) :]
    turns = [tuple(rounds[k : k + 3]) for k in range(0, len(rounds), 3)]
    assert all(set(turn) == set(calls) for turn in turns)
    assert len(set(turns)) > 1  # not always in the same order


def test_a_block_is_as_long_as_asked_for() -> None:
    ticks = iter(range(10_000))
    made: list[int] = []
    calls = {"one": lambda: made.append(0)}
    # A clock that moves by one second a reading: a block of one reading each takes a second.
    times = interleaved(calls, 2, block_seconds=4.0, clock=lambda: float(next(ticks)))
    steps = int(4.0 / (1.0 / WARM_UP))
    assert len(made) == 2 * WARM_UP + 2 * steps
    assert times["one"] == [1.0 / steps] * 2


def test_ratios_are_by_round() -> None:
    times = {"old": [1.0, 10.0, 1.0], "new": [2.0, 20.0, 1.0]}
    found = summaries(times, "old")
    assert (found["old"].ratio, found["old"].low, found["old"].high) == (1.0, 1.0, 1.0)
    assert found["new"].ratio == 2.0  # that of the medians would be 2, too: 2 / 1
    assert summaries({"old": [1.0, 9.0, 9.0], "new": [2.0, 9.0, 1.0]}, "old")["new"].ratio == 1.0
    with pytest.raises(ValueError, match="rounds=0: give a whole number from 1 on"):
        interleaved({}, 0)


# --- memory -------------------------------------------------------------------------


def test_what_a_layer_keeps_is_its_input_and_vectors() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    norm, ours = nn.BatchNorm2d(3), anybatch.BatchNorm2d(3)
    theirs = kept_bytes(lambda: norm(x), tensors_of(norm))
    assert x.nbytes <= kept_bytes(lambda: ours(x), tensors_of(ours)) <= theirs
    assert theirs == x.nbytes + 2 * 3 * 4  # mean and deviation
    assert kept_bytes(lambda: x * 2.0) == 0
    assert kept_bytes(lambda: x[0] * x[1]) == x.nbytes  # two views of one storage


def test_the_most_memory_is_counted_while_it_is_held() -> None:
    assert peak_bytes(lambda: torch.empty(1000)) == 4000
    assert peak_bytes(lambda: [torch.empty(1000) for _ in range(3)]) == 12_000

    def one_after_another() -> None:
        for _ in range(3):
            torch.empty(1000)

    assert peak_bytes(one_after_another) == 4000
    assert peak_bytes(lambda: None, "meta") is None


# --- rows -------------------------------------------------------------------------------


def some_rows() -> list[Measurement]:
    times = {"nn.BatchNorm2d": [1e-3, 2e-3, 3e-3], "bn": [5e-4, 1e-3, 1e-3]}
    setting = Setting("layer", "2x4x3x3", "channels_last")
    rows = timed(setting, times, "nn.BatchNorm2d")
    return rows + counted(Setting("kept", "2x4x3x3"), {"a": 10, "b": 5, "c": None}, "a")


def test_rows_say_what_was_measured() -> None:
    rows = some_rows()
    assert rows[1] == (
        *("layer", "2x4x3x3", "channels_last", "float32", "eager", "bn"),
        *(1.0, 0.5, 1.0, "ms", 0.5, 0.3333, 0.5, 3),
    )
    assert [(row.name, row.value, row.ratio) for row in rows[2:]] == [
        ("a", 1e-5, 1.0),
        ("b", 5e-6, 0.5),
    ]
    assert mean_ratio(rows[:2]) == pytest.approx(math.sqrt(0.5))


def test_a_csv_file_has_the_machine_in_every_row_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    write_csv(path, some_rows())
    assert read_csv(path) == some_rows()
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    machine = ("device", "threads", "commit", "anybatch", "torch", "python", "numba", "processor")
    assert tuple(lines[0]) == (*Measurement._fields, *surroundings())
    assert set(machine) <= set(lines[0])
    assert all(line["torch"] == torch.__version__ for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column 'question'"),
        ("", "no column 'question'"),
        (
            ",".join(Measurement._fields) + "\n" + ",".join("x" for _ in Measurement._fields),
            "could not convert",
        ),
    ],
)
def test_another_file_is_none_of_these(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_csv(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_csv(tmp_path / "missing.csv")


def test_a_table_has_a_line_a_name_and_says_the_worst() -> None:
    text = as_table(some_rows())
    assert ["bn", "0.50", "0.50", "1", "0.50"] in [line.split() for line in text.splitlines()]
    assert "2x4x3x3, last" in text
    one = Measurement(
        "step", "", "contiguous", "float32", "eager", "bn", *(1.0,) * 3, "ms", 1, 1, 1, 1
    )
    rows = [one._replace(case="a", ratio=0.4), one._replace(case="b", ratio=0.9)]
    assert as_table(rows).splitlines()[-1].split()[:3] == ["bn", "0.60", "0.90"]
    shares = [row._replace(question="forward") for row in rows]  # of these the worst is the least
    assert as_table(shares).splitlines()[-1].split()[:3] == ["bn", "0.60", "0.40"]


def test_images_have_a_panel_a_question_and_a_line_a_name() -> None:
    figure = measurement_figures.ratios(some_rows())
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["a layer, forward and backward", "memory kept for backward"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["b", "a", "bn", "nn.BatchNorm2d"]
    with pytest.raises(ValueError, match=r"rows=\[\]"):
        measurement_figures.ratios([])


# --- networks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet9", "did you mean 'resnet8'"),
        ("nothing", "or module:function"),
        (":network", "or module:function"),
        ("no_such_module:network", "'no_such_module' cannot be imported"),
        ("missing.py:network", "cannot be imported"),
        ("MINE:netwrk", "there is no 'netwrk' in it; did you mean 'network'"),
        ("MINE:NETWORK.x", "there is no 'NETWORK' in it"),
        ("MINE:Broken", "calling it failed .OSError: no weights here"),
        ("MINE:number", "it gave int; give a function or class"),
        ("math:pi", "it is float; give a function or class"),
    ],
)
def test_a_network_that_cannot_be_made_says_why(name: str, words: str, mine: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        factory(name.replace("MINE", str(mine)))()


def test_a_network_is_made_afresh_each_time(mine: Path) -> None:
    make = factory(f"{mine}:network")
    assert make() is not make()
    assert isinstance(factory("resnet8", (1, 16, 16))(), nn.Module)
    assert isinstance(factory("torch.nn:Identity")(), nn.Identity)


# --- costs ------------------------------------------------------------------------------


def small(mine: Path, attribute: str = "network", **more: object) -> Bench:
    inputs = ((2, 4), (2, 4)) if attribute == "two" else ((2, 3, 6, 6),)
    settings = {"rounds": 2, "block_seconds": 0.0, **more}
    return Bench("net", factory(f"{mine}:{attribute}"), inputs, **settings)


@pytest.mark.exhaustive
def test_every_method_can_be_measured(mine: Path) -> None:
    variants = {name: Variant(name) for name in anybatch.METHODS if name != "sync"}
    shown: list[tuple[str, int, int]] = []
    found = costs(small(mine), variants, lambda *news: shown.append(news))
    assert found.failed == {}
    asked = {(row.question, row.name) for row in found.rows}
    questions = ("step", "inference", "kept", "peak")
    assert asked == {(q, name) for q in questions for name in ("torch", *variants)}
    assert {row.case for row in found.rows} == {"net, batch 2"}
    assert all(row.ratio == 1.0 for row in found.rows if row.name == "torch")
    assert all(row.value > 0 for row in found.rows)
    assert {what for what, *_ in shown} == {
        "first steps", "training steps", "inference", "memory kept", "most memory",
    }  # fmt: skip
    assert all(1 <= done <= total for _, done, total in shown)


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_formats_precisions_and_batch_sizes(
    precision: str, channels_last: bool, mine: Path
) -> None:
    bench = small(mine, batch_size=3, precision=precision, channels_last=channels_last)
    seen: list[Tensor] = []
    make = bench.factory

    def watched() -> nn.Module:
        model = make()
        model[1].register_forward_hook(lambda module, args, out: seen.append(args[0]))
        return model

    found = costs(Bench(**{**vars(bench), "factory": watched}), {})
    assert {row.case for row in found.rows} == {"net, batch 3"}
    assert all(len(x) == 3 for x in seen)
    assert {x.dtype for x in seen} == {getattr(torch, precision)}
    last = {x.is_contiguous(memory_format=torch.channels_last) for x in seen}
    assert last == {channels_last}


@pytest.mark.exhaustive
def test_several_inputs_and_nested_outputs(mine: Path) -> None:
    found = costs(small(mine, "two"), {"mabn": Variant("mabn", (("window", 3),))})
    assert found.failed == {}


@pytest.mark.exhaustive
def test_a_method_that_fails_is_named_and_the_others_are_measured(mine: Path) -> None:
    variants = {
        "cbn": Variant("cbn"),
        "bad": Variant("mabn", (("window", 0),)),
        "bn": Variant("bn"),
    }
    found = costs(small(mine, "two"), variants)
    assert set(found.failed) == {"cbn", "bad"}
    assert "norm: " in found.failed["cbn"]  # its norm is fed by an input
    assert "window=0" in found.failed["bad"]
    assert {row.name for row in found.rows} == {"torch", "bn"}


@pytest.mark.parametrize(
    ("attribute", "shape", "words"),
    [
        ("plain", (2, 3, 6, 6), "it has no batch norm to replace"),
        ("network", (2, 5, 6, 6), "cannot be trained as it is on inputs of 2x5x6x6"),
    ],
)
def test_a_network_that_cannot_be_measured(
    attribute: str, shape: tuple[int, ...], words: str, mine: Path
) -> None:
    bench = Bench("net", factory(f"{mine}:{attribute}"), (shape,), rounds=1, block_seconds=0.0)
    with pytest.raises(ValueError, match=words):
        costs(bench, {"bn": Variant("bn")})


def test_graphs_need_a_cuda_device(mine: Path) -> None:
    with pytest.raises(ValueError, match="mode='graph': device='cpu' has no CUDA graphs"):
        small(mine, mode="graph")


# --- the command ------------------------------------------------------------------------


def run(*arguments: str) -> object:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def measured(mine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small benchmark."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    result = run(
        *("bench", "--model", f"{mine}:network", "--input", "2x3x6x6", "--batch-sizes", "2,3"),
        *("--methods", "mabn,gn", "--option", "gn.num_groups=2", "--rounds", "1"),
        *("--output", str(folder)),
    )
    assert result.exit_code == 0, result.output
    assert "mine.py:network, batch 3, cpu, float32" in result.output
    assert "inference" in result.output
    assert "…" not in result.output
    return folder


@pytest.mark.exhaustive
def test_bench_leaves_everything_whole(measured: Path) -> None:
    names = {"bench.json", "bench.csv", "bench.png", "report.html"}
    assert {path.name for path in measured.iterdir()} == names
    assert (measured / "bench.png").read_bytes().startswith(b"\x89PNG")
    rows = read_csv(measured / "bench.csv")
    assert len(rows) == 2 * 4 * 3  # batch sizes, questions, networks
    data = json.loads((measured / "bench.json").read_text())
    assert data["schema"] == 1
    assert data["settings"]["batch_sizes"] == [2, 3]
    assert [Measurement(**row) for row in data["measurements"]] == rows
    assert {"commit", "torch", "device", "threads"} <= set(data["machine"])


class Page(html.parser.HTMLParser):
    """Whether tags close in order, and what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attrs if name == "src"]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.exhaustive
def test_the_report_of_bench_is_one_well_formed_page(measured: Path) -> None:
    text = (measured / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert [source[:10] for source in page.sources if source] == ["data:image"]
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("<tr") == 2 * (1 + 3)
    assert "At batch 2 a training step takes from" in text


@pytest.mark.exhaustive
def test_bench_for_programs(mine: Path, tmp_path: Path) -> None:
    command = ["bench", "--model", f"{mine}:network", "--input", "2x3x6x6", "--methods", "bn"]
    command += ["--rounds", "1", "--output", str(tmp_path / "out")]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["model"] == "mine.py:network"
    result = run(*command, "--csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert {row["name"] for row in rows} == {"torch", "bn"}
    assert run(*command, "--csv", "--json").exit_code == 2


@pytest.mark.exhaustive
def test_bench_takes_a_file_of_options(mine: Path, tmp_path: Path) -> None:
    options = {"model": f"{mine}:network", "input": "2x3x6x6", "methods": ["bn"], "rounds": 1}
    (tmp_path / "bench.json").write_text(json.dumps({**options, "batch-sizes": [4]}))
    command = ("bench", "--config", str(tmp_path / "bench.json"), "--json")
    result = run(*command, "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["batch_sizes"] == [4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet9"], "did you mean 'resnet8'"),
        (["--model", "nothing.at.all:net", "--input", "2x3"], "cannot be imported"),
        (["--model", "torch.nn:Identity"], "input=None: say what 'torch.nn:Identity' takes"),
        (["--model", "torch.nn:Identity", "--input", "2x3"], "cannot be trained as it is"),
        (["--input", "2xthree"], "input='2xthree': give a shape"),
        (["--input", "2x0x3x3"], "input='2x0x3x3': give sizes from 1 on"),
        (["--batch-sizes", "many"], "batch_sizes='many': give numbers with commas"),
        (["--batch-sizes", "0"], "batch_sizes='0': give numbers from 1 on"),
        (["--methods", "mabm"], "did you mean 'mabn'"),
        (["--methods", ","], "methods=',': give one or more"),
        (["--methods", "gn", "--option", "mabn.window=3"], "it is none of the methods gn"),
        (["--methods", "bn", "--option", "bn.window=3"], "window=3: bn has no such option"),
        (["--precision", "float8"], "precision='float8'"),
        (["--device", "warp"], "device='warp'"),
        (["--rounds", "0"], "rounds=0: give a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_of_bench_is_one_line_and_code_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    result = run("bench", *arguments, "--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


# --- the scripts ------------------------------------------------------------------------

ONE = ("--threads", "1")
SCRIPTS = (
    *("all", "draw", "harness", "inference", "layers", "memory", "modes", "page", "peers"),
    *("roofline", "small_steps"),
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts of benchmarks/, imported as they import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    for name in (*SCRIPTS, "training_step", "import_time"):
        sys.modules.pop(name, None)


def test_eager_peers_are_batch_norms(scripts: dict[str, ModuleType]) -> None:
    x, peers = 3 + 2 * torch.randn(8, 4, 5, 5), scripts["peers"]
    expected = nn.BatchNorm2d(4)(x)
    torch.testing.assert_close(peers.EagerNorm(4)(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peers.LoopedGhostNorm(4, 8)(x), expected)
    renorm = peers.EagerRenorm(4)
    for _ in range(200):  # until the running statistics are the batch's
        y = renorm(x)
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-3)


def test_the_eager_moving_average_is_the_method(scripts: dict[str, ModuleType]) -> None:
    x, dy = 1 + torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    theirs = scripts["peers"].EagerMovingAverageNorm(3)
    ours = anybatch.MovingAverageBatchNorm2d(3, warmup_steps=1, renorm_warmup_steps=1)
    theirs.squares[:] = x.square().mean((0, 2, 3))  # where ours is once its window is full
    found = []
    for layer in (theirs, ours):
        for _ in range(40):
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            y = layer(leaf)
            y.backward(dy)
        found.append((y, leaf.grad, layer.weight.grad.flatten(), layer.bias.grad.flatten()))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.exhaustive
def test_layers_are_timed_and_drawn(
    scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layers.csv"
    typed = [*ONE, "--shapes", "2x4x3x3", "--layers", "mabn", "fs", "nn.GroupNorm", "eager BN"]
    status = scripts["layers"].main([*typed, "--rounds", "2", "--csv", str(path)])
    assert status == 0
    rows = read_csv(path)
    names = ["nn.BatchNorm2d", "mabn", "fs", "nn.GroupNorm", "eager BN"]
    assert [row.name for row in rows] == 2 * names
    assert {row.format for row in rows} == {"contiguous", "channels_last"}
    assert scripts["draw"].main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "eager BN" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scripts["layers"].main(["--layers", "nonsense"])
    with pytest.raises(SystemExit):
        scripts["draw"].main([str(BENCHMARKS / "draw.py")])


def test_modes_are_relative_to_the_plain_layer(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    path = tmp_path / "modes.csv"
    typed = [*ONE, "--shapes", "4x4x3x3", "--methods", "bn", "--rounds", "2", "--csv", str(path)]
    assert scripts["modes"].main(typed) == 0
    rows = {row.name: row for row in read_csv(path)}
    others = ["a mask", "4 micro-batches", "outlier_limit", "two halves", "with a ReLU"]
    assert list(rows) == ["plain", *others]
    assert rows["plain"].ratio == 1
    assert {row.question for row in rows.values()} == {"way"}


@pytest.mark.exhaustive
def test_small_steps_have_a_floor(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "small.csv"
    typed = [*ONE, "--networks", "resnet8", "--methods", "brn", "--rounds", "1", "--csv", str(path)]
    assert scripts["small_steps"].main(typed) == 0
    empty = ["no norm", "a copy", "an empty function"]
    assert [row.name for row in read_csv(path)] == ["nn.BatchNorm2d", *empty, "brn", "brn, fused"]


@pytest.mark.exhaustive
def test_inference_has_the_network_without_norms(
    scripts: dict[str, ModuleType], mine: Path, tmp_path: Path
) -> None:
    path = tmp_path / "inference.csv"
    typed = [*ONE, "--network", f"{mine}:network", "--inputs", "3x6x6", "--batch-sizes", "1"]
    scripts["inference"].BLOCK = 0.0
    status = scripts["inference"].main(
        [*typed, "--methods", "mabn", "gn", "--rounds", "1", "--csv", str(path)]
    )
    assert status == 0
    assert [row.name for row in read_csv(path)] == [
        "nn.BatchNorm", "mabn", "mabn, to_batchnorm", "mabn, fold", "gn", "nn.BatchNorm, fold",
        "no norm",
    ]  # fmt: skip
    model = scripts["inference"].without_norms(factory("resnet8"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_memory_has_layers_and_networks(
    scripts: dict[str, ModuleType], mine: Path, tmp_path: Path
) -> None:
    layers, networks = tmp_path / "layers.csv", tmp_path / "networks.csv"
    typed = [*ONE, "--shapes", "2x4x8x8", "--layers-csv", str(layers), "--csv", str(networks)]
    typed += ["--networks", f"{mine}:network", "--inputs", "3x6x6", "--batch-sizes", "2"]
    typed += ["--layers", "bn", "eager BN"]
    assert scripts["memory"].main([*typed, "--methods", "bn"]) == 0
    rows = {(row.question, row.name): row for row in read_csv(layers)}
    assert rows["kept", "eager BN"].ratio > 2
    assert rows["kept", "bn"].ratio <= 1
    assert {row.question for row in read_csv(networks)} == {"kept", "peak"}


def test_the_roofline_counts_bytes(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    roofline, path = scripts["roofline"], tmp_path / "roofline.csv"
    typed = [
        *ONE,
        "--shapes",
        "4x8x16x16",
        "--layers",
        "bn",
        "bs",
        "--rounds",
        "2",
        "--csv",
        str(path),
    ]
    assert roofline.main(typed) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3  # formats, passes, layers
    unit = 4 * 8 * 16 * 16 * 4 / 1e6
    for row in rows:
        units = {"forward": 2, "backward": 3}[row["question"]]
        assert float(row["must_mb"]) == pytest.approx(units * unit, rel=1e-3)
        assert float(row["issued_mb"]) >= float(row["must_mb"])
        speed = units * unit / float(row["value"])  # MB in ms are GB in s
        assert float(row["gb_per_s"]) == pytest.approx(speed, rel=0.02)


def test_the_page_is_filled_from_the_files(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, shape = scripts["page"], scripts["harness"].SHAPES[0]
    for name, questions in {
        "layers": ["layer"],
        "layers-16-bit": ["layer"],
        "modes": ["way"],
        "steps": ["step"],
        "steps-parts": ["step"],
        "inference": ["inference"],
        "memory-layers": ["kept", "peak"],
        "memory-networks": ["kept", "peak"],
    }.items():
        settings = [Setting(question, shape) for question in questions]
        rows = [row for one in settings for row in timed(one, {"a": [1.0], "b": [0.25]}, "a")]
        write_csv(tmp_path / f"{name}.csv", rows)
    typed = [*ONE, "--shapes", "4x8x16x16", "--layers", "bn", "bs", "--rounds", "1"]
    assert scripts["roofline"].main([*typed, "--csv", str(tmp_path / "roofline.csv")]) == 0
    found = page.tables(tmp_path)
    for name in ("layers", "low", "modes", "steps", "parts"):
        assert "| b | 0.25 | 0.25 | 0.25 |" in found[name]
    assert "| b | 0.25 | 0.25 |" in found["memory"]
    assert "| bs | 2.03 | 3.06 |" in found["roofline"]
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    marks = "".join(f"<!-- {name}:start -->\nold\n<!-- {name}:end -->\n" for name in found)
    (docs / "speed.md").write_text(f"before\n{marks}after\n")
    for name in page.IMAGES:
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG")
    monkeypatch.setattr(page, "DOCS", docs)
    assert page.main([str(tmp_path)]) == 0
    text = (docs / "speed.md").read_text()
    assert text.startswith("before\n<!-- layers:start -->")
    assert text.endswith("after\n")
    assert "old" not in text
    assert {path.name for path in (docs / "images").iterdir()} == {
        "speed-layers.png", "speed-roofline.png",
    }  # fmt: skip


def test_shares_are_of_the_copy_in_the_same_round(scripts: dict[str, ModuleType]) -> None:
    roofline = scripts["roofline"]
    parts = [roofline.Parts(2.0, 6.0), roofline.Parts(4.0, 12.0)]
    rows = roofline.rows_of(
        {"copy": [1.0, 2.0], "bn": parts}, ("1x1x1x1", "contiguous", "float32"), 10**9
    )
    named = [dict(zip(roofline.COLUMNS, row, strict=True)) for row in rows]
    assert [row["ratio"] for row in named] == [0.5, 0.25]  # 2 units in 2 copies, 3 in 6
    assert named[0]["copy_gb_per_s"] == pytest.approx(2 / 1.5, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_task_names_what_there_is(scripts: dict[str, ModuleType], device: str) -> None:
    everything = scripts["all"]
    tasks = everything.cpu_tasks(False) if device == "cpu" else everything.gpu_tasks(False, device)
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert (BENCHMARKS / f"{task.script}.py").is_file()
    layers = [task for task in tasks if task.script == "layers"]
    known = {*anybatch.METHODS, *scripts["layers"].PEERS}
    for task in layers:
        if "--layers" in task.arguments:
            names = task.arguments[task.arguments.index("--layers") + 1 :]
            assert set(names) <= known


def test_what_is_out_of_time_is_left_out(
    scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "layers.csv", some_rows())
    typed = ["--tiny", "--minutes", "1e-9", "--output", str(tmp_path)]
    assert scripts["all"].main(typed) == 0
    assert "=== layers: no time left" in capsys.readouterr().out
    assert (tmp_path / "layers.png").is_file()
