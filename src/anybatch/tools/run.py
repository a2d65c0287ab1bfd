"""The settings of a training run: everything that decides its numbers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from anybatch.core.arguments import check_choice, check_count, check_from
from anybatch.registry import get_method
from anybatch.tools.networks import LIBRARIES, MODELS, SEGMENTERS_OF_TORCHVISION

DATA = ("digits", "cifar10", "cifar100", "imagefolder", "imagenet", "npz")
PRECISIONS = ("float32", "bfloat16", "float16")
BASELINE = "torch"
NORM_DECAYS = (True, False, "auto")
Option = tuple[str, Any]
_AnyRun = TypeVar("_AnyRun", bound="Run")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        data: Name of the data set, one of `DATA`, or a user's ``module:function`` or
            ``file.py:function``, as `anybatch.tools.own_data.load_own` takes it.
        root: Folder or file of the data; None for data that need none.
        model: Name of the network, one of `MODELS`, or ``torchvision:NAME`` or ``timm:NAME``, or a
            user's ``module:function`` or ``file.py:function``.
        method: Short name of the method; "torch" keeps the network's ``torch.nn.BatchNorm`` layers.
        batch_size: Examples in a step.
        accumulate: Micro-batches per step (gradient accumulation).
        centralize: Centralize the weights of the layers that feed norms, whatever the method.
        norm_batch_size: Examples that share statistics; None is batch_size.
        small_epochs: Epochs in which norm_batch_size or accumulate cuts batches; whole batches
            follow. None is all.
        epochs: Passes over the training set.
        norm_epochs: Epochs over which `anybatch.NormScheduler` moves the norms; None is all.
        seed: Seed of weights, order, noise and augmentation.
        lr: Learning rate for 64 examples; it is scaled with batch_size.
        momentum: Momentum of SGD.
        milestones: Epochs after which the learning rate is divided by 10; if there are none, it
            falls to 0 along a cosine, step by step.
        weight_decay: Weight decay of SGD.
        norm_decay: Whether scales and shifts of norms are decayed, or "auto", as
            `anybatch.param_groups` takes it.
        gamma_target: Value that scales are decayed towards, from 0 to 1.
        noise: Standard deviation of noise added to the inputs; None is 0.3 for digits, else 0.
        augment: Whether to flip and shift training images; None is yes for CIFAR and image folders.
        image_size: Side that images of folders are resized or cropped to.
        train_size: Number of training examples to use; None is all.
        validation_size: Number of training examples to hold out in place of the test set.
        test_size: Number of held-out examples to use; None is all.
        device: Device to train on.
        precision: "float32", or "bfloat16" or "float16" by autocast.
        channels_last: Whether weights of 4 and 5 dimensions, and so what they put out, have that
            format.
        options: The method's own options, as pairs, and "centralize".
    """

    # Methods that leave the network's norms unconverted, and their titles.
    unconverted: ClassVar[Mapping[str, str]] = {BASELINE: "BatchNorm (torch)"}
    # Data sets whose training images are augmented by default.
    augmented: ClassVar[tuple[str, ...]] = ("cifar10", "cifar100", "imagefolder", "imagenet")
    # Settings added after the first results were stored. They enter the digest of a run only where
    # they are used, so that the names of older runs stay valid.
    added_later: ClassVar[tuple[str, ...]] = (
        "small_epochs",
        "norm_epochs",
        "milestones",
        "norm_decay",
        "gamma_target",
        "validation_size",
        "test_size",
        "channels_last",
    )

    data: str = "digits"
    root: str | None = None
    model: str = "mlp"
    method: str = BASELINE
    batch_size: int = 2
    norm_batch_size: int | None = None
    small_epochs: int | None = None
    accumulate: int = 1
    centralize: bool = False
    epochs: int = 12
    norm_epochs: int | None = None
    seed: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    milestones: tuple[int, ...] = ()
    weight_decay: float = 1e-4
    norm_decay: bool | Literal["auto"] = True
    gamma_target: float = 0.0
    noise: float | None = None
    augment: bool | None = None
    image_size: int = 32
    train_size: int | None = None
    validation_size: int | None = None
    test_size: int | None = None
    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    options: tuple[Option, ...] = field(default=())

    def __post_init__(self) -> None:
        self.check_data_and_model()
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("batch_size", "epochs", "image_size", "accumulate"):
            check_count(name, getattr(self, name))
        sizes = ("train_size", "validation_size", "test_size")
        for name in ("norm_batch_size", "small_epochs", "norm_epochs", *sizes):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("seed", self.seed, 0)
        for name in ("lr", "momentum", "weight_decay", "gamma_target"):
            check_from(name, getattr(self, name), 0)
        if self.gamma_target > 1:
            raise ValueError(f"gamma_target={self.gamma_target!r}: give a number from 0 to 1")
        if self.norm_decay not in NORM_DECAYS:
            raise ValueError(f"norm_decay={self.norm_decay!r}: give True, False or 'auto'")
        if list(self.milestones) != sorted({m for m in self.milestones if 0 < m < self.epochs}):
            raise ValueError(
                f"milestones={self.milestones!r}: give epochs in rising order, from 1 to "
                f"{self.epochs - 1}"
            )
        self._check_sizes()
        self.check_method()

    def _check_sizes(self) -> None:
        if self.norm_batch_size is not None and self.norm_batch_size > self.batch_size:
            raise ValueError(
                f"norm_batch_size={self.norm_batch_size}: give a number from 1 to "
                f"batch_size={self.batch_size}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: give a divisor of batch_size={self.batch_size}"
            )
        if self.small_epochs is not None and self.statistics_size == self.batch_size:
            raise ValueError(
                f"small_epochs={self.small_epochs}: give norm_batch_size or accumulate, which cut "
                "the batches of these epochs"
            )
        if self.accumulate > 1 and self.norm_batch_size is not None:
            raise ValueError(
                f"norm_batch_size={self.norm_batch_size}: leave it out with "
                f"accumulate={self.accumulate}"
            )

    def check_data_and_model(self) -> None:
        """Check that data and network exist and fit each other.

        Raises:
            ValueError: If they do not.
        """
        if not self.has_own_data:
            check_choice("data", self.data, DATA)
        library, _, name = self.model.partition(":")
        if self.has_own_data and not is_own(self.model):
            raise ValueError(
                f"model={self.model!r}: data={self.data!r} needs a network of yours, as in "
                "mine.py:network"
            )
        if is_own(self.model):
            return
        if not (name and library in LIBRARIES):
            check_choice("model", self.model, MODELS)
        elif library == "torchvision" and name.startswith(SEGMENTERS_OF_TORCHVISION):
            raise ValueError(f"model={self.model!r}: it segments images; give a classifier")
        if self.data == "digits" and self.model != "mlp":
            raise ValueError(f"model={self.model!r}: digits are 8x8, give 'mlp'")

    def check_method(self) -> None:
        """Check that the method exists and takes the options.

        Raises:
            ValueError: If it does not.
        """
        options = dict(self.options)
        if not self.converted:
            if options:
                raise ValueError(f"options={options!r}: method {self.method!r} has none")
            if self.centralize:
                raise ValueError(
                    f"centralize=True: method {self.method!r} converts nothing, give 'bn'"
                )
            return
        own = {n: v for n, v in options.items() if n != "centralize"}
        get_method(self.method).check_options(own)

    @property
    def key(self) -> str:
        """Name of the run's files, different for every run."""
        return f"{self.method}-b{self.statistics_size}-s{self.seed}-{self._digest()[:8]}"

    @property
    def identity(self) -> str:
        """16 letters of a hash of the settings, without root and device."""
        return self._digest("root", "device")[:16]

    def _digest(self, *without: str) -> str:
        added = {name: getattr(type(self), name) for name in self.added_later}
        kept = {
            name: value
            for name, value in self.as_dict().items()
            if name not in without and not (name in added and getattr(self, name) == added[name])
        }
        sources = [source(name) for name in (self.data, self.model) if is_own(name)]
        if self.root is not None and "root" not in without and Path(self.root).is_file():
            sources.append(Path(self.root))
        text = json.dumps(kept, sort_keys=True) + "".join(map(_contents, filter(None, sources)))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def task(self) -> str:
        """Key of the run's objective in `anybatch.tools.objective.OBJECTIVES`."""
        return "own" if self.has_own_data else "classification"

    @property
    def has_own_data(self) -> bool:
        """True if the data are given by a user's function."""
        return is_own(self.data)

    @property
    def data_name(self) -> str:
        """A short name of the data, for folders and titles."""
        return Path(self.data.rpartition(":")[0]).stem if self.has_own_data else self.data

    @property
    def converted(self) -> bool:
        """True if the network's norms are converted to the method."""
        return self.method not in self.unconverted

    @property
    def pretrained(self) -> bool:
        """True if the run starts from a trained network."""
        return False

    @property
    def model_name(self) -> str:
        """A short name of the network, for titles."""
        return self.model.rpartition(":")[2] if is_own(self.model) else self.model

    @property
    def at_papers_settings(self) -> bool:
        """True if methods keep their papers' settings where `anybatch.convert` chooses others."""
        return False

    @property
    def statistics_size(self) -> int:
        """Number of examples that share statistics."""
        return self.norm_batch_size or self.micro_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Number of examples per forward."""
        return self.batch_size // self.accumulate

    @property
    def label(self) -> str:
        """The method's title and its batch size."""
        title = self.unconverted.get(self.method) or get_method(self.method).title
        steps = f" x {self.accumulate}" if self.accumulate > 1 else ""
        return f"{title}, {self.statistics_size}{steps}"

    @property
    def input_noise(self) -> float:
        """Standard deviation of the input noise."""
        return (0.3 if self.data == "digits" else 0.0) if self.noise is None else self.noise

    @property
    def augments(self) -> bool:
        """True if training images are flipped and shifted."""
        return self.data in self.augmented if self.augment is None else self.augment

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        lists = {
            "options": [list(option) for option in self.options],
            "milestones": list(self.milestones),
        }
        return {**asdict(self), **lists}

    @classmethod
    def from_dict(cls: type[_AnyRun], data: dict[str, Any]) -> _AnyRun:
        """Build a run from plain data.

        Raises:
            ValueError: For a setting that a run does not have.
        """
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise ValueError(f"{name}={data[name]!r}: a run has {', '.join(sorted(known))}")
        options = tuple((str(name), value) for name, value in data.get("options", ()))
        milestones = tuple(data.get("milestones", ()))
        return cls(**{**data, "options": options, "milestones": milestones})

    def but(self: _AnyRun, **changes: Any) -> _AnyRun:
        """Return the same run with other values."""
        return replace(self, **changes)


def is_own(name: str) -> bool:
    """Check if a name of data or of a network is a user's ``module:function``."""
    return ":" in name and name.partition(":")[0] not in LIBRARIES


def source(name: str) -> Path | None:
    """The file that a user's ``module:function`` is in; None where there is none.

    Example:
        >>> source("anybatch.tools.run:Run").name
        'run.py'
    """
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        found = place
    else:
        try:
            spec = find_spec(place)
        except (ImportError, ValueError):
            return None
        found = "" if spec is None or spec.origin is None else spec.origin
    return Path(found) if found and Path(found).is_file() else None


def _contents(path: Path) -> str:
    """A hash of a file."""
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
