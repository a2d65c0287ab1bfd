"""The size of the last cache, by which outputs are stored past the caches."""

import os
from pathlib import Path

import pytest

pytest.importorskip("numba")

from anybatch.backends.numba import streaming_stores

MIB = 2**20


@pytest.mark.parametrize(
    ("reported", "cores", "size"),
    [
        ("32768K\n", 2, 32 * MIB),
        ("96M\n", 16, 96 * MIB),
        ("491520K\n", 2, 32 * MIB),  # a host's, seen from a virtual machine
        ("491520K\n", 64, 480 * MIB),
        ("unknown", 64, 32 * MIB),
        (None, 1, 16 * MIB),
    ],
)
def test_last_cache_is_what_these_cores_can_have(
    reported: str | None, cores: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "size"
    if reported is not None:
        file.write_text(reported)
    monkeypatch.setattr(streaming_stores, "_REPORTED", file)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert streaming_stores.last_cache.__wrapped__() == size
