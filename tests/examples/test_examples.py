"""Every notebook and script in ``examples`` runs, in small settings."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = {
    "lightning_accumulation": {"EPOCHS": 1, "IMAGES": 32},
    "monai_volumes": {"EPOCHS": 2, "VOLUMES": 4},
    "transformers_fine_tuning": {"EPOCHS": 1, "IMAGES": 32},
}
# Arguments, and what the script's table has a row for.
SCRIPTS = {
    "detection": (["--seeds", "1", "--epochs", "1", "--images", "4"], "WAYS"),
    "fine_tuning": (["--seeds", "1", "--epochs", "1"], "METHODS"),
    "segmentation": (["--seeds", "1", "--epochs", "1", "--images", "8"], "WAYS"),
    "tabular": (["--seeds", "1", "--epochs", "1"], "WAYS"),
    "volumes": (["--seeds", "1", "--epochs", "1", "--volumes", "4"], "METHODS"),
}
OURS = {*(f"{name}.ipynb" for name in NOTEBOOKS), *(f"{name}.py" for name in SCRIPTS)}


def cells(name: str) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of other frameworks
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_cell_by_cell(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(name):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{name}.ipynb, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(NOTEBOOKS[name]) <= set(names)
            names |= NOTEBOOKS[name]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_without_outputs(name: str) -> None:
    found = cells(name)
    assert found[0]["cell_type"] == "markdown"
    assert "".join(found[0]["source"]).startswith("# ")
    assert len({cell["id"] for cell in found}) == len(found)
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of other frameworks
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_a_row_for_everything_it_compares(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, rows = SCRIPTS[name]
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    found = script["main"](arguments)
    lines = capsys.readouterr().out.splitlines()
    assert list(found) == list(script[rows])
    assert all(sum(line.startswith(f"{row} ") for line in lines) == 1 for row in script[rows])


@pytest.mark.parametrize("name", sorted(OURS))
def test_an_example_is_listed_in_the_documentation(name: str) -> None:
    page = (ROOT / "docs" / "use" / "examples.md").read_text(encoding="utf-8")
    assert f"`examples/{name}`" in page


def test_every_example_is_run_by_a_test() -> None:
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    others = [text for text in tests if "examples" in text]
    untested = {name for name in there - OURS if not any(Path(name).stem in t for t in others)}
    assert untested == set()
