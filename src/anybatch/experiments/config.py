"""What a run is: everything that decides its numbers."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from anybatch.registry import METHODS, get_method

TASKS = {  # what is learned on which data
    "classification": ("digits", "cifar10", "cifar100", "imagefolder", "imagenet", "npz"),
    "segmentation": ("camvid",),
    "detection": ("coco",),
}
DATA = tuple(name for names in TASKS.values() for name in names)
MODELS = (
    "mlp",
    "resnet8",
    "resnet20",
    "resnet56",
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg11",
    "vgg16",
    "densenet121",
    "mobilenetv2",
    "inceptionv3",
)
SEGMENTERS = ("unet", "pspnet8", "pspnet50", "pspnet101")
SEGMENTERS_OF_TORCHVISION = ("deeplabv3_", "fcn_", "lraspp_")  # what their names begin with
DETECTORS = ("onestage", "fasterrcnn50", "fasterrcnn101", "maskrcnn50", "maskrcnn101")
TWO_STAGES = DETECTORS[1:]  # torchvision's, where installed
LIBRARIES = ("torchvision", "timm")  # whose networks are named LIBRARY:NAME, where installed
PRECISIONS = ("float32", "bfloat16", "float16")
BASELINE = "torch"
FROZEN = "frozen"
PARTS = ("all", "heads", "body")
NORM_DECAYS = (True, False, "auto")
Option = tuple[str, Any]

_LATER = (
    "norm_epochs",
    "milestones",
    "norm_decay",
    "gamma_target",
    "validation_size",
    "test_size",
    "norms",
    "weights",
)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        data: Name of the data set.
        root: Folder or file of the data; None for data that need none.
        model: Name of the network, one of `MODELS`, or of `SEGMENTERS` for data that are
            segmented, or of `DETECTORS` for data with boxes, or ``torchvision:NAME`` or
            ``timm:NAME``.
        method: Short name of the method; "torch" leaves the network's
            ``torch.nn.BatchNorm`` layers as they are, "frozen" keeps those of a detector at what
            they were loaded with: fresh ones do nothing.
        norms: Which norms of a detector are the method's: "all", those of its "heads" (the
            others are frozen where they were loaded, and group norms where they are fresh) or of
            its "body" (the heads have none).
        weights: Name of a file with the weights of a detector's ResNet, in the folder of its data;
            None: it learns from scratch.
        batch_size: Examples in a step.
        accumulate: Micro-batches that a step's examples come in (gradient accumulation).
        centralize: Centralize the weights of the layers that feed norms, whatever the method.
        norm_batch_size: Examples that share statistics; None is batch_size.
        epochs: Passes over the training set.
        norm_epochs: Epochs after which norms that change along training have arrived; None is all.
        seed: Of weights, order, noise and augmentation.
        lr: Learning rate for 64 examples; it is scaled with batch_size.
        momentum: Of SGD.
        milestones: Epochs after which the learning rate is divided by 10; none: it falls to 0
            along a cosine, by step.
        weight_decay: Of SGD.
        norm_decay: Whether scales and shifts of norms are decayed, or "auto", as
            `anybatch.param_groups` takes it.
        gamma_target: What scales are decayed towards, from 0 to 1.
        noise: Standard deviation added to the inputs; None is 0.3 for digits, else 0.
        augment: Flip and shifted crop; None is yes for CIFAR, image folders and CamVid, of which
            random parts are taken, and for pictures with boxes, which are flipped alone.
        image_size: Side that pictures of folders are resized or cropped to; of CamVid's, the
            shorter side that they are resized to; of pictures with boxes, the longer one.
        train_size: Use only so many training examples; None is all.
        validation_size: Hold out so many of the training examples, in place of the test set.
        test_size: Use only so many held-out examples; None is all.
        device: Where to train.
        precision: "float32", or "bfloat16" or "float16" by autocast.
        options: The method's own options, as pairs, and "centralize", whether the weights before
            its norms are centralized.
    """

    data: str = "digits"
    root: str | None = None
    model: str = "mlp"
    method: str = BASELINE
    batch_size: int = 2
    norm_batch_size: int | None = None
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
    norms: str = "all"
    weights: str | None = None
    options: tuple[Option, ...] = field(default=())

    def __post_init__(self) -> None:
        _choice("data", self.data, DATA)
        self._check_model()
        _choice("precision", self.precision, PRECISIONS)
        for name in ("batch_size", "epochs", "image_size", "accumulate"):
            _count(name, getattr(self, name))
        optional = ("norm_batch_size", "norm_epochs", "train_size", "validation_size", "test_size")
        for name in optional:
            if getattr(self, name) is not None:
                _count(name, getattr(self, name))
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: give a whole number from 0 on")
        for name in ("lr", "momentum", "weight_decay", "gamma_target"):
            _at_least_zero(name, getattr(self, name))
        if self.gamma_target > 1:
            raise ValueError(f"gamma_target={self.gamma_target!r}: give a number from 0 to 1")
        if self.norm_decay not in NORM_DECAYS:
            raise ValueError(f"norm_decay={self.norm_decay!r}: give True, False or 'auto'")
        if list(self.milestones) != sorted({m for m in self.milestones if 0 < m < self.epochs}):
            raise ValueError(
                f"milestones={self.milestones!r}: give epochs in rising order, from 1 to "
                f"{self.epochs - 1}"
            )
        if self.data == "digits" and self.model != "mlp":
            raise ValueError(f"model={self.model!r}: digits are 8x8, give 'mlp'")
        if self.norm_batch_size is not None and self.norm_batch_size > self.batch_size:
            raise ValueError(
                f"norm_batch_size={self.norm_batch_size}: give a number from 1 to "
                f"batch_size={self.batch_size}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: give a divisor of batch_size={self.batch_size}"
            )
        if self.accumulate > 1 and self.norm_batch_size is not None:
            raise ValueError(
                f"norm_batch_size={self.norm_batch_size}: leave it out with "
                f"accumulate={self.accumulate}"
            )
        if self.centralize and self.method in (BASELINE, FROZEN):
            raise ValueError(f"centralize=True: method {self.method!r} stays as it is, give 'bn'")
        self._check_method()

    def _check_model(self) -> None:
        names = {"segmentation": SEGMENTERS, "detection": DETECTORS}.get(self.task, MODELS)
        segmented = self.task == "segmentation"
        library, colon, name = self.model.partition(":")
        if not (colon and name and library in LIBRARIES):
            _choice("model", self.model, names)
        elif self.task == "detection" or segmented != (
            library == "torchvision" and name.startswith(SEGMENTERS_OF_TORCHVISION)
        ):
            raise ValueError(
                f"model={self.model!r}: give a network for {self.task}, which is what "
                f"data={self.data!r} is for"
            )
        _choice("norms", self.norms, PARTS)
        if self.task != "detection":
            for setting, usual in (("norms", "all"), ("weights", None)):
                if getattr(self, setting) != usual:
                    raise ValueError(
                        f"{setting}={getattr(self, setting)!r}: leave it out, it is for detectors"
                    )
        if self.weights is not None and self.model not in TWO_STAGES:
            raise ValueError(f"weights={self.weights!r}: give one of {', '.join(TWO_STAGES)}")
        if self.model in TWO_STAGES and self.norm_batch_size is not None:
            raise ValueError(
                f"norm_batch_size={self.norm_batch_size}: the heads of {self.model} normalize "
                "regions, not pictures; give accumulate, which cuts the batch of pictures"
            )

    def _check_method(self) -> None:
        options = dict(self.options)
        if self.method == FROZEN and self.task != "detection":
            raise ValueError("method='frozen': it is for detectors")
        if self.method in (BASELINE, FROZEN):
            if options:
                raise ValueError(f"options={options!r}: method {self.method!r} has none")
        else:
            method = get_method(self.method)
            method.check_options({n: v for n, v in options.items() if n != "centralize"})
            if method.wraps and self.task == "detection":
                raise ValueError(f"method={self.method!r}: a detector takes no virtual examples")
            if method.wraps and self.norm_batch_size is not None:
                raise ValueError(
                    f"norm_batch_size={self.norm_batch_size}: leave it out with "
                    f"method={self.method!r}, whose virtual examples are in front of the batch"
                )

    @property
    def key(self) -> str:
        """A name for its files, unlike that of every other run."""
        return f"{self.method}-b{self.statistics_size}-s{self.seed}-{self._digest()[:8]}"

    @property
    def identity(self) -> str:
        """Its settings in 16 letters: the same wherever data and machine are."""
        return self._digest("root", "device")[:16]

    def _digest(self, *without: str) -> str:
        settings = self.as_dict()
        new = {name: getattr(Run, name) for name in _LATER}
        # What came later is left out where it is not used: names of older runs stay theirs.
        kept = {
            name: value
            for name, value in settings.items()
            if name not in without and not (name in new and getattr(self, name) == new[name])
        }
        text = json.dumps(kept, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def task(self) -> str:
        """What is learned, one of `TASKS`."""
        return next(task for task, names in TASKS.items() if self.data in names)

    @property
    def statistics_size(self) -> int:
        """Examples that share statistics."""
        return self.norm_batch_size or self.micro_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Examples in a forward."""
        return self.batch_size // self.accumulate

    @property
    def label(self) -> str:
        """The method and its batch size, for a person."""
        own = {BASELINE: "BatchNorm (torch)", FROZEN: "BatchNorm (frozen)"}
        title = own.get(self.method) or METHODS[self.method].title
        steps = f" x {self.accumulate}" if self.accumulate > 1 else ""
        return f"{title}, {self.statistics_size}{steps}"

    @property
    def adds_noise(self) -> float:
        """Standard deviation of the input noise."""
        return (0.3 if self.data == "digits" else 0.0) if self.noise is None else self.noise

    @property
    def augments(self) -> bool:
        """Whether pictures are flipped and shifted."""
        usual = self.data in ("cifar10", "cifar100", "imagefolder", "imagenet", "camvid", "coco")
        return usual if self.augment is None else self.augment

    def as_dict(self) -> dict[str, Any]:
        """The run as plain data."""
        lists = {
            "options": [list(option) for option in self.options],
            "milestones": list(self.milestones),
        }
        return {**asdict(self), **lists}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Run":
        """The run of plain data.

        Raises:
            ValueError: For a name that a run does not have.
        """
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise ValueError(f"{name}={data[name]!r}: a run has {', '.join(sorted(known))}")
        options = tuple((str(name), value) for name, value in data.get("options", ()))
        milestones = tuple(data.get("milestones", ()))
        return cls(**{**data, "options": options, "milestones": milestones})

    def but(self, **changes: Any) -> "Run":
        """The same run with other values."""
        return replace(self, **changes)


def classified(run: Run) -> Run:
    """A run, after a look at whether its data are classified.

    Raises:
        ValueError: If they are not.
    """
    if run.task != "classification":
        raise ValueError(
            f"data={run.data!r}: this is for classification, give one of "
            f"{', '.join(TASKS['classification'])}; {run.data} is for anybatch reproduce"
        )
    return run


def read_config(path: Path) -> dict[str, Any]:
    """Read options from a TOML file (Python 3.11 on) or a JSON file.

    Args:
        path: Ends in ``.toml`` or ``.json``.

    Returns:
        The options by name.

    Raises:
        ValueError: If it is neither, is not there or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r}: cannot be read ({error})") from error
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"config={str(path)!r}: give a file that ends in .toml or .json")
    try:
        data = json.loads(text) if path.suffix == ".json" else _read_toml(text)
    except ValueError as error:  # both formats' errors are ValueErrors
        raise ValueError(f"config={str(path)!r}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"config={str(path)!r}: give a table of options, not {type(data).__name__}"
        )
    return data


def _read_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    raise ValueError("TOML needs Python 3.11; give the options as JSON")


def parse_options(pairs: list[str]) -> dict[str, tuple[Option, ...]]:
    """Read ``METHOD.NAME=VALUE`` arguments.

    Args:
        pairs: For example ``["mabn.window=8", "gn.num_groups=4"]``.

    Returns:
        The options of each method.

    Raises:
        ValueError: For another form, or a method that does not exist.

    Example:
        >>> parse_options(["mabn.window=8"])
        {'mabn': (('window', 8),)}
    """
    found: dict[str, tuple[Option, ...]] = {}
    for pair in pairs:
        target, equals, text = pair.partition("=")
        method, dot, name = target.partition(".")
        if not (equals and dot and method and name):
            raise ValueError(f"option={pair!r}: give METHOD.NAME=VALUE, such as mabn.window=8")
        get_method(method)
        try:
            value = json.loads(text)
        except ValueError:
            value = {"True": True, "False": False, "None": None}.get(text, text)
        found[method] = (*found.get(method, ()), (name, value))
    return found


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(choices)}")


def _count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number from 1 on")


def _at_least_zero(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}={value!r}: give a number from 0 on")
