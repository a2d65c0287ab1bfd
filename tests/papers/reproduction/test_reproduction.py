"""Reproductions: what is trained for them, the store, the tables beside the papers' numbers."""

import html.parser
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn
from typer.testing import CliRunner

import anybatch
from anybatch.tools.data import Dataset, load
from anybatch.tools.processes import OnProgress, Work
from anybatch.tools.training import prepare, step, train
from papers.cli import app
from papers.paper_run import FROZEN, PaperRun
from papers.reproduction import pages as reproduced_pages
from papers.reproduction import results as reproduced
from papers.reproduction import spec as reproduction
from papers.reproduction.make import as_row, estimate, make, missing, placed, to_train
from papers.reproduction.spec import Task, chosen, read, reproductions, tasks
from papers.reproduction.store import Store

TINY = {
    "paper": "recovery",
    "source": "Table 1",
    "title": "Digits",
    "claim": "MABN recovers.",
    "unit": "accuracy",
    "down": "method",
    "across": "data",
    "figure": "bars",
    "share": ["BN, 2", "BN, 32"],
    "rows": [
        {"label": "BN, 32", "run": {"method": "bn", "norm_batch_size": 32}},
        {"label": "BN, 2", "run": {"method": "bn"}},
        {"label": "MABN, 2", "run": {"method": "mabn", "options": {"window": 4}}},
        {"label": "GN", "run": {"method": "gn"}, "sizes": ["paper"]},
    ],
    "columns": [{"label": "digits"}],
    "paper_numbers": {
        "BN, 32": {"digits": [90.0, 0.5]},
        "BN, 2": {"digits": 50.0},
        "MABN, 2": {"digits": 88.0},
    },
    "sizes": {
        "small": {
            "run": {"batch_size": 32, "norm_batch_size": 2, "epochs": 3, "train_size": 320},
            "seeds": 2,
            "text": "Shrunk.",
        },
        "paper": {
            "run": {"batch_size": 32, "norm_batch_size": 2, "epochs": 4},
            "seeds": 1,
            "text": "All digits.",
        },
    },
}
# Trained as long as such a network needs, or from the network of such a training.
LONG = ("recovery-fine-tuning", "recovery-full", "recovery-late")
START = {"method": "bn", "batch_size": 32, "epochs": 2, "train_size": 320}
STARTED = {
    **{k: v for k, v in TINY.items() if k not in ("share", "paper_numbers")},
    "rows": [
        {"label": "BN", "run": {"method": "bn"}},
        {"label": "BRN, no learning", "run": {"method": "brn", "lr": 0.0}},
    ],
    "sizes": {
        size: {
            "run": {"batch_size": 2, "epochs": 1, "train_size": 64, "start": START},
            "seeds": seeds,
            "text": "From a trained network.",
        }
        for size, seeds in (("small", 1), ("paper", 2))
    },
}
WEIGHED = {
    **{k: v for k, v in TINY.items() if k not in ("share", "paper_numbers")},
    "figure": "weights",
    "across": "inference",
    "rows": [{"label": "MABN, 2", "run": {"method": "mabn", "options": {"window": 4}}}],
    "columns": [{"label": "as it is"}, {"label": "tuned", "measure": "tuned"}],
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two small reproductions on digits in the place of the papers'."""
    folder = tmp_path / "reproductions"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "weighed.json").write_text(json.dumps(WEIGHED))
    monkeypatch.setattr(reproduction, "FOLDER", folder)
    clear_caches()
    yield tmp_path
    clear_caches()


def clear_caches() -> None:
    for read_once in (reproductions, reproduction.starts):
        read_once.cache_clear()


def run(*arguments: str) -> object:
    return CliRunner().invoke(app, [*arguments])


def row_of(task: Task, accuracy: float = 0.5, **result: object) -> dict:
    epochs = [{"accuracy": accuracy, "train_loss": 1.0}] * task.run.epochs
    made = {"commit": "c", "torch": "2", "processor": "p"}
    plain = {"accuracy": accuracy, "test_loss": 1.0, "epochs": epochs, "device": "cpu"}
    timed = {"seconds": 1.0, "finished": "now"}
    return as_row(task, {**plain, **timed, **result}, "python -m papers x", made)


# --- what is reproduced ------------------------------------------------------------


