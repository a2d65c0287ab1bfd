"""`anybatch check` on this machine, and with a planted fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from anybatch.backends.numba.rule_steps import RuleLoops
from anybatch.cli import app


def run(*arguments: str) -> Any:
    command = ["check", "--methods", "bn", "--devices", "cpu", *arguments]
    return CliRunner().invoke(app, command)


@pytest.mark.exhaustive
def test_check_tells_of_every_type_and_format_what_serves_and_how_fast(tmp_path: Path) -> None:
    result = run("--rounds", "1", "--output", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "check.json").read_text())
    rows = {(row["precision"], row["format"]): row for row in found["rows"]}
    assert len(rows) == 8
    for (precision, _), row in rows.items():
        assert (row["device"], row["method"], row["fault"]) == ("cpu", "bn", None)
        assert row["ratio"] > 0
        if precision in ("float32", "float64"):
            assert row["backend"] == "numba"
            assert 0 < row["error"] <= 1
    assert found["machines"]["cpu"]["torch"] == torch.__version__


def test_check_names_kernels_that_disagree_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = RuleLoops.forward

    def wrong(*args: Any) -> Any:
        y, *rest = forward(*args)
        return y.mul_(1.0001), *rest

    monkeypatch.setattr(RuleLoops, "forward", wrong)
    result = run("--rounds", "0", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "cpu, bn, float32, channels_last: output: error" in " ".join(result.output.split())
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    faulty = [row for row in rows if row["fault"]]
    assert {row["format"] for row in faulty} == {"contiguous", "channels_last"}
    assert all(row["backend"] == "numba" for row in faulty)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--rounds", "-1"), "rounds=-1: give a whole number from 0 on"),
        (("--devices", "tpu"), "devices='tpu'|device='tpu'"),
        (("--devices", "meta"), "devices='meta': give cpu, cuda"),
        (("--methods", "gn"), "methods='gn': give one or more of bn,"),
    ],
)
def test_check_says_what_would_be_right(option: tuple[str, str], words: str) -> None:
    result = run(*option)
    assert result.exit_code == 2
    text = " ".join((result.output + result.stderr).split())
    assert any(word in text for word in words.split("|"))
