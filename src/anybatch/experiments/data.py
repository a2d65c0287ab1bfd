"""Data sets as tensors, read from files that are never unpickled."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybatch.experiments.config import Run

HELD_OUT_DIGITS = 500
_CIFAR_FOLDERS = {
    "cifar10": ("", "cifar10", "cifar-10-batches-bin"),
    "cifar100": ("", "cifar100", "cifar-100-binary"),
}
_STATISTICS = {  # of the whole training sets, channels red, green, blue
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_SHARD, _SHARD_ROW, _SIDE = 5000, 100, 32
_MOST_CLASSES = 100_000  # a label beyond is a mistake, and would ask for a network as wide
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class Dataset:
    """A data set, standardized.

    Attributes:
        name: Of the data.
        train_x: Training examples, float32, ``(N, ...)``.
        train_y: Their classes.
        test_x: Held-out examples.
        test_y: Their classes.
        classes: Number of classes.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.train_x.shape[1:])


def load(run: Run) -> Dataset:
    """Load the data of a run.

    Args:
        run: Its data, root, image_size and train_size are used.

    Returns:
        The data.

    Raises:
        ValueError: If files are missing, incomplete or of another form.
    """
    data = _LOADERS[run.data](run)
    if run.train_size is None:
        return data
    if run.train_size > len(data.train_x):
        raise ValueError(
            f"train_size={run.train_size}: give a number from 1 to {len(data.train_x)}, "
            f"the training examples there are in {data.name}"
        )
    part = slice(run.train_size)
    return Dataset(
        data.name, data.train_x[part], data.train_y[part], data.test_x, data.test_y, data.classes
    )