def test_every_table_and_figure_is_there_in_both_sizes() -> None:
    names = set(reproductions())
    wanted = {
        "recovery": ["", "-fine-tuning", "-full", "-late", "-memory"],
        "bn-sampling": ["-figure-3", "-figure-4", "-table-2"],
        "cross-iteration-bn": [*(f"-table-{k}" for k in (2, 3, 4, 5, 6, 9)), "-figure-3"],
        "cross-iteration-bn-table": ["-8"],
        "momentum-bn": [f"-figure-{k}" for k in ("1", "3a", "3b", "4", "5", "6", "7")],
        "moving-average-bn": [*(f"-table-{k}" for k in (1, 2, 3, 4, 5, 9))],
        "moving-average-bn-figure": ["-2", "-3", "-4"],
        "four-things": [*(f"-figure-{k}" for k in (2, 3, 4, 5)), "-weight-decay"],
        "study": ["-brn-limits", "-cbn-burn-in", "-memory", "-momentum", "-update-size"],
        "study-mabn": ["-form", "-momentum", "-warm-up"],
    }
    assert {paper + end for paper, ends in wanted.items() for end in ends} <= names
    for one in reproductions().values():
        for size in one.sizes.values():
            assert size.cells
            assert size.seeds >= 1
            assert size.examples[0] > 0
            assert size.text


@pytest.mark.exhaustive
def test_small_sizes_fit_half_an_hour_of_two_cores_as_estimated() -> None:
    for one in reproductions().values():
        seconds = sum(estimate(task, {}, "cpu") for task in tasks([one], "small"))
        assert seconds / 2 < 30 * 60 or one.name in LONG, one.name


def test_the_papers_settings() -> None:
    """Against the papers' words, not the files'."""
    cell = chosen(["moving-average-bn-table-1"])[0].sizes["paper"].cell("MABN, 2", "top-1 error")
    assert cell is not None
    mabn = cell.run
    assert (mabn.model, mabn.batch_size, mabn.norm_batch_size) == ("resnet50", 8 * 32, 2)
    assert mabn.epochs == round(600_000 * 256 / 1_281_167)
    assert mabn.milestones == tuple(round(k * 256 / 1_281_167) for k in (150e3, 300e3, 450e3))
    assert mabn.weight_decay == 1e-4
    cell = chosen(["cross-iteration-bn-table-3"])[0].sizes["paper"].cell("CBN", "4")
    assert cell is not None
    assert cell.run.lr * cell.run.batch_size / 64 == pytest.approx(0.1 * 4 / 32)
    assert (cell.run.norm_batch_size, cell.run.epochs, cell.paper) == (4, 100, (70.0, None))
    assert chosen(["cross-iteration-bn-table-3"])[0].sizes["paper"].seeds == 5
    cell = chosen(["cross-iteration-bn-table-5"])[0].sizes["paper"].cell("fixed BN, CBN", "AP75")
    assert cell is not None
    assert (cell.run.model, cell.run.norms, cell.run.weights) == (
        *("fasterrcnn50", "heads", "resnet50.pth"),
    )
    assert (cell.run.batch_size, cell.run.micro_batch_size, cell.run.epochs) == (16, 4, 12)
    assert cell.run.lr * 16 / 64 == pytest.approx(0.02)
    assert dict(cell.run.options)["window"] == 4
    assert (cell.paper, cell.measure) == ((40.7, None), "average_precision_75")
    cell = chosen(["moving-average-bn-table-5"])[0].sizes["paper"].cell("MABN", "mask AP")
    assert cell is not None
    assert (cell.run.micro_batch_size, cell.run.weights, cell.paper) == (2, None, (32.69, None))
    assert dict(cell.run.options) == {"window": 32}
    cell = chosen(["momentum-bn-figure-4"])[0].sizes["paper"].cell("MBN", "CIFAR-100, 2")
    assert cell is not None
    assert cell.run.lr * cell.run.batch_size / 64 == pytest.approx(0.1 * 2 / 64)
    assert (cell.run.epochs, cell.run.milestones) == (200, (60, 120, 180))
    cell = chosen(["bn-sampling-figure-3"])[0].sizes["paper"].cell("FS", "CIFAR-100, 1.6 %")
    assert cell is not None
    assert (cell.run.model, cell.run.batch_size, cell.run.weight_decay) == ("resnet56", 128, 2e-4)
    assert cell.run.lr * 128 / 64 == pytest.approx(0.1)
    assert dict(cell.run.options) == {"ratio": 1 / 64}
    assert cell.paper == (71.2, 0.96)


