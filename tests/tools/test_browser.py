"""Reports as a browser shows them: no error, every image, readable on a phone, by keyboard."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anybatch.cli import app

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.exhaustive,  # a browser's start takes seconds
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here"),
    pytest.mark.filterwarnings("ignore"),
]

# What the page says of itself, once everything is loaded, written where a test finds it.
PROBE = r"""
<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const images = [...document.images]
    .map(i => [i.naturalWidth, i.alt, (i.closest(".scroll") || i).clientWidth <= innerWidth]);
  const outer = [...document.querySelectorAll("[src], link[href]")]
    .map(e => e.src || e.href).filter(u => !u.startsWith("data:"));
  const links = [...document.querySelectorAll("a, button, summary, input, select")];
  const unreachable = links.filter(e => e.tabIndex < 0).length;
  const cells = [...document.querySelectorAll("td, th, p, li, h1, h2, dt, dd, pre, figcaption")];
  const small = cells.filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length;
  const light = color => { // relative luminance, WCAG 2
    const parts = color.match(/[\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = e => {
    const color = getComputedStyle(e).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
    return e.parentElement ? ground(e.parentElement) : "rgb(255, 255, 255)";
  };
  const contrast = Math.min(21, ...cells.map(e => {
    const pair = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  }));
  const paper = light(ground(document.body));
  const found = {faults, wide, images, outer, unreachable, small, contrast, paper,
    title: document.title, lang: document.documentElement.lang, width: innerWidth};
  const place = document.createElement("pre");
  place.id = "probe";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
});
</script>
"""


def look(page: Path, folder: Path, width: int, dark: bool = False) -> dict:
    """Open a page in a window so wide, in the dark or not, and read what the probe found."""
    html = page.read_text(encoding="utf-8")
    probed = folder / "probed.html"
    probed.write_text(html.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    # A window of a phone's width: browsers have a least width for windows, frames have none.
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe src="probed.html" width="{width}" height="900" style="border:0"></iframe>'
        "<script>addEventListener('load', () => { const text = document.querySelector('iframe')"
        ".contentDocument.getElementById('probe').textContent;"
        " document.title = 'ready'; document.body.innerHTML = '';"
        " document.body.append(text); });</script>"
    )
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r"<body>(\{.*\})</body>", done.stdout, re.DOTALL)
    assert match is not None, done.stdout[-500:]
    found = match[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return json.loads(found)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small reports of all commands that write one."""
    root = tmp_path_factory.mktemp("reports")

    def run(*arguments: str) -> None:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output

    short = ["--epochs", "1", "--train-size", "100"]
    run(
        "compare", *short, "--methods", "bn,mabn", "--seeds", "2", "--output", str(root / "compare")
    )
    run("diagnose", "--epochs", "0", "--max-batches", "5", "--output", str(root / "diagnose"))
    run("train", *short, "--method", "bn", "--output", str(root / "train"))
    (weights,) = (root / "train" / "runs").glob("*.pt")
    run("tune", str(weights), "--output", str(root / "tune"))
    measured = ("--model", "mlp", "--methods", "bn,gn", "--rounds", "1")
    run("bench", *measured, "--output", str(root / "bench"))
    return {path.parent.name: path for path in root.glob("*/*.html")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["compare", "diagnose", "tune", "bench"])
def test_a_report_in_a_browser(
    pages: dict[str, Path], name: str, width: int, tmp_path: Path
) -> None:
    found = look(pages[name], tmp_path, width)
    assert found["width"] == width
    assert found["faults"] == []
    assert found["outer"] == []  # one file, which asks for nothing
    assert found["title"]
    assert found["lang"] == "en"
    assert found["images"]
    for natural, alternative, fits in found["images"]:
        assert natural > 0
        assert alternative.strip()
        assert fits
    assert found["wide"] <= 0  # nothing hangs over; a wide table scrolls by itself
    assert found["unreachable"] == 0
    assert found["small"] == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["compare", "diagnose", "tune", "bench"])
def test_a_report_is_readable_by_day_and_in_the_dark(
    pages: dict[str, Path], name: str, dark: bool, tmp_path: Path
) -> None:
    found = look(pages[name], tmp_path, 390, dark)
    assert (found["paper"] < 0.1) == dark
    assert found["contrast"] >= 4.5


def test_the_probe_sees_faults(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><html><head></head><body><div style='width: 900px'>wide</div>"
        "<img src='missing.png'><p style='font-size: 8px; color: #999'>small</p>"
        "<a href='#' tabindex='-1'>no</a><script>undefined_name()</script></body></html>"
    )
    found = look(page, tmp_path, 390)
    assert found["wide"] > 0
    assert found["contrast"] < 4.5
    assert any("undefined_name" in fault for fault in found["faults"])
    assert any("missing.png" in fault for fault in found["faults"])
    assert found["images"][0][:2] == [0, ""]
    assert (found["small"], found["unreachable"]) == (1, 1)
    assert (found["title"], found["lang"]) == ("", "")
