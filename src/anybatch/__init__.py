"""Batch normalization that works at any batch size.

Layers replace ``torch.nn.BatchNorm`` one for one; `convert` does it for a whole
network, `to_batchnorm` undoes it for deployment.
"""

from anybatch import theory
from anybatch.conversion import (
    DecayPlan,
    DecayRow,
    GammaDecay,
    NoEffectWarning,
    Plan,
    PlanRow,
    convert,
    decay_plan,
    fold,
    param_groups,
    plan,
    to_batchnorm,
)
from anybatch.evaluation.diagnose import Diagnosis, diagnose
from anybatch.evaluation.evalnorm import EvalNorm, eval_norm
from anybatch.evaluation.recalibration import Recalibration, recalibrate
from anybatch.evaluation.tuning import ExampleWeightTuning, tune_example_weight
from anybatch.evaluation.weighing import example_weighing, set_example_weight
from anybatch.layers import (
    Accumulation,
    BatchGroupNorm1d,
    BatchGroupNorm2d,
    BatchGroupNorm3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumBatchNorm3d,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
    RunningGroupNorm,
    accumulate,
    freeze,
    no_update,
    thaw,
    weight_centralization,
)
from anybatch.methods import METHODS, Method, get_method
from anybatch.scheduling import NormScheduler

__all__ = [
    "METHODS",
    "Accumulation",
    "BatchGroupNorm1d",
    "BatchGroupNorm2d",
    "BatchGroupNorm3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "CrossIterationBatchNorm1d",
    "CrossIterationBatchNorm2d",
    "CrossIterationBatchNorm3d",
    "DecayPlan",
    "DecayRow",
    "Diagnosis",
    "EvalNorm",
    "ExampleWeightTuning",
    "GammaDecay",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "Method",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "MomentumBatchNorm3d",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "NoEffectWarning",
    "NormScheduler",
    "Plan",
    "PlanRow",
    "Recalibration",
    "RunningGroupNorm",
    "accumulate",
    "convert",
    "decay_plan",
    "diagnose",
    "eval_norm",
    "example_weighing",
    "fold",
    "freeze",
    "get_method",
    "no_update",
    "param_groups",
    "plan",
    "recalibrate",
    "set_example_weight",
    "thaw",
    "theory",
    "to_batchnorm",
    "tune_example_weight",
    "weight_centralization",
]

__version__ = "0.1.0"