@pytest.mark.exhaustive
def test_a_run_that_several_tables_need_is_made_once() -> None:
    every = tasks(list(reproductions().values()), "small")
    assert len({task.run.identity for task in every}) == len(every)
    alone = sum(len(tasks([one], "small")) for one in reproductions().values())
    assert len(every) < 0.75 * alone
    seeds = [task.run.seed for task in every]
    assert seeds == sorted(seeds)  # whole tables of one seed come first


def test_settings_that_make_no_difference_are_one_run() -> None:
    table = chosen(["momentum-bn-figure-4"])[0].sizes["small"]
    assert len({cell.run for cell in table.cells if cell.row == "GN"}) == 1
    assert len({cell.run for cell in table.cells if cell.row == "BN"}) == 3


@pytest.mark.exhaustive
def test_every_setting_of_every_cell_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of a small network: no option is out of range, whatever the table."""

    def net(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
        unit = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*unit, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    monkeypatch.setattr("anybatch.tools.networks.build", net)
    monkeypatch.setattr("anybatch.backends.choice.selected", "never")  # nothing to compile first
    x, y = torch.randn(256, 3, 8, 8), torch.arange(256) % 4
    data = Dataset("some", x, y, x, y, 4)
    every = set()
    for cell in (
        c for one in reproductions().values() for s in one.sizes.values() for c in s.cells
    ):
        if not isinstance(cell.run, PaperRun) or cell.run.method == FROZEN:
            continue  # costs, which are no training, and what detectors alone have
        groups = cell.run.norm_batch_size
        size = cell.run.batch_size if groups is None else min(2 * groups, cell.run.batch_size)
        own = ("method", "options", "centralize", "norm_batch_size", "norm_decay", "gamma_target")
        settings = {name: getattr(cell.run, name) for name in own}
        every.add(PaperRun(data="npz", model="resnet8", batch_size=size, epochs=2, **settings))
    assert len(every) > 80
    for one in every:
        training = prepare(one, data)
        size = one.batch_size
        assert step(one, training, x[:size], y[:size]).isfinite(), one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"figure": "pie"}, "figure='pie': give one of lines"),
        ({"speed": 1}, "speed=1: give only paper"),
        ({"share": ["BN, 2", "GN"]}, "share=.*give two rows of a table of one column"),
        ({"sizes": {"small": TINY["sizes"]["small"]}}, r"sizes=\['small'\]: give small and paper"),
        ({"paper_numbers": {"BN, 4": {"digits": 1}}}, "no cell 'BN, 4', 'digits'"),
    ],
)
def test_a_wrong_file_of_a_spec_is_named(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read("tiny", {**TINY, **changes})


def test_names_are_checked() -> None:
    assert [one.name for one in chosen(["momentum-bn-figure-4"])] == ["momentum-bn-figure-4"]
    assert len(chosen(["momentum-bn"])) == 7
    with pytest.raises(ValueError, match="name='figure-4': python -m papers --list"):
        chosen(["figure-4"])


def test_data_are_looked_for_where_they_are(tmp_path: Path) -> None:
    cifar = tasks(chosen(["recovery"]), "small")[0]
    assert placed(cifar, tmp_path, "cpu").run.root == str(tmp_path)
    with pytest.raises(ValueError, match="recovery-full is trained on cifar100.*--root"):
        placed(cifar, None, "cpu")
    mini = tasks(chosen(["momentum-bn-figure-7"]), "paper")[0]
    with pytest.raises(ValueError, match="there is no folder 'mini-imagenet-100' in it"):
        placed(mini, tmp_path, "cpu")
    (tmp_path / "mini-imagenet-100").mkdir()
    assert placed(mini, tmp_path, "cpu").run.root == str(tmp_path / "mini-imagenet-100")


# --- the store -----------------------------------------------------------------------


def test_the_store_keeps_the_latest_and_drops_a_torn_line(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "rows.jsonl")
    assert store.rows() == {}
    first = row_of(Task(PaperRun()))
    assert store.append(first)
    assert not store.append(first)
    with store.path.open("ab") as file:
        file.write(b'{"schema": 1, "id": "half')
    assert set(store.rows()) == {first["id"]}
    second = row_of(Task(PaperRun(seed=1)))
    assert store.append(second)
    assert set(store.rows()) == {first["id"], second["id"]}
    assert len(store.path.read_bytes().splitlines()) == 2
    weighed = row_of(Task(PaperRun()), weighing={"plain": 0.0})
    assert store.append(weighed)  # it says more than the first
    assert store.rows()[first["id"]]["result"]["weighing"] == {"plain": 0.0}


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows.jsonl")
    store.append(row_of(Task(PaperRun())))
    content = store.path.read_bytes()
    for wrong, words in (
        (b"nonsense\n", "line 1: not a stored result"),
        (b"{}\n", "line 1: .*it lacks command"),
        (content.replace(b'"schema": 1', b'"schema": 9'), "schema=9: this version reads 1"),
    ):
        store.path.write_bytes(wrong + content)
        with pytest.raises(ValueError, match=words):
            store.rows()


def _append(path: Path, first: int) -> None:
    for seed in range(first, first + 20):
        Store(path).append(row_of(Task(PaperRun(seed=seed))))


def test_two_processes_append_to_one_store(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(path, first)) for first in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {row["seed"] for row in Store(path).rows().values()} == set(range(30))
    assert len(path.read_text().splitlines()) == 30


def test_a_row_says_nothing_of_where_files_are() -> None:
    task = Task(PaperRun(data="cifar100", model="resnet8", root="/home/someone/data"))
    text = json.dumps(row_of(task))
    assert "someone" not in text
    assert {"command", "made_with", "seed", "seconds", "finished"} <= set(json.loads(text))


# --- numbers -----------------------------------------------------------------------------


def table_rows(accuracies: dict[str, tuple[float, ...]]) -> tuple[reproduction.Reproduction, dict]:
    one = read("tiny", TINY)
    rows = {}
    for cell in one.sizes["small"].cells:
        for seed, accuracy in enumerate(accuracies.get(cell.row, ())):
            row = row_of(Task(cell.run.but(seed=seed)), accuracy)
            rows[row["id"]] = row
    return one, rows


def test_a_table_has_ours_beside_the_papers() -> None:
    one, rows = table_rows({"BN, 32": (0.91, 0.93), "BN, 2": (0.40, 0.44), "MABN, 2": (0.85,)})
    table = reproduced.grid(one, one.sizes["small"], rows)
    assert table.head == ("method", "digits", "digits, paper", "recovered", "recovered, paper")
    assert table.rows[0] == ("BN, 32", "92.0 ± 1.4", "90.0 ± 0.5", "", "")
    assert table.rows[1] == ("BN, 2", "42.0 ± 2.8", "50.0", "", "")
    assert table.rows[2][1:3] == ("85.0 (1 of 2 seeds)", "88.0")
    assert table.rows[2][4] == "95 %"
    empty = reproduced.grid(one, one.sizes["small"], {})
    assert [line[1] for line in empty.rows] == ["not run"] * 3
    assert [line[3] for line in empty.rows] == [""] * 3


def test_the_spread_of_a_share_is_that_of_simulated_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    means, spreads = torch.tensor([85.0, 42.0, 92.0]), torch.tensor([2.0, 3.0, 1.0])
    drawn = means + spreads * torch.randn(20_000, 3, generator=generator)
    shares = (drawn[:, 0] - drawn[:, 1]) / (drawn[:, 2] - drawn[:, 1])

    def value(k: int) -> reproduced.Value:
        pair = (float(means[k] - spreads[k] / 2**0.5), float(means[k] + spreads[k] / 2**0.5))
        return reproduced.Value(pair, 2, ())

    found = reproduced.share(value(0), value(1), value(2))
    assert found is not None
    assert found[0] == pytest.approx((85 - 42) / (92 - 42))
    assert found[1] == pytest.approx(float(shares.std()), rel=0.05)
    assert reproduced.share(value(0), value(1), value(1)) is None


def test_measures_read_the_right_number() -> None:
    weighing = {
        "plain": 0.0,
        "alphas": [0.0, 0.5],
        "halves": [
            {"examples": 10, "best": 0.5, "top1": [0.5, 0.6], "loss": [1, 1]},
            {"examples": 30, "best": 0.0, "top1": [0.8, 0.7], "loss": [1, 1]},
        ],
    }
    one = read("weighed", WEIGHED)
    plain, tuned = one.sizes["small"].cells
    row = row_of(Task(plain.run), 0.9, weighing=weighing)
    rows = {row["id"]: row}
    assert reproduced.value(plain, "error", 2, rows).mean == pytest.approx(10.0)
    # The first half has 0.5 of the weight 0, which is best on the other; the second 0.7 of 0.5.
    expected = 100 * (0.5 * 10 + 0.7 * 30) / 40
    assert reproduced.value(tuned, "accuracy", 2, rows).mean == pytest.approx(expected)
    unweighed = row_of(Task(plain.run), 0.9)
    assert reproduced.value(tuned, "accuracy", 2, {row["id"]: unweighed}) is None
    assert missing([Task(plain.run, weighed=True)], {row["id"]: unweighed})
    row["result"]["accuracies"] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    last = reproduction.Cell("r", "c", plain.run, "mean of 5", None)
    assert reproduced.value(last, "accuracy", 1, rows).mean == pytest.approx(30.0)


def test_rows_whose_settings_were_changed_are_refused() -> None:
    row = row_of(Task(PaperRun()))
    assert reproduced.checked([row]) == {row["id"]: row}
    row["settings"]["lr"] = 0.2
    with pytest.raises(ValueError, match="the settings of this row are not those it is of"):
        reproduced.checked([row])


# --- the command --------------------------------------------------------------------------


def in_this_process(
    runs: list[PaperRun], folder: Path, workers: int, on_progress: OnProgress, work: Work
) -> None:
    """In the place of processes, whose start takes longer than the trainings here."""
    for one in runs:
        on_progress(one.key, 0, work(one, folder, lambda *_: None))


@pytest.mark.exhaustive
def test_a_reproduction_is_killed_goes_on_and_is_drawn(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tiny / "store"
    command = [sys.executable, "-c", _SCRIPT, str(tiny / "reproductions"), str(store)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (store / "results.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = Store(store / "results.jsonl").rows()
    assert 1 <= len(before) < 6
    with (store / "results.jsonl").open("ab") as file:
        file.write(b'{"torn')
    monkeypatch.setattr("papers.reproduction.make.in_processes", in_this_process)
    result = run("tiny", "weighed", "--store", str(store))
    assert result.exit_code == 0, result.output
    rows = Store(store / "results.jsonl").rows()
    assert len(rows) == 6
    assert all(rows[key] == row for key, row in before.items() if row["settings"]["method"] == "bn")
    assert "recovered" in result.output
    assert {path.name for path in store.iterdir()} >= {
        "report.html",
        "report.json",
        "tiny-small.png",
        "weighed-small.png",
    }
    page = (store / "report.html").read_text(encoding="utf-8")
    assert_well_formed(page)
    assert page.count("data:image/png;base64,") == 2
    assert "https://" not in page
    assert not list((store / "runs").glob("*.pt"))
    assert not list((store / "runs").glob("*.ckpt"))
    whole = rows[reproduction.tasks(chosen(["tiny"]), "small")[0].run.identity]
    assert whole["command"] == "python -m papers tiny --size small --device cpu"
    for task in tasks(chosen(["tiny"]), "small", (0,)):  # as if it had never been stopped
        alone = train(task.run, tiny / "alone")
        stored = rows[task.run.identity]["result"]
        assert stored["accuracies"] == [round(row["accuracy"], 6) for row in alone["epochs"]]
        assert stored["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-4)
    docs_agree_with_their_rows(tiny, store)


def assert_well_formed(page: str) -> None:
    open_tags: list[str] = []

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "link", "img", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Tags().feed(page)
    assert open_tags == []


_SCRIPT = """
import sys
from pathlib import Path
from papers.reproduction import spec as reproduction
reproduction.FOLDER = Path(sys.argv[1])
if __name__ == "__main__":
    from papers.cli import main
    options = ["--store", sys.argv[2], "--workers", "1"]
    sys.argv = ["papers", "tiny", "weighed", *options]
    main()
