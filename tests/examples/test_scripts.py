"""The scripts in examples/ run on tiny settings, and show what their guides say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-3  # percent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vowels(tmp_path: Path) -> Path:
    """Two files in the form of aeon's, with a few speakers of their own pitch."""
    generator = np.random.default_rng(0)
    for split in ("TRAIN", "TEST"):
        lines = ["@classLabel true 1 2 3", "@data"]
        for number in range(18):
            frames = generator.normal(number % 3, 1, (12, generator.integers(7, 30)))
            series = [",".join(f"{value:.4f}" for value in row) for row in frames]
            lines.append(":".join([*series, str(number % 3 + 1)]))
        (tmp_path / f"JapaneseVowels_{split}.ts").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.exhaustive
def test_the_speech_script_shows_that_padding_moves_nothing_with_zero(vowels: Path) -> None:
    plain, masked = "batch norm", "batch norm, masked, zero=True"
    arguments = ["--data", str(vowels), "--seeds", "1", "--epochs", "1", "--ways", plain, masked]
    found = script("speech").main(arguments)
    assert found[plain][0]["scores move"] > 1
    assert found[masked][0]["scores move"] < LIMIT
    assert found[masked][0]["answers changed"] == 0
    assert found[masked][0]["alone"] == found[masked][0]["padded"]


def test_the_speech_script_says_where_data_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install aeon"):
        script("speech").main([])


@pytest.mark.exhaustive
def test_the_pendulum_script_trains_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium", reason="the script is for gymnasium")
    pendulum = script("pendulum")
    monkeypatch.setattr(pendulum, "RANDOM_STEPS", 20)
    monkeypatch.setattr(pendulum, "BATCH", 8)
    found = pendulum.main(["--norms", "anybatch", "none", "--seeds", "1", "--steps", "40"])
    for scores in found.values():
        assert len(scores[0]) == 4
        assert all(-2000 < value < 0 for value in scores[0])
    assert found["anybatch"] != found["none"]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Images and classes in the form of CamVid."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("images", "labels"):
            (tmp_path / split / name).mkdir(parents=True)
        for number in range(3):
            classes = np.repeat(np.arange(12, dtype=np.uint8), 10)[:, None].repeat(160, 1)
            bright = np.linspace(0, 90, 160).astype(int)[:, None]  # tiles differ
            image = classes[..., None] * 10 + bright + generator.integers(0, 30, (120, 160, 3))
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / split / f"images/{number}.png")
            Image.fromarray(classes).save(tmp_path / split / f"labels/{number}.png")
    return tmp_path


@pytest.mark.exhaustive
def test_the_tiles_script_finds_seams_with_instance_norm_and_none_with_running_statistics(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    tiles = script("tiles")
    monkeypatch.setattr(tiles, "RECALIBRATED", 2)
    arguments = ["--data", str(scenes), "--seeds", "1", "--steps", "4"]
    found = tiles.main([*arguments, "--methods", "in", "bn", "mabn"])
    assert found["in"][0]["seam"] > 0.1
    assert found["bn"][0]["seam"] < LIMIT
    assert found["mabn"][0]["seam"] < LIMIT


def test_tiles_cover_an_image_and_agree_with_a_network_of_one_pixel() -> None:
    sys.path.insert(0, str(ROOT))
    tiles = script("tiles")
    sys.path.remove(str(ROOT))
    x = torch.randn(1, 3, tiles.SIZE, 160)
    found = tiles.tiles(torch.nn.Identity(), x)
    torch.testing.assert_close(tiles.joined(found, x), x)
    pairs = list(tiles.overlaps(found))
    assert len(pairs) == 9
    for one, other in pairs:
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("tabular", ["--seeds", "0"], "--seeds and --epochs: give whole numbers from 1 on"),
        ("tabular", ["--epochs", "-1"], "--seeds and --epochs: give whole numbers from 1 on"),
        ("fine_tuning", ["--epochs", "0"], "give whole numbers from 1 on"),
        ("detection", ["--images", "0"], "--seeds, --epochs and --images: give whole numbers"),
        ("segmentation", ["--images", "0"], "give whole numbers from 1 on"),
        ("volumes", ["--volumes", "1"], "--volumes: give 2 or more"),
        ("volumes", ["--accumulate", "0"], "give whole numbers from 1 on"),
        ("speech", ["--data", "/nowhere"], "it has no JapaneseVowels_TRAIN.ts and no Japanese"),
        ("tiles", ["--data", "x", "--steps", "0"], "give whole numbers from 1 on"),
    ],
)
def test_a_wrong_argument_of_a_script_is_named(
    name: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(name).main(arguments)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(importlib.util.find_spec("gymnasium") is not None, reason="it is installed")
def test_the_pendulum_script_says_what_it_needs() -> None:
    with pytest.raises(SystemExit, match="pip install gymnasium"):
        script("pendulum")
