"""Jobs of a reproduction beside plain trainings: costs, and statistics along a training."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from anybatch.registry import get_method
from anybatch.tools.run import BASELINE, Option
from papers.paper_run import PaperRun

KEEPS = ("channel", "norms")
Entry = tuple[str, str, tuple[Option, ...]]


@dataclass(frozen=True)
class CostRun:
    """A measurement of what methods cost in one network, in turn in one process.

    Attributes:
        model: Network, as `anybatch.tools.network_factory.factory` takes it.
        example: Shape of an example.
        batch_size: Examples in a batch, which share statistics.
        methods: Label, method and options of each row; the first is "torch", which the others are
            compared with.
        questions: Names in `anybatch.tools.bench.QUESTIONS`.
        rounds: Blocks per method.
        block_seconds: Length of a block.
        precision: "float32", "bfloat16" or "float16".
        mode: "eager", "compiled" or "graph".
        seed: Number of the repetition.
        device: Where.
    """

    model: str
    example: tuple[int, ...]
    batch_size: int
    methods: tuple[Entry, ...]
    questions: tuple[str, ...]
    rounds: int = 15
    block_seconds: float = 0.05
    precision: str = "float32"
    mode: str = "eager"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        labels = [label for label, _, _ in self.methods]
        if not self.methods or self.methods[0][1] != BASELINE:
            raise ValueError(f"methods={labels}: the first is what others are compared with, torch")
        if len(set(labels)) != len(labels):
            raise ValueError(f"methods={labels}: give each label once")
        for label, name, options in self.methods[1:]:
            if name == BASELINE:
                raise ValueError(f"methods: {label!r} is torch's batch norm once more")
            get_method(name).check_options(dict(options))

    @property
    def key(self) -> str:
        """A name for its files."""
        return f"costs-b{self.batch_size}-s{self.seed}-{self._digest(self.as_dict())[:8]}"

    @property
    def identity(self) -> str:
        """Its settings in 16 letters: the same wherever the machine is."""
        settings = self.as_dict()
        del settings["device"]
        return self._digest(settings)[:16]

    @staticmethod
    def _digest(settings: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        """Title for a person."""
        return f"costs of {len(self.methods)} methods, {self.batch_size}"

    @property
    def epochs(self) -> int:
        """Number of questions, for a progress bar."""
        return len(self.questions)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        methods = [
            [label, name, [list(o) for o in options]] for label, name, options in self.methods
        ]
        lists = {"methods": methods, "example": list(self.example)}
        return {**asdict(self), **lists, "questions": list(self.questions)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CostRun":
        """Build a measurement from plain data.

        Raises:
            ValueError: For a name that it does not have.
        """
        _only(data, cls)
        methods = tuple(
            (str(label), str(name), tuple((str(key), value) for key, value in options))
            for label, name, options in data["methods"]
        )
        own = {"example": tuple(data["example"]), "questions": tuple(data["questions"])}
        return cls(**{**data, "methods": methods, **own})

    def but(self, **changes: Any) -> "CostRun":
        """The same with other values."""
        return replace(self, **changes)


@dataclass(frozen=True)
class RecordedRun(PaperRun):
    """A training along which the statistics of one norm are noted.

    Attributes:
        norm: Which of the network's batch norms, in its order from 0 on.
        every: Steps from one record to the next.
        first_epoch: From which on there are records.
        keeps: "norms", the Euclidean norms over the channels of five statistics, of a normalization
            batch, of the whole batch and of a moving average; or "channel", mean and variance of
            one channel.
        channel: Which channel.
        window: Normalization batches in the moving average.
        reference: Examples of the batch, from the first on, that stand for all; None is the batch.
    """

    norm: int = 0
    every: int = 1
    first_epoch: int = 1
    keeps: str = "norms"
    channel: int = 0
    window: int = 16
    reference: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("norm", 0), ("channel", 0), ("every", 1), ("window", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number from {least} on")
        if not 1 <= self.first_epoch <= self.epochs:
            raise ValueError(f"first_epoch={self.first_epoch!r}: give 1 to epochs={self.epochs}")
        if self.keeps not in KEEPS:
            raise ValueError(f"keeps={self.keeps!r}: give one of {', '.join(KEEPS)}")
        if self.reference is not None and (
            self.reference > self.batch_size or self.reference % self.statistics_size
        ):
            raise ValueError(
                f"reference={self.reference}: give a multiple of {self.statistics_size}, the "
                f"examples that share statistics, up to batch_size={self.batch_size}"
            )
        if self.accumulate > 1:
            raise ValueError(f"accumulate={self.accumulate}: a step is recorded as one forward")


Job = PaperRun | CostRun


def job_of(settings: dict[str, Any]) -> Job:
    """Return the job that a row of the store was made from.

    Args:
        settings: As the row has them.

    Returns:
        The run, of its kind.

    Raises:
        ValueError: For settings that are none.

    Example:
        >>> job_of({"model": "mlp", "norm": 1}).norm
        1
    """
    if "methods" in settings:
        return CostRun.from_dict(settings)
    return (RecordedRun if "norm" in settings else PaperRun).from_dict(settings)


def trained(job: Job) -> PaperRun:
    """A job that is a training.

    Raises:
        TypeError: For costs, which train nothing.
    """
    if isinstance(job, CostRun):
        raise TypeError(f"job={job.label!r}: give a training")
    return job


def described(job: Job) -> str:
    """Data, network and length, for a person."""
    if isinstance(job, CostRun):
        shape = "x".join(map(str, (job.batch_size, *job.example)))
        return f"{job.model}, {shape}, {job.rounds} rounds"
    return f"{job.data}, {job.model}, {job.epochs} epochs"


def _only(data: dict[str, Any], kind: type) -> None:
    known = {field.name for field in fields(kind)}
    for name in data:
        if name not in known:
            raise ValueError(f"{name}={data[name]!r}: give only {', '.join(sorted(known))}")