"""


def docs_agree_with_their_rows(tiny: Path, store: Path) -> None:
    docs = tiny / "docs"
    docs.mkdir()
    marked = "# A\n\n<!-- reproduced: tiny small -->\nold\n<!-- reproduced: end -->\n\nafter\n"
    (docs / "other.md").write_text(marked)
    result = run("--draw", "--docs", str(docs), "--store", str(store))
    assert result.exit_code == 0, result.output
    page = docs / "results/reproductions.md"
    assert "BN, 32 | " in page.read_text(encoding="utf-8")
    other = (docs / "other.md").read_text(encoding="utf-8")
    assert "old" not in other
    assert "| BN, 2 | " in other
    assert other.endswith("\n\nafter\n")
    assert (
        (docs / "results/images/reproductions/tiny-small.png").read_bytes().startswith(b"\x89PNG")
    )
    assert stale(docs) == []
    for altered in (page, docs / "other.md"):  # a number is changed by hand
        text = altered.read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith("| BN, 2 |"))
        ours = line.split("|")[2]
        altered.write_text(text.replace(line, line.replace(ours, " 99.9 ± 0.1 ", 1)))
        assert stale(docs) == [altered]
        altered.write_text(text)
    rows = next((docs / "results").glob("*.jsonl"))
    text = rows.read_text()
    rows.write_text(text.replace('"accuracy": 0.', '"accuracy": 0.9', 1))
    assert stale(docs)
    rows.write_text(text.replace('"lr": 0.1', '"lr": 0.3', 1))
    with pytest.raises(ValueError, match="not those it is of"):
        stale(docs)
    rows.write_text(text)
    shutil.rmtree(store / "runs")
    (store / "results.jsonl").unlink()
    run("--draw", "--docs", str(docs), "--store", str(store))  # rows of other machines stay
    assert rows.read_text() == text
    assert stale(docs) == []


def stale(docs: Path) -> list[Path]:
    return [
        path
        for path, text in reproduced_pages.pages(docs).items()
        if path.read_text(encoding="utf-8") != text
    ]


@pytest.fixture
def started(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reproduction whose runs start from another's network, beside those of `tiny`."""
    (tiny / "reproductions" / "started.json").write_text(json.dumps(STARTED))
    clear_caches()
    monkeypatch.setattr("papers.reproduction.make.in_processes", in_this_process)
    return tiny


