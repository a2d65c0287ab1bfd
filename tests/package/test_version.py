"""One version, everywhere it is written."""

import re
from pathlib import Path

import anybatch

ROOT = Path(__file__).resolve().parents[2]


def test_changelog_and_citation_agree_with_the_package() -> None:
    citation = re.search(r'^version: "(.+)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert citation[1] == anybatch.__version__
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", anybatch.__version__)
