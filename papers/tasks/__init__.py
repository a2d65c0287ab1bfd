"""The papers' tasks beside classification: segmentation and detection; frozen norms in all.

Importing this package adds their objectives to `anybatch.tools.objective.OBJECTIVES`.
"""

from dataclasses import replace

from anybatch.tools.objective import OBJECTIVES, Objective
from papers.tasks import detection, segmentation
from papers.tasks.average_precision import NUMBERS
from papers.tasks.detector_norms import freeze_pretrained, prepare_norms


def _detection(*numbers: str) -> Objective:
    return Objective(
        numbers=numbers,
        curve="average_precisions",
        units=("AP",),
        batches=detection.batches,
        loss=detection.loss,
        evaluate=detection.evaluate,
        prepare_norms=prepare_norms,
    )


OBJECTIVES.update(
    {
        "classification": replace(OBJECTIVES["classification"], prepare_norms=freeze_pretrained),
        "segmentation": Objective(
            numbers=("mean_iou", "pixel_accuracy"),
            curve="mean_ious",
            units=("mean IoU",),
            batches=segmentation.batches,
            loss=segmentation.loss,
            evaluate=segmentation.evaluate,
            prepare_norms=freeze_pretrained,
        ),
        "detection": _detection(*NUMBERS),
        "detection with masks": _detection(*NUMBERS, *(f"mask_{name}" for name in NUMBERS)),
    }
)
