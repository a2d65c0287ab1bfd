"""Every reproduced number in the documentation is what the rows behind it say."""

from pathlib import Path

from papers.reproduction.pages import PAGE, pages, stored
from papers.reproduction.results import backing
from papers.reproduction.spec import reproductions

DOCS = Path(__file__).resolve().parents[3] / "docs"
AGAIN = "run: python -m papers --draw --docs docs"


def test_pages_are_what_their_rows_say() -> None:
    for path, text in pages(DOCS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}; {AGAIN}"


def test_every_row_backs_a_number() -> None:
    rows = stored(DOCS)
    used = {
        row["id"]
        for one in reproductions().values()
        for size in one.sizes.values()
        for row in backing(one, size, rows)
    }
    assert used == set(rows), AGAIN


def test_rows_say_how_they_were_made() -> None:
    for row in stored(DOCS).values():
        assert row["command"].startswith(("anybatch reproduce ", "python -m papers "))
        assert row["made_with"]["commit"], row["id"]
        assert {"anybatch", "torch", "processor", "device"} <= set(row["made_with"])


def test_every_image_of_the_page_is_there() -> None:
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("!["):
            assert ((DOCS / PAGE).parent / line.partition("](")[2].rstrip(")")).is_file()
