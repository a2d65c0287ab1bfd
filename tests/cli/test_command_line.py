"""The command line and the report, as a person meets them."""

import html.parser
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from anybatch import METHODS
from anybatch.cli import app, console
from anybatch.registry import get_method
from anybatch.tools.compare import Comparison, table
from anybatch.tools.processes import locked
from anybatch.tools.run import Run

QUICK = ["--train-size", "64", "--epochs", "2", "--workers", "1"]


def run(*arguments: str, **settings: object) -> object:
    return CliRunner().invoke(app, list(arguments), **settings)


# --- compare -------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small comparison."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    command = ["compare", *QUICK, "--methods", "mabn,gn", "--seeds", "2", "--output", str(folder)]
    result = run(*command, "--option", "mabn.window=3")
    assert result.exit_code == 0, result.output
    assert "report" in result.output
    return folder


@pytest.mark.exhaustive
def test_compare_leaves_everything_whole(compared: Path) -> None:
    names = {path.name for path in compared.iterdir()}
    images = {"curves.png", "accuracy.png", "cost.png"}
    assert names - {".lock"} == {"runs", "results.json", "results.csv", "report.html", *images}
    assert len(list((compared / "runs").glob("*.json"))) == 4 * 2
    for image in images:
        assert (compared / image).read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_results_are_for_programs_too(compared: Path) -> None:
    data = json.loads((compared / "results.json").read_text())
    assert data["schema"] == 1
    assert [line["row"] for line in data["table"][:2]] == ["target", "baseline"]
    assert data["table"][2]["accuracy"] >= data["table"][3]["accuracy"]  # the best first
    mabn = next(line for line in data["table"] if line["row"] == "mabn")
    assert mabn["run"]["options"] == [["window", 3]]
    assert len(mabn["accuracies"]) == len(data["seeds"]) == 2
    assert mabn["accuracy"] == pytest.approx(sum(mabn["accuracies"]) / 2)
    assert data["table"][1]["step_time"]["ratio"] == 1.0
    assert len(data["runs"]) == 8
    assert {"anybatch", "torch", "python", "processor", "cores", "commit"} <= set(data["machine"])
    rows = (compared / "results.csv").read_text().splitlines()
    assert rows[0] == "row,method,batch,accuracy,spread,recovered,step_time"
    assert len(rows) == 5


