"""Data sets as tensors, read from files that are never unpickled."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anybatch.tools.examples import Unread
from anybatch.tools.images import ImageFiles, files_by_class, read_image
from anybatch.tools.run import Run

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
_SPLITS = {"train": "training", "test": "held-out"}
_SOURCES = {  # where to get what is missing
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-10 binary version)",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-100 binary version)",
    "imagenet": "https://www.image-net.org/download.php (ILSVRC 2012; sort val by class, too)",
}

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class Dataset:
    """A data set, standardized where it is not bytes.

    Attributes:
        name: Of the data.
        train_x: Training examples, float32, ``(N, ...)``, or images as bytes, which are
            standardized batch by batch; images in files are read as they are needed.
        train_y: Their targets: classes, or of each pixel, or boxes, as the objective has it.
        test_x: Held-out examples.
        test_y: Their targets.
        classes: Number of classes.
        network: Builds the network; None: as the run says.
    """

    name: str
    train_x: Tensor | Unread
    train_y: Tensor
    test_x: Tensor | Unread
    test_y: Tensor
    classes: int
    network: Callable[[], nn.Module] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: str) -> "Dataset":
        """The data on a device; what is read when it is needed stays where it is until then."""

        def moved(x: Tensor | Unread) -> Tensor | Unread:
            return x.to(device) if isinstance(x, Tensor) else x

        return replace(
            self,
            train_x=moved(self.train_x),
            train_y=self.train_y.to(device),
            test_x=moved(self.test_x),
            test_y=self.test_y.to(device),
        )

    def only(self, train: slice | Tensor, test: slice | Tensor) -> "Dataset":
        """Some of the training and of the held-out examples."""
        return replace(
            self,
            train_x=self.train_x[train],
            train_y=self.train_y[train],
            test_x=self.test_x[test],
            test_y=self.test_y[test],
        )


def load(run: Run) -> Dataset:
    """Load the data of a run.

    Raises:
        ValueError: If files are missing, incomplete or of another form.
    """
    data = LOADERS["own" if run.has_own_data else run.data](run)
    if run.validation_size is not None:
        data = _validation(data, run.validation_size)
    for name, wanted in (("train", run.train_size), ("test", run.test_size)):
        there = len(data.train_y if name == "train" else data.test_y)
        if wanted is not None and wanted > there:
            raise ValueError(
                f"{name}_size={wanted}: give a number from 1 to {there}, "
                f"the {_SPLITS[name]} examples there are in {data.name}"
            )
    return data.only(slice(run.train_size), slice(run.test_size))


def _validation(data: Dataset, size: int) -> Dataset:
    """Hold out a part of the training examples, always the same one, in place of the test set."""
    there = len(data.train_y)
    if size >= there:
        raise ValueError(
            f"validation_size={size}: give a number from 1 to {there - 1}, to hold out of the "
            f"{there} training examples in {data.name}"
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(0))
    held_out, kept = order[:size], order[size:]
    everything = replace(data, test_x=data.train_x, test_y=data.train_y)
    return everything.only(kept, held_out)


def steps_per_epoch(run: Run, data: Dataset) -> int:
    """Whole batches in the training set; a smaller last one is left out for every method."""
    steps = len(data.train_y) // run.batch_size
    if steps == 0:
        raise ValueError(
            f"batch_size={run.batch_size}: give a number from 1 to {len(data.train_y)}, "
            "the training examples there are"
        )
    return steps


def shuffled(run: Run, data: Dataset, epoch: int) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Yield the examples of each batch of an epoch; all follows from seed and epoch alone.

    Yields:
        Numbers of the examples, and what draws their noise and augmentation.
    """
    generator = torch.Generator().manual_seed(run.seed * 100_003 + epoch)
    order = torch.randperm(len(data.train_x), generator=generator)
    for step in range(steps_per_epoch(run, data)):
        yield order[step * run.batch_size : (step + 1) * run.batch_size], generator


