"""Networks and data of a user: functions in a file, for every command and from Python."""

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import anybatch
from anybatch.cli.application import app
from anybatch.tools.checkpoint import read_checkpoint
from anybatch.tools.data import load, steps_per_epoch
from anybatch.tools.diagnose_run import diagnose_run
from anybatch.tools.own_data import own_data
from anybatch.tools.run import Run
from anybatch.tools.training import prepare, step, train
from anybatch.tools.tune import halves, tune

MINE = """
import random

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def without():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def frozen():
    trained = network()
    trained(torch.randn(32, 6))
    return anybatch.convert(trained, "frozen")


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


def drawn():
    x = torch.randn(64, 6) + torch.tensor(numpy.random.rand(6) + random.random()).float()
    y = torch.randint(3, (64,))
    return TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])


def nested():
    train, test = data()
    train = [(x, {"class": y, "pair": (y, -y)}) for x, y in train]
    return {
        "train": train,
        "test": train,
        "loss": lambda o, t: nn.functional.cross_entropy(o, t["class"] + 0 * t["pair"][1]),
        "score": lambda o, t: (o.argmax(1) == t["class"]).float().mean(),
    }


def several(items):
    x, y = torch.utils.data.default_collate(items)
    return x.repeat(4, 1), y.repeat(4)


def crops():
    train, test = data()
    return tuple(DataLoader(part, collate_fn=several) for part in (train, test.dataset))


def time_first():
    turned = lambda items: (torch.stack([x for x, _ in items], 1), torch.tensor([0] * len(items)))
    return DataLoader(data()[0], collate_fn=turned), data()[1]


def scored_nan():
    train, test = data()
    return {"train": train, "test": test.dataset, "score": lambda o, t: float("nan")}


def dropping():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))


def one_output():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


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
    images = DataLoader([(torch.zeros(3, 4), 0)] * 4, collate_fn=lambda b: tuple(zip(*b)))  # noqa: B905
    with pytest.raises(TypeError, match=r"is tuple of tuple, tuple; give .*anybatch.diagnose"):
        own_data(images).train_x[:1].batch()
    loader = DataLoader(
        TensorDataset(torch.zeros(4, 1)), collate_fn=lambda items: (torch.zeros(len(items), 2), 7)
    )
    assert own_data(loader).shape == (2,)


def test_results_of_a_changed_file_are_not_used_again(mine: str, tmp_path: Path) -> None:
    before = own_run().key
    (tmp_path / mine).write_text(MINE + "\n# changed\n")
    assert own_run().key != before
    assert Run().key == Run(data="digits").key


@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        ("diagnose", "without", "has no batch norm to measure"),
        ("diagnose", "frozen", "has no batch norm to measure"),
        ("compare", "without", "has no batch norm"),
        ("compare", "frozen", "norms of Sequential are frozen"),
    ],
)
def test_a_network_without_batch_norm_is_told_before_anything_is_trained(
    command: str, kind: str, words: str, mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_nothing(*_: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("anybatch.tools.diagnose_run.train_epoch", train_nothing)
    given = ["--model", f"mine.py:{kind}", "--data", "mine.py:data", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [command, *given])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


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


def own(data: str, model: str = "network", **settings: Any) -> Run:
    return Run(data=f"mine.py:{data}", model=f"mine.py:{model}", method="mabn", **settings)


def test_data_are_the_same_however_often_they_are_loaded(mine: str) -> None:
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state().tolist(), repr(numpy.random.get_state())
    first = load(own("drawn"))
    assert states == (
        random.getstate(),
        torch.get_rng_state().tolist(),
        repr(numpy.random.get_state()),
    )
    torch.randn(3)
    random.random()
    again = load(own("drawn"))
    for one, other in zip(first.train_x.batch(), again.train_x.batch(), strict=True):
        assert torch.equal(one, other)


def test_a_stopped_training_of_a_network_with_dropout_ends_in_the_same_numbers(
    mine: str, tmp_path: Path
) -> None:
    run = own("data", "dropping", epochs=4, batch_size=4, seed=2**33)
    whole = train(run, tmp_path / "whole")

    def stop(done: int, row: Any) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "cut", stop)
    torch.randn(5)
    gone_on = train(run, tmp_path / "cut")
    for one, other in zip(whole["epochs"], gone_on["epochs"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_tuning_and_diagnosis_use_the_users_loss_and_score(mine: str, tmp_path: Path) -> None:
    run = own("regression", "one_output", epochs=1, batch_size=8)
    train(run, tmp_path, keep_weights=True)
    weights = tmp_path / "runs" / f"{run.key}.pt"
    _, state = read_checkpoint(weights)
    for metric, maximize in (("loss", False), ("top1", True)):
        tuned = tune(run, weights, state, metric, (0.0, 0.5), False, False, "").tuned
        assert list(tuned.curves) == ["<lambda>"]
        assert tuned.best == (max if maximize else min)(
            tuned.alphas, key=lambda a, t=tuned: t.values[t.alphas.index(a)]
        )
    found = diagnose_run(run, 0, None, 4, lambda *_: None)
    assert found.layers[0].psi is not None


def test_outputs_of_one_value_are_no_classes() -> None:
    net = nn.Sequential(anybatch.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    batch = torch.randn(4, 3), torch.randn(4, 1)
    with pytest.raises(ValueError, match=r"outputs \(4, 1\) are no scores of classes"):
        anybatch.tune_example_weight(net, [batch], candidates=[0.0], progress=False)


def test_examples_are_counted_as_they_are_collated(mine: str, tmp_path: Path) -> None:
    row = train(own("crops", epochs=1, batch_size=4), tmp_path)
    assert 0 <= row["accuracy"] <= 1
    with pytest.raises(ValueError, match=r"inputs \(6, 4\) and targets \(4,\)"):
        train(own("time_first", epochs=1, batch_size=4), tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_targets_may_be_nested(mine: str, tmp_path: Path, accumulate: int) -> None:
    run = own("nested", epochs=2, batch_size=4, accumulate=accumulate)
    row = train(run, tmp_path, keep_weights=True)
    assert row["accuracy"] > 0.4
    weights = tmp_path / "runs" / f"{run.key}.pt"
    _, state = read_checkpoint(weights)
    tuned = tune(run, weights, state, "loss", (0.0,), False, False, "").tuned
    assert tuned.values[0] > 0


def test_lazy_networks_are_trained(mine: str, tmp_path: Path) -> None:
    assert train(own("data", "lazy", epochs=1, batch_size=4), tmp_path)["accuracy"] > 0


def test_a_diagnosis_needs_no_held_out_examples(mine: str) -> None:
    found = diagnose_run(own("train_only", epochs=1), 1, None, 3, lambda *_: None)
    assert len(found.layers) == 1


def test_a_score_that_is_not_finite_is_kept_as_such(mine: str, tmp_path: Path) -> None:
    typed = ["train", "--model", "mine.py:network", "--data", "mine.py:scored_nan"]
    typed += ["--method", "gn", "--epochs", "1", "--output", str(tmp_path / "out")]
    for _ in range(2):
        result = CliRunner().invoke(app, typed)
        assert result.exit_code == 0, result.output
        assert "held-out accuracy not finite" in result.output
        printed = CliRunner().invoke(app, [*typed, "--json"]).output
        assert json.loads(printed)["accuracy"] is None


def test_results_of_other_contents_are_not_used_again(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "somewhere.py"
    module.write_text("a = 1")
    (tmp_path / "data.npz").write_bytes(b"1")
    runs = [
        Run(data="somewhere:data", model="somewhere:network"),
        Run(data="npz", root=str(tmp_path / "data.npz"), model="resnet8"),
    ]
    before = [run.key for run in runs]
    assert before == [run.key for run in runs]
    module.write_text("a = 12")
    (tmp_path / "data.npz").write_bytes(b"12")
    assert not set(before) & {run.key for run in runs}
