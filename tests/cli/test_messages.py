"""The command line's help and errors say what would work, and nothing that does not."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import anybatch
from anybatch.cli import app


def run(*arguments: str) -> object:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_the_version_is_shown() -> None:
    assert run("--version").output.startswith(f"anybatch {anybatch.__version__}, torch ")
    assert run("--version").exit_code == 0


@pytest.mark.parametrize("command", [[], ["compare"], ["train"], ["bench"], ["methods"]])
def test_flags_are_shown_without_a_type(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.output
    assert "bool" not in result.output.lower()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--methods", "mabn", "--option", "mabn.windw=3"], "did you mean 'window'?"),
        (["train", "--method", "brm"], "did you mean 'brn'?"),
        (["compare", "--methods", "BatchRenorm2d"], "did you mean 'brn'?"),
    ],
)
def test_unknown_names_get_a_suggestion(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_the_help_of_an_option_names_every_data_set_that_its_error_names() -> None:
    offered = run("compare", "--data", "mnist").output.split("give one of ")[1]
    for name in offered.strip().split(", "):
        assert name.strip("'") in run("compare", "--help").output


@pytest.mark.exhaustive
def test_the_command_line_takes_method_names_in_any_case() -> None:
    result = run("compare", "--methods", "MABN", "--option", "mabn.window=0")
    assert result.exit_code == 2
    assert "window=0" in result.output


@pytest.mark.exhaustive
def test_a_reader_that_has_read_enough_is_no_error() -> None:
    command = f"{sys.executable} -m anybatch methods gn --json | head -c 20"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
