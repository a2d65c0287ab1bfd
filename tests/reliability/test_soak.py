"""The soak of benchmarks/soak.py: that it runs, and that it notices what grows."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_every_method_has_its_turn(soak: ModuleType) -> None:
    chance, base = soak.random.Random(0), soak.network()
    for method in soak.anybatch.METHODS:
        base, steps = soak.one_round(base, method, chance)
        assert steps == 12
        assert {type(m).__name__ for m in base if "Norm" in type(m).__name__} == {"BatchNorm2d"}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_few_seconds_of_it(soak: ModuleType) -> None:
    samples = soak.soak(minutes=0.05, every=0.05, seed=0)
    assert samples[-1].rounds >= len(samples) > 0
    assert samples[-1].steps == 12 * samples[-1].rounds
    assert samples[-1].mebibytes > 10
    assert samples[-1].tensors > 1000  # what is kept of numbers


@pytest.mark.parametrize(
    ("leak", "failed"),
    [({}, 0), ({"mebibytes": 0.4}, 1), ({"tensors": 0.5}, 1), ({"objects": 99}, 0)],
)
def test_memory_that_grows_fails_the_soak(
    soak: ModuleType,
    leak: dict[str, float],
    failed: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So much a second; what falls or jumps in the warm-up does not count."""
    usual = {"rounds": 1, "steps": 12, "mebibytes": 300, "tensors": 50, "objects": 1000}
    samples = [
        soak.Sample(seconds, **{k: v + leak.get(k, 0) * seconds for k, v in usual.items()})
        for seconds in range(15, 61)
    ]
    samples.insert(0, soak.Sample(1, 0, 0, 100, 9, 9))
    monkeypatch.setattr(soak, "soak", lambda *_: samples)
    path = tmp_path / "soak.csv"
    monkeypatch.setattr(sys, "argv", ["soak", "--csv", str(path)])
    assert soak.main() == failed
    assert ("memory grows" in capsys.readouterr().out) == bool(failed)
    assert len(path.read_text().splitlines()) == 48
