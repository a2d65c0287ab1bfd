"""anybatch tune: from a checkpoint to a table, an image, a page and JSON."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anybatch.cli import app
from anybatch.tools.checkpoint import read_checkpoint
from anybatch.tools.data import load
from anybatch.tools.run import Run
from anybatch.tools.training import train
from anybatch.tools.tune import halves

SMALL = {"epochs": 1, "train_size": 64, "batch_size": 8}


def run(*arguments: str) -> object:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the command line wrote."""
    folder = tmp_path_factory.mktemp("train")
    command = ["train", "--method", "ghost", "--option", "ghost.ghost_size=4", "--epochs", "1"]
    result = run(*command, "--train-size", "64", "--batch-size", "8", "--output", str(folder))
    assert result.exit_code == 0, result.output
    (found,) = (folder / "runs").glob("*.pt")
    assert str(found) in result.output.replace("\n", "")
    return found


def test_tune_leaves_a_table_a_image_a_page_and_data(weights: Path, tmp_path: Path) -> None:
    result = run("tune", str(weights), "--candidates", "0,0.1,0.5", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "best loss at alpha" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"tune.html", "tune.json", "tune.png"}
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "tune.json").read_text())
    assert data["schema"] == 1
    assert data["run"]["method"] == "ghost"
    assert data["tuned"]["alphas"] == [0.0, 0.1, 0.5]
    assert data["tuned"]["examples"] == data["test"]["examples"] == 250
    assert data["recalibrated"] is None
    page = (tmp_path / "tune.html").read_text()
    assert "<!doctype html>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page


def test_json_alone_is_printed_on_demand(weights: Path, tmp_path: Path) -> None:
    command = ["tune", str(weights), "--metric", "top1", "--candidates", "0,0.2", "--recalibrate"]
    result = run(*command, "--json", "--output", str(tmp_path))
    data = json.loads(result.stdout)
    assert data["tuned"]["metric"] == "top1"
    assert {row["status"] for row in data["recalibrated"]["layers"]} == {"recalibrated"}


def test_group_norms_are_always_given_their_averages(tmp_path: Path) -> None:
    trained = Run(method="gn", **SMALL)
    train(trained, tmp_path, keep_weights=True)
    path = tmp_path / "runs" / f"{trained.key}.pt"
    result = run("tune", str(path), "--candidates", "0.9,1", "--json", "--output", str(tmp_path))
    data = json.loads(result.stdout)
    assert data["tuned"]["plain"] == 1.0
    assert data["recalibrated"]["layers"][0]["kind"] == "GroupNorm"


def test_weights_alone_need_the_network_s_name(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)["model"]
    torch.save(state, tmp_path / "plain.pt")
    command = ["tune", str(tmp_path / "plain.pt"), "--candidates", "0", "--output", str(tmp_path)]
    result = run(*command, "--json")  # ghost batch norm has a plain batch norm's keys
    assert json.loads(result.stdout)["run"]["method"] == "torch"
    result = run(*command, "--method", "mbn", "--json")
    assert json.loads(result.stdout)["run"]["method"] == "mbn"
    result = run(*command, "--data", "cifar10", "--root", str(tmp_path))
    assert "no cifar10 in" in result.output


def test_a_finished_run_keeps_its_weights_where_they_are_wanted(tmp_path: Path) -> None:
    small = Run(**SMALL)
    first = train(small, tmp_path)
    assert [p.suffix for p in (tmp_path / "runs").iterdir()] == [".json"]
    again = train(small, tmp_path, keep_weights=True)
    assert again["accuracy"] == first["accuracy"]
    path = tmp_path / "runs" / f"{small.key}.pt"
    before = path.stat().st_mtime_ns
    train(small, tmp_path, keep_weights=True)
    assert path.stat().st_mtime_ns == before
    stored, state = read_checkpoint(path)
    assert Run.from_dict(stored) == small
    assert all(map(torch.is_tensor, state.values()))


def test_halves_are_apart_and_whole() -> None:
    data = load(Run())
    one, other = halves(data)
    rows = [tuple(x.tolist()) for part in (one, other) for batch, _ in part for x in batch]
    assert len(rows) == len(data.test_x)
    assert sorted(rows) == sorted(tuple(x.tolist()) for x in data.test_x)
    assert [len(y) for _, y in one] == [len(y) for _, y in other] == [250]


class Crafted:
    def __reduce__(self) -> object:
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "nothing of that name"),
        (b"half a fi", "cannot be read"),
        ({"run": Crafted()}, "cannot be read"),
        ({"model": 3}, "no weights in it"),
        ({}, "no weights in it"),
        ({"x": torch.zeros(1)}, "are not those of model='mlp'"),
        ({"run": {"speed": 3}, "model": {"x": torch.zeros(1)}}, "not one of this version"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line_and_code_2(
    content: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    result = run("tune", str(path))
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "accuracy"], "metric='accuracy': give one of 'loss', 'top1', 'top5'"),
        (["--candidates", "0;1"], "candidates='0;1'"),
        (["--candidates", "2"], "candidates=2.0"),
        (["--device", "warp"], "device='warp'"),
        (["--method", "mabm"], "did you mean 'mabn'"),
        (["--option", "mabn.window=3"], "the network's method is 'ghost'"),
        (["--data", "mnist"], "data='mnist'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_of_tune_is_one_line_and_code_2(
    weights: Path, arguments: list[str], words: str, tmp_path: Path
) -> None:
    result = run("tune", str(weights), *arguments, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
