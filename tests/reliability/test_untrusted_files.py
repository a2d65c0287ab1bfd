"""Files from outside: whatever is in them, they are read, or refused in one line."""

import io
import json
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from anybatch.tools.checkpoint import read_checkpoint
from anybatch.tools.config import read_config
from anybatch.tools.data import load
from anybatch.tools.run import Run
from anybatch.tools.training import train

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
THOUSANDS = settings(QUICK, max_examples=2200, derandomize=True)


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def checkpoint() -> bytes:
    file = io.BytesIO()
    torch.save({"model": nn.BatchNorm1d(3).state_dict(), "run": Run().as_dict()}, file)
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def read_npz(content: bytes, folder: Path) -> Any:
    path = folder / "data.npz"
    path.write_bytes(content)
    return load(Run(data="npz", root=str(path)))


def read_bin(content: bytes, folder: Path) -> Any:
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(content)
    return load(Run(data="cifar10", root=str(folder), model="resnet8"))


def read_folder(content: bytes, folder: Path) -> Any:
    for split in ("train", "test"):
        for name in "ab":
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            (place / "picture.png").write_bytes(content)
    return load(Run(data="imagefolder", root=str(folder), model="resnet8"))


def read_toml(content: bytes, folder: Path) -> Any:
    path = folder / "run.json"
    path.write_bytes(content)
    return read_config(path)


def read_pt(content: bytes, folder: Path) -> Any:
    path = folder / "weights.pt"
    path.write_bytes(content)
    return read_checkpoint(path)


def go_on(content: bytes, folder: Path) -> Any:
    """A run whose own checkpoint was tampered with."""
    run = Run(epochs=1, train_size=16, batch_size=16)
    path = folder / "runs" / f"{run.key}.ckpt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return train(run, folder)


X, Y = np.zeros((3, 4), np.float32), np.arange(3)
READERS: dict[str, tuple[Callable[[bytes, Path], Any], list[bytes]]] = {
    "arrays": (read_npz, [archive(x_train=X, y_train=Y, x_test=X, y_test=Y)]),
    "cifar": (read_bin, [bytes(2 * 3073)]),
    "pictures": (read_folder, [picture("PNG"), picture("JPEG"), picture("GIF")]),
    "configuration": (read_toml, [json.dumps({"epochs": 3, "option": ["a=1"]}).encode()]),
    "weights": (read_pt, [checkpoint()]),
    "run": (go_on, [checkpoint()]),
}


@st.composite
def damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """A file that was whole: cut, overwritten, lengthened, or another altogether."""
    content = bytearray(draw(st.sampled_from(whole)))
    kind = draw(st.sampled_from(["as it is", "cut", "overwritten", "inserted", "other"]))
    if kind == "other":
        return draw(st.binary(max_size=400))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        del content[place:]
    elif kind == "overwritten":
        for _ in range(draw(st.integers(1, 8))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    elif kind == "inserted":
        content[place:place] = draw(st.binary(min_size=1, max_size=40))
    return bytes(content)


def is_read_or_refused(reader: Callable[[bytes, Path], Any], content: bytes) -> None:
    # Any other error than a ValueError fails the test.
    with tempfile.TemporaryDirectory() as folder, suppress(ValueError):
        reader(content, Path(folder))


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str) -> None:
    reader, whole = READERS[name]

    @QUICK
    @given(damaged(whole))
    def check(content: bytes) -> None:
        is_read_or_refused(reader, content)

    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_damaged_files_are_read_or_refused(name: str) -> None:
    reader, whole = READERS[name]

    @THOUSANDS
    @given(damaged(whole))
    def check(content: bytes) -> None:
        is_read_or_refused(reader, content)

    check()


# --- files that mean harm, or nonsense ------------------------------------------------


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(Path(tempfile.gettempdir()) / "anybatch-was-here"), "w")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    marker = Path(tempfile.gettempdir()) / "anybatch-was-here"
    marker.unlink(missing_ok=True)
    objects = np.empty(1, object)
    objects[0] = Harmful()
    file = io.BytesIO()
    np.savez(file, x_train=objects, y_train=Y, x_test=X, y_test=Y)
    saved = io.BytesIO()
    torch.save({"model": Harmful()}, saved)
    attempts = [
        (read_npz, file.getvalue()),
        (read_pt, saved.getvalue()),
        (read_pt, pickle.dumps(Harmful())),
        (go_on, saved.getvalue()),
    ]
    for reader, content in attempts:
        with pytest.raises(ValueError, match="cannot"):
            reader(content, tmp_path)
    assert not marker.exists()


def test_a_name_in_an_archive_leads_nowhere(tmp_path: Path) -> None:
    file = io.BytesIO(archive(x_train=X, y_train=Y, x_test=X, y_test=Y))
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("../../escaped.npy", b"x")
    (tmp_path / "inner" / "folder").mkdir(parents=True)
    read_npz(file.getvalue(), tmp_path / "inner" / "folder")
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y_train": np.array([0, 1, 2**62])}, "y_train and y_test"),
        ({"y_train": np.array([0, 1, -1])}, "whole numbers from 0 on"),
        ({"y_train": np.array(["a", "b", "c"])}, "y_train"),
        ({"x_train": np.array([["a"] * 4] * 3)}, "x_train"),
        ({"x_train": X.astype(complex)}, "x_train"),
        ({"x_train": np.full((3, 4), np.nan, np.float32)}, "x_train"),
        ({"x_train": np.zeros((0, 4)), "y_train": np.zeros(0, int)}, "x_train"),
        ({"x_test": np.zeros((3, 5))}, "x_test"),
    ],
)
def test_arrays_that_make_no_data_are_refused(tmp_path: Path, arrays: dict, words: str) -> None:
    whole = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y, **arrays}
    with pytest.raises(ValueError, match=words):
        read_npz(archive(**whole), tmp_path)


def test_a_shape_that_promises_more_than_there_is(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }"
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    file = io.BytesIO(archive(y_train=Y, x_test=X, y_test=Y))
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("x_train.npy", array)
    with pytest.raises(ValueError, match="cannot be read"):
        read_npz(file.getvalue(), tmp_path)
