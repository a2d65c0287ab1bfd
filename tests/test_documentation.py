"""Every Python block in README.md and docs/ runs, and every method has a complete card."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
import typer

from anybatch import cli
from anybatch.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

FOREIGN = ["README", "quickstart", "frameworks", "deployment", "volumes"]
ALL_METHODS = "docs/methods/index.md"
FIRST_METHODS = ["mabn", "mbn", "sync", "brn"]
WORKFLOW = ["README.md", "docs/use/quickstart.md"]

HEADINGS = [
    "How to use it",
    "What it does",
    "Suggested settings",
    "Cost",
    "Evidence",
    "When not to",
    "Source",
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    """The page's Python blocks, each at its own line numbers so that errors point into the page."""
    text = page.read_text()
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in BLOCK.finditer(text)]


def example_pages() -> list:
    """Pages with code; those that run other frameworks may meet warnings of theirs."""
    marks = {page: [pytest.mark.filterwarnings("ignore")] for page in FOREIGN}
    marks["command-line"] = [pytest.mark.exhaustive]  # it runs each command
    return [
        pytest.param(page, id=name_of(page), marks=marks.get(page.stem, []))
        for page in PAGES
        if blocks(page)
    ]


@pytest.mark.parametrize("page", example_pages())
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if "onnx" in page.read_text() and torch.__version__ < "2.7":
        pytest.skip("its exporter does not know the newer onnxscript")
    names = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def card(method: str) -> str:
    return (ROOT / "docs" / "methods" / f"{method}.md").read_text()


def test_pages_for_users_are_three_screens_at_most():
    pages = [page for page in PAGES if {"use", "methods"} & set(page.parts)] + [PAGES[0]]
    long = {page.name: n for page in pages if (n := len(page.read_text().splitlines())) > 150}
    assert len(pages) > 50
    assert not long


@pytest.mark.parametrize("method", METHODS)
def test_card_has_every_heading_in_order(method):
    assert re.findall(r"^## (.+)$", card(method), re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("method", METHODS)
def test_card_has_its_picture(method):
    assert f"](images/{method}.png)" in card(method)
    picture = ROOT / "docs" / "methods" / "images" / f"{method}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", METHODS)
def test_card_is_titled_after_the_method(method):
    assert card(method).splitlines()[0] == f"# {METHODS[method].title} (`{method}`)"


@pytest.mark.parametrize("method", METHODS)
def test_card_names_every_option_and_its_default(method):
    options = METHODS[method].options.values()
    if method != "bn":  # what every layer has is on the card of the first
        options = [option for option in options if option not in shared_options()]
    for option in options:
        assert f"`{option.name}={option.default!r}`".replace("'", '"') in card(method)


def shared_options() -> list[inspect.Parameter]:
    return list(METHODS["bn"].options.values())


@pytest.mark.parametrize("method", METHODS)
def test_card_agrees_with_the_registry(method):
    exact = "yes" if METHODS[method].exact_eval else "no"
    folds = "yes" if METHODS[method].folds else "no"
    assert f"| keeps the eval output of a trained network | {exact} |" in card(method)
    assert f"| folds into the layer before it | {folds} |" in card(method)
    assert f"| when to use it | {METHODS[method].when} |" in card(method)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def row(text: str, method: str) -> str:
    """The method's row in a page's table."""
    return re.search(rf"^\| \[`{re.escape(method)}`\].*$", text, re.MULTILINE)[0]


def test_table_of_methods_is_complete():
    rows = re.findall(r"^\| \[`([a-z0-9+]+)`", read(ALL_METHODS), re.MULTILINE)
    assert set(rows) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_table_of_methods_agrees_with_the_registry(method):
    found = row(read(ALL_METHODS), method)
    assert METHODS[method].summary in found
    assert METHODS[method].when in found
    assert found.endswith("| no |") != METHODS[method].scheduled


@pytest.mark.parametrize("method", FIRST_METHODS)
def test_readme_recommends_a_method_as_the_registry_does(method):
    assert METHODS[method].when in row(read("README.md"), method)


def test_quickstart_names_every_method_that_needs_a_scheduler():
    text = read("docs/use/quickstart.md")
    section = text[text.index("## Who needs `NormScheduler`") :].split("\n## ")[0]
    items = re.findall(r"^- (.*?):", section, re.MULTILINE)
    named = {name for item in items for name in re.findall(r"`([a-z+]+)`", item)}
    assert named == {name for name, method in METHODS.items() if method.scheduled}


def test_page_that_decides_names_at_most_two_methods_per_situation():
    table = re.findall(
        r"^\| (.+) \| (.+) \| (.*)\|$", read("docs/use/which-method.md"), re.MULTILINE
    )
    assert len(table) > 10
    for _, *choices in table:
        named = [re.findall(r"`([a-z0-9+]+)`", choice) for choice in choices]
        assert all(len([n for n in names if n in METHODS]) <= 1 for names in named)


@pytest.mark.parametrize("method", FIRST_METHODS)
def test_page_that_decides_has_the_first_methods(method):
    assert re.search(rf"^\|.*\| `{method}`", read("docs/use/which-method.md"), re.MULTILINE)


def test_workflow_is_the_same_on_every_page():
    found = re.compile("<!-- workflow:start -->.*<!-- workflow:end -->", re.DOTALL)
    assert len({found.search(read(page))[0] for page in WORKFLOW}) == 1


def test_command_line_page_lists_every_option_of_compare():
    command = typer.main.get_command(cli.app).commands["compare"]
    options = {option for parameter in command.params for option in parameter.opts}
    page = (ROOT / "docs" / "use" / "command-line.md").read_text()
    documented = set(re.findall(r"^\| `(--[a-z-]+)`", page, re.MULTILINE))
    assert documented == options - {"--help", "-h"}


def test_readme_marks_where_measured_results_go():
    text = (ROOT / "README.md").read_text()
    assert text.index("<!-- results:start -->") < text.index("<!-- results:end -->")


def test_tables_of_networks_are_those_of_the_lists():
    spec = importlib.util.spec_from_file_location(
        "networks_page", ROOT / "docs" / "results" / "networks.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "results" / "networks.md").read_text(encoding="utf-8")
    assert script.filled(page) == page, "run: python docs/results/networks.py"
    assert all(f"| {name} |" in page for lists in script.TABLES.values() for name in lists.NETWORKS)