@pytest.mark.exhaustive
def test_a_finished_comparison_is_not_trained_again(compared: Path, tmp_path: Path) -> None:
    compared = Path(shutil.copytree(compared, tmp_path / "again"))  # it writes a report of its own
    before = {p: p.stat().st_mtime_ns for p in (compared / "runs").iterdir()}
    command = ["compare", *QUICK, "--methods", "mabn,gn", "--seeds", "2", "--output"]
    result = run(*command, str(compared), "--option", "mabn.window=3", "--no-timing", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema"] == 1
    assert before == {p: p.stat().st_mtime_ns for p in (compared / "runs").iterdir()}


class Page(html.parser.HTMLParser):
    """Tags of a page, and whether they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.exhaustive
def test_the_report_of_compare_is_one_well_formed_page(compared: Path) -> None:
    text = (compared / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3
    assert all(
        image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images
    )
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert "anybatch" in text
    assert text.count("<tr") == 1 + 4


@pytest.mark.exhaustive
def test_the_report_escapes_what_it_shows(compared: Path, tmp_path: Path) -> None:
    from anybatch.tools import compare_report as report

    comparison = Comparison(Run(train_size=64, epochs=2), ("gn",), (0, 1))
    results = {}
    for path in (compared / "runs").glob("*.json"):
        row = json.loads(path.read_text())
        results[row["key"]] = row
    lines = table(comparison, results)
    command = "anybatch compare --root '<script>alert(1)</script>'"
    report.write(report.FinishedComparison(comparison, lines, results, {}, command, 1.0), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_the_share_recovered_is_of_the_accuracy_lost() -> None:
    comparison = Comparison(Run(), ("mabn",), (0, 1))
    accuracies = {"target": (0.98, 0.96), "baseline": (0.4, 0.5), "mabn": (0.93, 0.91)}
    results = {
        one.key: {"accuracy": accuracies[row][k]}
        for row, runs in comparison.groups().items()
        for k, one in enumerate(runs)
    }
    lines = {line.row: line for line in table(comparison, results)}
    assert lines["mabn"].recovered == pytest.approx((0.92 - 0.45) / (0.97 - 0.45))
    assert lines["mabn"].spread == pytest.approx(0.01 * 2**0.5)


# --- what goes wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--methods", "mabn,mabm"], "did you mean 'mabn'"),
        (["compare", "--methods", "torch"], "the baseline of every comparison"),
        (["compare", "--accumulate", "3"], "accumulate=3: give a divisor of batch_size=2"),
        (["train", "--method", "mabm"], "did you mean 'mabn'"),
        (["compare", "--data", "mnist"], "data='mnist': give one of 'digits'"),
        (["compare", "--data", "cifar10", "--root", "/nowhere/at/all"], "nothing of that name"),
        (["compare", "--data", "cifar10"], "give them with --root"),
        (["compare", "--batch-size", "0"], "batch_size=0"),
        (["compare", "--norm-batch-size", "5"], "norm_batch_size=5: give a number from 1 to"),
        (["compare", "--seeds", "many"], "seeds='many'"),
        (["compare", "--workers", "0"], "workers=0"),
        (["compare", "--option", "brn=3"], "give METHOD.NAME=VALUE"),
        (["compare", "--methods", "gn", "--option", "mabn.window=3"], "none of the methods gn"),
        (["compare", "--train-size", "9999"], "train_size=9999"),
        (["train", "--device", "warp"], "device='warp'"),
        (["train", "--config", "missing.json"], "cannot be read"),
        (["diagnose", "--checkpoint", "missing.pt"], "'missing.pt': there is nothing of that name"),
        (["diagnose", "--max-batches", "0"], "max_batches=0: give a whole number"),
        (["diagnose", "--option", "mabn.window=3"], "the method diagnosed is 'torch'"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_a_wrong_argument_of_a_command_is_one_line_and_code_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    quick = QUICK if arguments[0] == "compare" else QUICK[:4]
    extra = [] if "--train-size" in arguments else quick[:2]
    result = run(*arguments, *extra, "--epochs", "1", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out/runs/*"))


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("compare", *QUICK, "--output", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "cannot write there" in result.output


def test_a_configuration_file_gives_what_was_not_typed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"method": "gn", "epochs": 5, "train-size": 64}')
    command = ["train", "--config", str(tmp_path / "run.json"), "--epochs", "1", "--json"]
    result = run(*command, "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert (row["run"]["method"], len(row["epochs"]), row["run"]["train_size"]) == ("gn", 1, 64)
    (tmp_path / "run.json").write_text('{"speed": 3}')
    result = run("train", "--config", str(tmp_path / "run.json"))
    assert result.exit_code == 2
    assert "speed=3 is none of" in result.output
    offered = result.output.split("is none of ")[1].split()
    assert "json," in offered
    assert "as_json," not in offered


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    result = run("train", *QUICK[:4], "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "another process is at work in it" in result.output
    other.kill()
    other.wait()
    other.stdout.close()
    with locked(tmp_path):  # the lock ended with its holder
        pass


@pytest.mark.exhaustive
@pytest.mark.parametrize("request_to_stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_is_done_and_says_how_to_go_on(
    tmp_path: Path, request_to_stop: signal.Signals
) -> None:
    command = [sys.executable, "-m", "anybatch", "compare", "--methods", "mabn", "--seeds", "2"]
    command += ["--workers", "1", "--train-size", "400", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a script a process is started with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("out/runs/[!.]*.json")):  # hidden ones are not in place yet
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(request_to_stop)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To go on" in text
    assert "Traceback" not in text
    for path in tmp_path.glob("out/runs/[!.]*.json"):
        json.loads(path.read_text())


def test_an_import_that_breaks_under_ctrl_c_is_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extension modules may turn KeyboardInterrupt into ImportError while they load."""

    def load(_: Run) -> None:
        try:
            console._stop()
        except KeyboardInterrupt as error:
            raise ValueError("data='digits': they come with scikit-learn") from error

    monkeypatch.setattr("anybatch.cli.console._stop_requested", threading.Event())
    monkeypatch.setattr("anybatch.tools.training.load", load)
    result = run("train", *QUICK[:4], "--output", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "To go on" in result.output
    assert "scikit-learn" not in result.output


@pytest.mark.exhaustive
def test_without_its_extra_the_command_says_which() -> None:
    code = "import sys; sys.modules['typer'] = None\nimport anybatch; from anybatch.cli import main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'anybatch[tools]'" in done.stderr
    assert "Traceback" not in done.stderr


# --- diagnose -----------------------------------------------------------------------


@pytest.mark.exhaustive
def test_diagnose_prints_a_table_and_leaves_everything_whole(tmp_path: Path) -> None:
    result = run("diagnose", "--epochs", "1", "--max-batches", "30", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "Batch normalization is the problem here" in result.output
    (head,) = (line.split() for line in result.output.splitlines() if "acts as" in line)
    assert (head[0], head[-1]) == ("norm", "reading")  # whole at the width of a terminal
    assert "…" not in result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "diagnosis.json", "diagnosis.png",
    }  # fmt: skip
    page = Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []


@pytest.mark.exhaustive
def test_diagnose_for_programs_and_from_a_checkpoint(tmp_path: Path) -> None:
    from anybatch.tools.networks import build

    weights = tmp_path / "weights.pt"
    torch.save(build("mlp", 10, (64,)).state_dict(), weights)
    command = ["diagnose", "--checkpoint", str(weights), "--batch-size", "64", "--json"]
    result = run(*command, "--max-batches", "40", "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["reading"]["problem"] == "no"
    assert found["batches"] == 40  # more than an epoch has
    assert found["eval_loss"] is None  # running statistics are as they started


# --- all commands -------------------------------------------------------------------

COMMANDS = typer.main.get_command(app).commands


def options_of(command: str) -> dict[str, object]:
    """A command's options by their names on the command line."""
    return {name: parameter for parameter in COMMANDS[command].params for name in parameter.opts}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json(command: str) -> None:
    assert options_of(command)["--json"].help == "Print JSON and nothing else."


def test_what_trains_or_measures_takes_a_file_of_options_and_a_folder() -> None:
    with_file = {command for command in COMMANDS if "--config" in options_of(command)}
    assert with_file == set(COMMANDS) - {"methods", "check"}  # which take no network
    assert all({"--output", "--device", "--option"} <= set(options_of(c)) for c in with_file)


def test_an_option_means_the_same_in_every_command() -> None:
    """Same name, same words; a command may only add what its default is."""
    said: dict[str, set[str]] = {}
    for command in COMMANDS:
        for name, parameter in options_of(command).items():
            words = (getattr(parameter, "help", None) or "").partition(" [dim]Default")[0]
            said.setdefault(name, set()).add(words)
    differing = {name: words for name, words in said.items() if len(words) > 1}
    # diagnose trains first, or not at all; bench takes networks that no training here knows
    assert set(differing) <= {"--epochs", "--model"}
    assert all(all(words) for words in said.values())


@pytest.mark.exhaustive
def test_wrong_input_leaves_standard_output_to_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anybatch", "train", "--method", "mabm", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'mabn'" in done.stderr


# --- completion ---------------------------------------------------------------------


def completed(typed: str) -> list[str]:
    """What bash would offer after these words; the last one is not finished."""
    environment = {
        "_ANYBATCH_COMPLETE": "complete_bash",
        "COMP_WORDS": f"anybatch {typed}",
        "COMP_CWORD": str(len(typed.split(" "))),
    }
    result = CliRunner().invoke(app, [], prog_name="anybatch", env=environment)
    assert result.exit_code == 0, result.output
    return result.output.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("t", ["train", "tune"]),
        ("train --method mab", ["mabn"]),
        ("diagnose --method to", ["torch"]),
        ("tune weights.pt --method gh", ["ghost"]),
        ("compare --methods mab", ["mabn"]),
        ("compare --methods gn,mabn,m", ["gn,mabn,mbn"]),
        ("compare --option mabn.win", ["mabn.window="]),
        ("train --data c", ["cifar10", "cifar100"]),
        ("diagnose --model resnet1", ["resnet18"]),
        ("train --precision b", ["bfloat16"]),
        ("tune --metric t", ["top1", "top5"]),
        ("compare --target", ["--target-batch-size"]),
        ("bench --model resnet1", ["resnet18"]),
        ("bench --methods gn,m", ["gn,mbn", "gn,mabn"]),
        ("train --method nothing", []),
    ],
)
def test_the_shell_completes(typed: str, offered: list[str]) -> None:
    assert completed(typed) == offered


def test_every_method_is_offered() -> None:
    assert completed("train --method ") == [*METHODS, "torch"]
    assert completed("compare --methods ") == list(METHODS)


def test_what_is_offered_is_taken() -> None:
    from anybatch.tools.config import parse_options

    for option in completed("compare --option "):
        method, name = option.removesuffix("=").split(".")
        assert name in METHODS[method].options
        assert parse_options([f"{option}1"]) == {method: ((name, 1),)}


@pytest.mark.exhaustive
def test_completion_can_be_shown_and_installed(tmp_path: Path) -> None:
    start = "import sys; sys.argv[0] = 'anybatch'; from anybatch.cli import main; main()"
    command = [sys.executable, "-c", start]
    home = {
        **os.environ,
        "HOME": str(tmp_path),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    shown = subprocess.run(
        [*command, "--show-completion", "bash"], env=home, capture_output=True, text=True
    )
    assert "_ANYBATCH_COMPLETE=complete_bash" in shown.stdout, shown.stderr
    assert "-F _anybatch_completion anybatch" in shown.stdout
    done = subprocess.run(
        [*command, "--install-completion", "bash"], env=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "anybatch.sh" in (tmp_path / ".bashrc").read_text()
    script = (tmp_path / ".bash_completions" / "anybatch.sh").read_text()
    assert "_ANYBATCH_COMPLETE=complete_bash" in script


# --- methods ------------------------------------------------------------------------


def test_methods_are_listed_for_people_and_programs() -> None:
    text = run("methods").output
    assert all(name in text for name in METHODS)
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in rows] == list(METHODS)
    assert "window" in rows[list(METHODS).index("mabn")]["options"]
    assert json.loads(run("methods", "mabn", "--json").stdout) == rows[list(METHODS).index("mabn")]


@pytest.mark.parametrize("name", [*METHODS, "frozen"])
def test_a_method_is_shown_with_its_call_and_options(name: str) -> None:
    lines = run("methods", name, env={"COLUMNS": "80"}).output.splitlines()
    text = re.sub(r"\s+", " ", " ".join(lines))
    method = get_method(name)
    assert f'anybatch.convert(model, "{name}")' in text
    assert all(f"{option}={p.default!r}" in text for option, p in method.options.items())
    assert ("NormScheduler" in text) == method.scheduled
    assert max(map(len, lines)) <= 80


def test_the_list_of_methods_fits_80_columns() -> None:
    lines = run("methods", env={"COLUMNS": "80"}).output.splitlines()
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert {word for method in METHODS.values() for word in method.when.split()} <= words


def test_help_teaches_by_example() -> None:
    assert "anybatch compare" in run("compare", "--help").output
    assert run().exit_code in (0, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"timing": "false"}, "timing='false': give true or false"),
        ({"epochs": "x"}, "epochs='x': give a whole number"),
        ({"epochs": 1.5}, "epochs=1.5: give a whole number"),
        ({"lr": "high"}, "lr='high': give a number"),
        ({"output": 5}, "output=5: give text"),
        ({"data": 5}, "data='5': give one of"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_named(
    tmp_path: Path, content: dict, words: str
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(content))
    result = run("compare", "--config", str(tmp_path / "run.json"))
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_file_may_give_one_option_a_number_of_seeds_and_capitals(tmp_path: Path) -> None:
    content = {
        **{"option": "MABN.window=4", "methods": ["MABN"], "seeds": 1, "epochs": 1},
        **{"timing": False, "output": str(tmp_path / "out"), "batch_size": 32, "train_size": 64},
    }
    (tmp_path / "run.json").write_text(json.dumps(content))
    result = run("compare", "--config", str(tmp_path / "run.json"), "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "step time" not in result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["table"]
    assert rows[2]["run"]["options"] == [["window", 4]]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_diagnosis_shows_its_reading_in_any_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anybatch
    from anybatch.tools.diagnose_run import diagnosis_table

    monkeypatch.setenv("COLUMNS", str(width))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    found = anybatch.diagnose(model, [torch.randn(4, 4) for _ in range(8)], progress=False)
    table = diagnosis_table(found, "title")
    columns = [str(column.header) for column in table.columns]
    assert columns[0] == "norm"
    assert columns[-1] == "reading"
    assert len(columns) == {40: 3, 60: 6, 80: 6, 200: 6}[width]
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    shown = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in shown)
    assert any(found.table()[1][0][-1] in line for line in shown), "its reading is whole"


@pytest.mark.parametrize("command", ["train", "diagnose"])
def test_what_is_said_of_a_stopped_command_is_true(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anybatch.tools.training.prepare", stop)
    monkeypatch.setattr("anybatch.tools.diagnose_run.prepare", stop)
    result = run(command, "--output", str(tmp_path))
    assert result.exit_code == 130
    kept = "what is done is kept. To go on" if command == "train" else "nothing is kept"
    assert kept in " ".join(result.output.split())