def augment(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Flip each picture with a chance of a half, and crop it at a random shift.

    Args:
        x: ``(N, C, H, W)``.
        generator: Draws flips and shifts.
        pad: Largest shift, in pixels; what comes in is 0.

    Returns:
        Pictures of the same size.
    """
    n, _, height, width = x.shape
    flips = torch.rand(n, generator=generator) < 0.5
    shifts = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator)
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    rows = (shifts[:, :1] + torch.arange(height)).view(n, 1, height, 1)
    columns = shifts[:, 1:] + torch.arange(width)
    columns = torch.where(flips[:, None], columns.flip(1), columns).view(n, 1, 1, width)
    examples = torch.arange(n).view(n, 1, 1, 1)
    channels = torch.arange(x.shape[1]).view(1, -1, 1, 1)
    return padded[examples, channels, rows, columns]


# --- digits ----------------------------------------------------------------


def _digits(run: Run) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data='digits': they come with scikit-learn; pip install 'anybatch[experiments]'"
        ) from error
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)
    y = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:HELD_OUT_DIGITS], order[HELD_OUT_DIGITS:]
    x = (x - x[train].mean()) / x[train].std()
    return Dataset("digits", x[train], y[train], x[test], y[test], 10)


# --- CIFAR -----------------------------------------------------------------


def _cifar(run: Run) -> Dataset:
    root = _root(run)
    looked = [root / part for part in _CIFAR_FOLDERS[run.data]]
    for folder in looked:
        read = _cifar_reader(run.data, folder)
        if read is not None:
            parts = read("train"), read("test")
            return _standardized(run.data, *parts, 10 if run.data == "cifar10" else 100)
    pickled = [f for f in looked if any(f.glob("data_batch_1")) or (f / "train").is_file()]
    hint = f"{pickled[0]} holds the Python version, which is never unpickled; " if pickled else ""
    raise ValueError(
        f"root={str(root)!r}: no {run.data} in {', '.join(map(str, looked))}; {hint}give the "
        "folder of its binary version (.bin files), or of mosaics (train-00.webp and on, "
        "test-00.webp and on, labels.npz)"
    )


def _cifar_reader(name: str, folder: Path) -> Callable[[str], Arrays] | None:
    if (folder / "labels.npz").is_file() or any(folder.glob("*-[0-9][0-9].webp")):
        return lambda split: _mosaics(folder, split)
    if any(folder.glob("*.bin")):
        return lambda split: _binary(name, folder, split)
    return None


def _binary(name: str, folder: Path, split: str) -> Arrays:
    """The binary version: a record is one label byte (CIFAR-100: two) and 3,072 pixels."""
    if name == "cifar100":
        files, labels = [folder / f"{split}.bin"], 2
    else:
        numbers = range(1, 6)
        training = [folder / f"data_batch_{k}.bin" for k in numbers]
        files, labels = (training if split == "train" else [folder / "test_batch.bin"]), 1
    there = [file for file in files if file.is_file()]
    if not there:
        raise ValueError(f"root={str(folder)!r}: {files[0].name} is missing; it holds the {split}")
    record = labels + 3 * _SIDE * _SIDE
    parts = []
    for file in there:
        data = np.fromfile(file, np.uint8)
        if not data.size or data.size % record:
            raise ValueError(
                f"{file}: {data.size} bytes are no whole number of {record}-byte records; "
                "fetch the file again"
            )
        parts.append(data.reshape(-1, record))
    table = np.concatenate(parts)
    x = table[:, labels:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(x), table[:, labels - 1].astype(np.int64)


def _mosaics(folder: Path, split: str) -> Arrays:
    """Lossless mosaics of 5,000 pictures, 100 a row; shard k has the labels from 5,000 k on."""
    labels = _arrays(folder / "labels.npz", (split,))[0]
    files = sorted(folder.glob(f"{split}-[0-9][0-9].webp"))
    if not files:
        raise ValueError(f"root={str(folder)!r}: {split}-00.webp and on are missing")
    pictures, classes = [], []
    for file in files:
        first = int(file.stem[-2:]) * _SHARD
        pixels = _picture(file)
        rows = _SHARD // _SHARD_ROW
        if pixels.shape != (rows * _SIDE, _SHARD_ROW * _SIDE, 3) or first + _SHARD > len(labels):
            raise ValueError(f"{file}: {pixels.shape} pixels are no mosaic of {_SHARD} pictures")
        grid = pixels.reshape(rows, _SIDE, _SHARD_ROW, _SIDE, 3).swapaxes(1, 2)
        pictures.append(grid.reshape(_SHARD, _SIDE, _SIDE, 3))
        classes.append(labels[first : first + _SHARD].astype(np.int64))
    return np.concatenate(pictures), np.concatenate(classes)


def _standardized(name: str, train: Arrays, test: Arrays, classes: int) -> Dataset:
    if name in _STATISTICS:
        mean, std = (np.array(values, np.float32) for values in _STATISTICS[name])
    else:
        pixels = train[0].astype(np.float32) / 255
        mean, std = pixels.mean((0, 1, 2)), np.maximum(pixels.std((0, 1, 2)), 1e-3)

    def tensors(part: Arrays) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy((part[0].astype(np.float32) / 255 - mean) / std)
        return x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(part[1])

    return Dataset(name, *tensors(train), *tensors(test), classes)


# --- folders of pictures, arrays ---------------------------------------------


def _imagefolder(run: Run) -> Dataset:
    root = _root(run)
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        there = sorted(path.name for path in root.iterdir())[:8]
        raise ValueError(
            f"root={str(root)!r}: it needs the folders train and test (or val), each with a folder "
            f"a class; it has {', '.join(there) or 'nothing'}"
        )
    names = sorted(path.name for path in train.iterdir() if path.is_dir())
    if len(names) < 2:
        raise ValueError(f"root={str(train)!r}: it needs two class folders or more, not {names}")
    strange = sorted(p.name for p in test.iterdir() if p.is_dir() and p.name not in names)
    if strange:
        raise ValueError(f"root={str(test)!r}: the classes {strange} are not in {train}")
    pictures = _class_folders(train, names, run.image_size)
    held_out = _class_folders(test, names, run.image_size)
    return _standardized(root.name, pictures, held_out, len(names))


def _class_folders(folder: Path, names: list[str], size: int) -> Arrays:
    pictures, classes = [], []
    for label, name in enumerate(names):
        for file in sorted((folder / name).glob("*")):
            if file.suffix.lower() in _PICTURES:
                pictures.append(_picture(file, size))
                classes.append(label)
    if not pictures:
        raise ValueError(f"root={str(folder)!r}: no pictures ({', '.join(_PICTURES)}) in it")
    return np.stack(pictures), np.array(classes, np.int64)


def _picture(file: Path, size: int | None = None) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
            return np.asarray(rgb if size is None else rgb.resize((size, size)), np.uint8)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not a picture that can be read ({error})") from error


def _npz(run: Run) -> Dataset:
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays = []
    for name, array in zip(names, _arrays(_root(run), names), strict=True):
        if array.dtype.kind not in ("biuf" if name.startswith("x") else "iu"):
            wanted = "numbers" if name.startswith("x") else "whole numbers from 0 on"
            raise ValueError(f"root={run.root!r}: {name} is of type {array.dtype}; give {wanted}")
        plain = array.astype(np.float32) if name.startswith("x") else array.astype(np.int64)
        arrays.append(torch.from_numpy(plain))
    (train_x, test_x), (train_y, test_y) = arrays[::2], arrays[1::2]
    for kind, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.dim() < 2 or y.dim() != 1 or len(x) != len(y) or not len(x):
            raise ValueError(
                f"root={run.root!r}: x_{kind} {tuple(x.shape)} and y_{kind} {tuple(y.shape)} need "
                "the shapes (N, ...) and (N,)"
            )
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"root={run.root!r}: examples of x_train are {tuple(train_x.shape[1:])}, "
            f"those of x_test {tuple(test_x.shape[1:])}"
        )
    labels = torch.cat([train_y, test_y])
    if not 0 <= int(labels.min()) <= int(labels.max()) < _MOST_CLASSES:
        raise ValueError(
            f"root={run.root!r}: y_train and y_test need whole numbers from 0 on, below "
            f"{_MOST_CLASSES}; they go from {int(labels.min())} to {int(labels.max())}"
        )
    for kind, x in (("train", train_x), ("test", test_x)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"root={run.root!r}: x_{kind} has values that are not finite")
    mean, std = train_x.mean(), train_x.std().clamp(min=1e-6)
    classes = int(labels.max()) + 1
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    name = Path(str(run.root)).stem
    return Dataset(name, train_x, train_y, test_x, test_y, classes)


def _arrays(file: Path, names: tuple[str, ...]) -> list[NDArray[np.generic]]:
    """Arrays of a ``.npz`` file; one with objects in it is refused, for it would be unpickled."""
    if not file.is_file():
        raise ValueError(f"root={str(file)!r}: there is no such file; give one with {names}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{file}: it has no array {error}; it needs {', '.join(names)}") from error
    except Exception as error:  # numpy and zipfile raise many kinds for a broken file
        raise ValueError(f"{file}: cannot be read ({error})") from error


def _root(run: Run) -> Path:
    if run.root is None:
        raise ValueError(f"root=None: data={run.data!r} is read from files, give them with --root")
    root = Path(run.root)
    if not root.exists():
        raise ValueError(f"root={run.root!r}: there is nothing of that name")
    return root


_LOADERS: dict[str, Callable[[Run], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagefolder": _imagefolder,
    "npz": _npz,
}