def noisy(run: Run, x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch with the run's noise, which is drawn where the generator is."""
    if not run.input_noise:
        return x
    return x + run.input_noise * torch.randn(x.shape, generator=generator).to(x.device)


def augment(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Flip each image with a chance of a half, and crop it at a random shift.

    Shifts are of up to `pad` pixels; what comes in is 0.
    """
    n, _, height, width = x.shape
    # Drawn on the generator's device, so that every device sees the same images.
    flips = (torch.rand(n, generator=generator) < 0.5).to(x.device)
    shifts = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator).to(x.device)
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    rows = (shifts[:, :1] + torch.arange(height, device=x.device)).view(n, 1, height, 1)
    columns = shifts[:, 1:] + torch.arange(width, device=x.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns).view(n, 1, 1, width)
    examples = torch.arange(n, device=x.device).view(n, 1, 1, 1)
    channels = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return padded[examples, channels, rows, columns]


# --- digits ----------------------------------------------------------------


def _digits(run: Run) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data='digits': they come with scikit-learn; pip install 'anybatch[tools]'"
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
    root = data_root(run)
    looked = [root / part for part in _CIFAR_FOLDERS[run.data]]
    for folder in looked:
        read = _cifar_reader(run.data, folder)
        if read is not None:
            most = run.train_size if run.validation_size is None else None
            parts = read("train", most), read("test", run.test_size)
            return _standardized(run.data, *parts, 10 if run.data == "cifar10" else 100)
    pickled = [f for f in looked if any(f.glob("data_batch_1")) or (f / "train").is_file()]
    hint = f"{pickled[0]} holds the Python version, which is never unpickled; " if pickled else ""
    raise ValueError(
        f"root={str(root)!r}: no {run.data} in {', '.join(map(str, looked))}; {hint}give the "
        "folder of its binary version (.bin files), or of mosaics (train-00.webp and on, "
        f"test-00.webp and on, labels.npz); it is at {_SOURCES[run.data]}"
    )


def _cifar_reader(name: str, folder: Path) -> Callable[[str, int | None], Arrays] | None:
    """Reads a split; of mosaics no more than there is need of, for decoding them takes time."""
    if (folder / "labels.npz").is_file() or any(folder.glob("*-[0-9][0-9].webp")):
        return lambda split, most: _mosaics(folder, split, most)
    if any(folder.glob("*.bin")):
        return lambda split, _: _binary(name, folder, split)
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


def _mosaics(folder: Path, split: str, most: int | None) -> Arrays:
    """Lossless mosaics of 5,000 images, 100 a row; shard k has the labels from 5,000 k on."""
    labels = _arrays(folder / "labels.npz", (split,))[0]
    files = sorted(folder.glob(f"{split}-[0-9][0-9].webp"))
    if not files:
        raise ValueError(f"root={str(folder)!r}: {split}-00.webp and on are missing")
    images, classes = [], []
    for file in files if most is None else files[: -(-most // _SHARD)]:
        first = int(file.stem[-2:]) * _SHARD
        pixels = read_image(file, lambda image: image)
        rows = _SHARD // _SHARD_ROW
        if pixels.shape != (rows * _SIDE, _SHARD_ROW * _SIDE, 3) or first + _SHARD > len(labels):
            raise ValueError(f"{file}: {pixels.shape} pixels are no mosaic of {_SHARD} images")
        grid = pixels.reshape(rows, _SIDE, _SHARD_ROW, _SIDE, 3).swapaxes(1, 2)
        images.append(grid.reshape(_SHARD, _SIDE, _SIDE, 3))
        classes.append(labels[first : first + _SHARD].astype(np.int64))
    return np.concatenate(images), np.concatenate(classes)


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


# --- folders of images, arrays ---------------------------------------------


def _imagefolder(run: Run) -> Dataset:
    def read(files: list[Path]) -> NDArray[np.uint8]:
        size = (run.image_size, run.image_size)
        squares = [read_image(file, lambda x: x.convert("RGB").resize(size)) for file in files]
        return np.stack(squares)

    (train, train_y), (test, test_y), classes = _splits(run)
    return _standardized(data_root(run).name, (read(train), train_y), (read(test), test_y), classes)


def _imagenet(run: Run) -> Dataset:
    (train, train_y), (test, test_y), classes = _splits(run)
    # A first part of the files would be of the first classes only.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    mixed = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return Dataset(
        data_root(run).name,
        ImageFiles(train, run.image_size)[order],
        torch.from_numpy(train_y)[order],
        ImageFiles(test, run.image_size)[mixed],
        torch.from_numpy(test_y)[mixed],
        classes,
    )


Split = tuple[list[Path], NDArray[np.int64]]


def _splits(run: Run) -> tuple[Split, Split, int]:
    """Files and classes of the training and the held-out images, and the number of classes."""
    root = data_root(run)
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        there = sorted(path.name for path in root.iterdir())[:8]
        source = f"; ImageNet is at {_SOURCES['imagenet']}" if run.data == "imagenet" else ""
        raise ValueError(
            f"root={str(root)!r}: it needs the folders train and test (or val), each with a folder "
            f"a class; it has {', '.join(there) or 'nothing'}{source}"
        )
    names = sorted(path.name for path in train.iterdir() if path.is_dir())
    if len(names) < 2:
        raise ValueError(f"root={str(train)!r}: it needs two class folders or more, not {names}")
    strange = sorted(p.name for p in test.iterdir() if p.is_dir() and p.name not in names)
    if strange:
        raise ValueError(f"root={str(test)!r}: the classes {strange} are not in {train}")

    def split(folder: Path) -> Split:
        files, classes = files_by_class(folder, names, root)
        return files, np.array(classes, np.int64)

    return split(train), split(test), len(names)


def _npz(run: Run) -> Dataset:
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays = []
    for name, array in zip(names, _arrays(data_root(run), names), strict=True):
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
    there: list[str] = []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            there = arrays.files
            return [arrays[name] for name in names]
    except Exception as error:  # numpy and zipfile raise many kinds for a broken file
        why = f"cannot be read ({error})"
        if isinstance(error, KeyError):
            known = ", ".join(there) or "none"
            why = f"it needs the arrays {', '.join(names)}, and has {known}"
        raise ValueError(f"{file}: {why}") from error


def data_root(run: Run) -> Path:
    """Return the file or folder of a run's data.

    Raises:
        ValueError: If there is none.
    """
    if run.root is None:
        raise ValueError(f"root=None: data={run.data!r} is read from files, give them with --root")
    root = Path(run.root)
    if not root.exists():
        raise ValueError(f"root={run.root!r}: there is nothing of that name")
    return root


# Loaders by name of the data. Whoever has more data sets adds theirs here.
LOADERS: dict[str, Callable[[Run], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagefolder": _imagefolder,
    "imagenet": _imagenet,
    "npz": _npz,
}