def test_runs_start_from_the_trained_network_of_another_run(started: Path) -> None:
    wanted = tasks(chosen(["started"]), "small")
    runs = [task.run for task in wanted if isinstance(task.run, PaperRun)]
    assert [run.pretrained for run in runs].count(False) == 1  # the start is trained as well
    folder = started / "store"
    made = make(wanted, folder, 1, lambda *_: None, "")
    assert made.added == len(wanted) == 3
    start = next(run for run in runs if not run.pretrained)
    weights = torch.load(folder / "runs" / f"{start.key}.pt", weights_only=True)["model"]
    still = next(run for run in runs if run.method == "brn")
    training = prepare(still, load(still), weights)
    for name, value in training.model.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name]), name
    brn = next(m for m in training.model.modules() if isinstance(m, anybatch.BatchRenorm1d))
    assert brn.warmup_steps == 0  # a trained network is renormalized from the first step on

    (folder / "runs" / f"{start.key}.pt").unlink()
    rows = {key: row for key, row in made.rows.items() if key != still.identity}
    assert {task.run.key for task in to_train(wanted, rows, folder)} == {start.key, still.key}


def test_runs_start_from_weights_that_come_with_the_papers(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction, "WEIGHTS", started / "weights")
    start = next(t.run for t in tasks(chosen(["started"]), "small") if not t.run.pretrained)
    network = prepare(start, load(start)).model
    (started / "weights").mkdir()
    torch.save({"model": network.state_dict()}, started / "weights" / f"{start.identity}.pt")
    wanted = tasks(chosen(["started"]), "small")
    assert all(task.run.pretrained for task in wanted)  # nothing else is trained
    folder = started / "store"
    assert make(wanted, folder, 1, lambda *_: None, "").added == len(wanted) == 2
    assert to_train(wanted, {}, folder) == wanted


