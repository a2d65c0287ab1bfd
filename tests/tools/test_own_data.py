"""Networks and data of a user: functions in a file, for every command and from Python."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from anybatch.cli.application import app
from anybatch.tools.data import load, steps_per_epoch
from anybatch.tools.own_data import own_data
from anybatch.tools.run import Run
from anybatch.tools.training import prepare, step, train
from anybatch.tools.tune import halves

MINE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (96,), generator=generator)
    x = torch.randn(96, 6, generator=generator) + y[:, None]
    held_out = DataLoader(TensorDataset(x[64:], y[64:]), batch_size=5)
    return TensorDataset(x[:64], y[:64]), held_out


def train_only():
    return data()[0]


def regression():
    train, test = data()
    train = [(x, x.sum()) for x, _ in train]
    return {
        "train": train,
        "test": train,
        "loss": lambda outputs, targets: (outputs[:, 0] - targets).square().mean(),
        "score": lambda outputs, targets: torch.exp(-(outputs[:, 0] - targets).abs()).mean(),
    }


def without_loss():
    return {key: value for key, value in regression().items() if key in ("train", "test")}


def three():
    return 1, 2, 3


def stream():
    return iter([])


def fails():
    raise KeyError("disk")


numbers = 5
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file, in the folder that commands are started in."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return "mine.py"


def own_run(data: str = "data", **settings: object) -> Run:
    settings = {"method": "mabn", "epochs": 1, "seed": 1, **settings}
    return Run(data=f"mine.py:{data}", model="mine.py:network", **settings)


def test_a_users_data_are_trained_on_in_the_order_of_seed_and_epoch(mine: str) -> None:
    run = own_run()
    data = load(run)
    assert (data.name, data.shape, steps_per_epoch(run, data)) == ("mine", (6,), 32)
    training = prepare(run, data)
    x, y = data.train_x[torch.tensor([3, 5])].batch()
    assert x.shape == (2, 6)
    assert float(step(run, training, x, y).detach()) > 0
    assert load(own_run(train_size=10)).train_x.shape == (10, 6)
    held_out = load(own_run(validation_size=20))
    assert (len(held_out.train_x), len(held_out.test_x)) == (44, 20)
    tuned, judged = halves(data)
    assert [len(x) for x, _ in (*tuned, *judged)] == [16, 16]


def test_held_out_numbers_are_those_of_a_loop_by_hand(mine: str, tmp_path: Path) -> None:
    run = own_run(method="bn", batch_size=16)
    result = train(run, tmp_path, keep_weights=True)
    again = train(run.but(seed=1), tmp_path)
    assert again["accuracy"] == result["accuracy"]
    data = load(run)
    model = prepare(run, data).model
    kept = torch.load(tmp_path / "runs" / f"{run.key}.pt", weights_only=True)
    model.load_state_dict(kept["model"])
    x, y = data.test_x[:].batch()
    with torch.no_grad():
        outputs = model.eval()(x)
    assert result["accuracy"] == pytest.approx(float((outputs.argmax(1) == y).float().mean()))
    assert result["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)))


def test_a_loss_and_a_score_of_the_users_are_used(mine: str, tmp_path: Path) -> None:
    result = train(own_run("regression", lr=0.02, epochs=3, batch_size=8), tmp_path)
    losses = [row["train_loss"] for row in result["epochs"]]
    assert losses[-1] < losses[0]
    assert 0 < result["accuracy"] < 1
    run = own_run("without_loss")
    data = load(run)
    with pytest.raises(ValueError, match=r"loss=None: outputs \(2, 3\) and targets \(2,\)"):
        step(run, prepare(run, data), *data.train_x[:2].batch())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("three", "it gave 0, 1, 2; give \\(train, test\\)"),
        ("stream", "has no length and items; give \\(train, test\\)"),
        ("fails", "calling it failed \\(KeyError: 'disk'\\)"),
        ("numbers", "it is int; give a function"),
        ("dota", "there is no 'dota' in it; did you mean 'data'"),
    ],
)
def test_what_is_no_data_is_named(mine: str, data: str, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"data='mine.py:{data}': .*({words})"):
        load(own_run(data))


def test_own_data_need_a_network_of_ones_own(mine: str) -> None:
    with pytest.raises(ValueError, match=r"model='mlp': data='mine.py:data' needs a network"):
        Run(data="mine.py:data")
    with pytest.raises(ValueError, match="no held-out examples"):
        train(own_run("train_only"), Path())
    with pytest.raises(TypeError, match="has no length"):
        own_data(iter([]))
    with pytest.raises(TypeError, match="loss=3: give a function"):
        own_data([(torch.zeros(1), 0)], loss=3)
    with pytest.raises(ValueError, match="train: it has no examples"):
        own_data([])
    with pytest.raises(TypeError, match=r"collate_fn that makes \(inputs, targets\)"):
        own_data([{"image": torch.zeros(1)}]).train_x[:1].batch()
    loader = DataLoader(
        TensorDataset(torch.zeros(4, 1)), collate_fn=lambda items: (torch.zeros(len(items), 2), 7)
    )
    assert own_data(loader).shape == (2,)


def test_results_of_a_changed_file_are_not_used_again(mine: str, tmp_path: Path) -> None:
    before = own_run().key
    (tmp_path / mine).write_text(MINE + "\n# changed\n")
    assert own_run().key != before
    assert Run().key == Run(data="digits").key


@pytest.mark.exhaustive
def test_commands_take_the_users_network_and_data(mine: str, tmp_path: Path) -> None:
    own = ["--model", "mine.py:network", "--data", "mine.py:data", "--epochs", "1"]
    for command, more, file in (
        ("train", ["--lr", "0.05"], None),
        ("diagnose", ["--max-batches", "4"], "diagnosis.json"),
        (
            "compare",
            ["--methods", "mabn", "--seeds", "1", "--workers", "1", "--no-timing"],
            "results.json",
        ),
    ):
        out = tmp_path / command
        result = CliRunner().invoke(app, [command, *own, *more, "--output", str(out)])
        assert result.exit_code == 0, result.output
        if file is not None:
            assert json.loads((out / file).read_text())
    rows = json.loads((tmp_path / "compare" / "results.json").read_text())["table"]
    assert [row["row"] for row in rows] == ["target", "baseline", "mabn"]


@pytest.mark.parametrize("command", ["train", "diagnose", "compare"])
def test_a_users_network_without_its_data_ends_in_what_to_give(
    mine: str, tmp_path: Path, command: str
) -> None:
    typed = [command, "--model", "mine.py:network", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, typed, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert "model='mine.py:network': it does not fit the examples, of shape (64,)" in result.output
    assert "--data mine.py:data" in result.output
    assert not list((tmp_path / "out").rglob("*.json"))
