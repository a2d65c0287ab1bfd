"""The distribution: the wheel holds the library only, the sdist the papers as well."""

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_the_library_only(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (made,) = wheel.build(directory=str(tmp_path))
    names = zipfile.ZipFile(made).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"anybatch"}
    assert any(name.endswith("tools/templates/compare.html.j2") for name in names)
    assert not any("papers" in name or "test_" in name for name in names)


def test_the_source_distribution_holds_the_papers_and_the_tests(tmp_path: Path) -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist").SdistBuilder(str(ROOT))
    (made,) = sdist.build(directory=str(tmp_path))
    with tarfile.open(made) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"src/anybatch/__init__.py", "papers/__main__.py", "papers/specs/recovery.json"} <= names
    assert "tests/package/test_distribution.py" in names


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_pyproject_lists_the_library_alone_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    targets = settings["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["packages"] == ["src/anybatch"]
    asked = [
        name for names in settings["project"]["optional-dependencies"].values() for name in names
    ]
    assert not any(name.startswith(("torchvision", "torchaudio", "timm")) for name in asked)
