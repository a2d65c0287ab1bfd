"""The settings of a paper's training: those of the tools, and segmentation and detection."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from anybatch.core.arguments import check_choice
from anybatch.registry import get_method
from anybatch.tools.networks import LIBRARIES, MODELS
from anybatch.tools.run import DATA, Option, Run
from papers.networks import (
    CLASSIFIERS,
    DETECTORS,
    SEGMENTERS,
    SEGMENTERS_OF_TORCHVISION,
    TWO_STAGES,
)

FROZEN = "frozen"
PARTS = ("all", "heads", "body")
_AnyPaperRun = TypeVar("_AnyPaperRun", bound="PaperRun")


@dataclass(frozen=True)
class PaperRun(Run):
    """A training of a paper, which may also segment images or detect objects.

    ``data`` may also be "cifar100-corrupted"; "camvid", whose images are segmented and which
    `image_size` gives the shorter side of; or "coco", images with boxes, which it gives the longer
    side of. ``model`` may also be one of `CLASSIFIERS`, `SEGMENTERS` or `DETECTORS` of
    `papers.networks`. ``method`` may also be "frozen", which keeps statistics, scale and shift of a
    detector's or a pretrained network's norms as they were loaded; fresh ones do nothing.

    Attributes:
        norms: Which norms of a detector the method converts: "all", those of its "heads" (the
            others are frozen as loaded, or group norms if they are fresh), or those of its "body"
            (the heads have none).
        weights: File with the weights of a detector's ResNet, in the folder of its data; None: it
            learns from scratch.
        start: Settings of the run whose trained network this run starts from, as pairs; none: it
            starts from scratch. A last layer for other classes starts fresh.
    """

    unconverted: ClassVar = {**Run.unconverted, FROZEN: "BatchNorm (frozen)"}
    augmented: ClassVar = (*Run.augmented, "cifar100-corrupted", "camvid", "coco")
    added_later: ClassVar = (*Run.added_later, "norms", "weights", "start")

    norms: str = "all"
    weights: str | None = None
    start: tuple[Option, ...] = field(default=())

    @property
    def start_run(self) -> "PaperRun | None":
        """The run whose trained network this run starts from, on the same device."""
        if not self.start:
            return None
        return PaperRun.from_dict({**dict(self.start), "root": self.root, "device": self.device})

    @property
    def pretrained(self) -> bool:
        """True if the run starts from a trained network."""
        return bool(self.start)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return {**super().as_dict(), "start": [list(setting) for setting in self.start]}

    @classmethod
    def from_dict(cls: type[_AnyPaperRun], data: dict[str, Any]) -> _AnyPaperRun:
        """Build a run from plain data.

        Raises:
            ValueError: For a setting that a run does not have.
        """
        start = tuple((str(name), value) for name, value in data.get("start", ()))
        return super().from_dict({**data, "start": start})

    @property
    def at_papers_settings(self) -> bool:
        """True if methods keep their papers' settings where `anybatch.convert` chooses others."""
        return True

    @property
    def task(self) -> str:
        """Key of the run's objective."""
        if self.data == "coco":
            return "detection with masks" if self.finds_masks else "detection"
        return "segmentation" if self.data == "camvid" else super().task

    @property
    def detects(self) -> bool:
        """Whether the run trains a detector."""
        return self.data == "coco"

    @property
    def finds_masks(self) -> bool:
        """Whether the network finds masks beside boxes."""
        return self.model.startswith("maskrcnn")

    def check_data_and_model(self) -> None:
        """Check that data and network exist and fit each other, and the settings of detectors.

        Raises:
            ValueError: If they do not.
        """
        check_choice("data", self.data, (*DATA, "cifar100-corrupted", "camvid", "coco"))
        library, _, name = self.model.partition(":")
        if self.detects:
            check_choice("model", self.model, DETECTORS)
        elif self.data == "camvid":
            check_choice("model", self.model, SEGMENTERS)
        elif not (name and library in LIBRARIES):
            check_choice("model", self.model, (*MODELS, *CLASSIFIERS))
        elif self.model in SEGMENTERS_OF_TORCHVISION:
            raise ValueError(f"model={self.model!r}: it segments images; give a classifier")
        if self.data == "digits" and self.model != "mlp":
            raise ValueError(f"model={self.model!r}: digits are 8x8, give 'mlp'")
        check_choice("norms", self.norms, PARTS)
        if not self.detects:
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
                "regions, not images; give accumulate, which cuts the batch of images"
            )

    def check_method(self) -> None:
        """Check that the method exists, fits the task and takes the options.

        Raises:
            ValueError: If it does not.
        """
        if self.method == FROZEN and not (
            self.detects or (self.pretrained and self.model != "mlp")
        ):
            raise ValueError(
                "method='frozen': it is for detectors, and for networks of images with a start"
            )
        if self.start_run is not None and self.start_run.method != "bn":
            raise ValueError(f"start={self.start!r}: give a run of method 'bn', with plain weights")
        super().check_method()
        if self.converted and self.detects and get_method(self.method).wraps:
            raise ValueError(f"method={self.method!r}: a detector takes no virtual examples")