def test_a_start_of_another_network_is_refused() -> None:
    run = PaperRun(method="bn", start=tuple(START.items()), model="mlp")
    state = prepare(run, load(run)).model.state_dict()
    fewer = {name: value for name, value in state.items() if not name.startswith("1.")}
    with pytest.raises(ValueError, match=r"differ in 1\.weight|differ in 1\.bias"):
        prepare(run, load(run), fewer)
    last = list(state)[-1].rpartition(".")[0]
    other = {k: v[:3] if k.startswith(last) else v for k, v in state.items()}
    model = prepare(run, load(run), other).model  # another number of classes
    assert torch.equal(model.state_dict()["1.weight"], state["1.weight"])
    wider = {k: v[:3] if k.startswith("1.") and v.dim() else v for k, v in state.items()}
    with pytest.raises(ValueError, match="other shapes"):
        prepare(run, load(run), wider)
    with pytest.raises(ValueError, match="method 'bn'"):
        PaperRun(method="bn", start=(("method", "mabn"),))
    with pytest.raises(ValueError, match="with a start"):
        PaperRun(method=FROZEN, model="resnet8", data="cifar100")


def test_a_frozen_start_learns_around_its_norms() -> None:
    run = PaperRun(method=FROZEN, model="resnet8", data="cifar100", start=(("method", "bn"),))
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4,))
    data = Dataset("images", x, y, x, y, 3)
    training = prepare(run, data)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.model.train()
    step(run, training, x[:2], y[:2])
    norms = [n for n, m in training.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for name, value in training.model.state_dict().items():
        of_norm = name.rpartition(".")[0] in norms
        assert torch.equal(value, before[name]) is of_norm, name


def test_what_another_process_makes_is_left_to_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papers.reproduction.make.in_processes", in_this_process)
    store = tiny / "store"
    asked = tasks(chosen(["tiny"]), "small", (0,))
    (store / "runs").mkdir(parents=True)
    taken = store / "runs" / f".{asked[0].run.key}.lock"
    with FileLock(taken):  # as another process would have it
        result = run("tiny", "--store", str(store), "--seeds", "1")
    assert result.exit_code == 0, result.output
    assert "1 trainings are made by another process" in result.output
    assert "not run" in result.output
    assert len(Store(store / "results.jsonl").rows()) == 2
    taken.write_text("12345")  # that process was killed, and left the file
    assert "not run" not in run("tiny", "--store", str(store), "--seeds", "1").output
    assert len(Store(store / "results.jsonl").rows()) == 3


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("reco", ["recovery", *LONG, "recovery-memory", "recovery-switch"]), ("--size p", ["paper"])],
)
def test_the_shell_completes_reproductions_and_sizes(typed: str, offered: list[str]) -> None:
    words = f"papers {typed}"
    environment = {
        "_PAPERS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = CliRunner().invoke(app, [], prog_name="papers", env=environment)
    assert result.output.split() == offered


def test_what_there_is_and_what_would_be_trained(tiny: Path) -> None:
    store = str(tiny / "store")
    result = run("--list", "--store", store)
    assert result.exit_code == 0, result.output
    assert "tiny" in result.output
    listed = json.loads(run("--list", "--json", "--store", store).stdout)
    assert [(line["name"], line["small"]["runs"]) for line in listed] == [
        ("tiny", 6),
        ("weighed", 2),
    ]
    listed = json.loads(run("--list", "--json", "--store", store, "--seeds", "1").stdout)
    assert [line["small"]["runs"] for line in listed] == [3, 1]
    shown = json.loads(run("tiny", "weighed", "--dry-run", "--json", "--store", store).stdout)
    assert len(shown) == 6  # the weighed ones are shared
    assert "6" in run("tiny", "--dry-run", "--store", store).output or shown
    assert not (tiny / "store").exists()
    for arguments, words in (
        ([], "names: give some"),
        (["tinny"], "name='tinny': did you mean 'tiny'?"),
        (["tiny", "--size", "large"], "size='large': give one of small, paper"),
    ):
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())


def test_figures_of_every_kind_are_drawn(tiny: Path) -> None:
    from papers.reproduction.figures import draw

    for kind in ("lines", "bars", "curves"):
        for unit in ("accuracy", "error"):
            one = read("tiny", {**TINY, "figure": kind, "unit": unit})
            _, rows = table_rows({"BN, 32": (0.91, 0.93), "MABN, 2": (0.85,)})
            figure = draw(one, one.sizes["small"], rows)
            assert figure is not None
            assert figure.axes
    assert draw(one, one.sizes["small"], {}) is None
