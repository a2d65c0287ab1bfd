"""The normalization layers, one file a method."""

from anybatch.layers.batch_group_norm import BatchGroupNorm1d, BatchGroupNorm2d, BatchGroupNorm3d
from anybatch.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from anybatch.layers.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from anybatch.layers.control import Accumulation, accumulate, freeze, masked, no_update, thaw
from anybatch.layers.critics import joint_forward, update_target
from anybatch.layers.cross_iteration_batch_norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
)
from anybatch.layers.frozen_batch_norm import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
)
from anybatch.layers.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from anybatch.layers.l1_range_batch_norm import (
    L1BatchNorm1d,
    L1BatchNorm2d,
    L1BatchNorm3d,
    RangeBatchNorm1d,
    RangeBatchNorm2d,
    RangeBatchNorm3d,
)
from anybatch.layers.loss_scale import set_loss_scale, update_scaler
from anybatch.layers.momentum_batch_norm import (
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumBatchNorm3d,
)
from anybatch.layers.moving_average_batch_norm import (
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from anybatch.layers.norm_copies import NormCopies, use_copy
from anybatch.layers.running_group_norm import RunningGroupNorm
from anybatch.layers.running_stats import average_running_stats
from anybatch.layers.sampled_batch_norm import (
    SampledBatchNorm1d,
    SampledBatchNorm2d,
    SampledBatchNorm3d,
)
from anybatch.layers.virtual_dataset import VirtualDataset
from anybatch.layers.weight_centralization import weight_centralization

__all__ = [
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
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1BatchNorm3d",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "MomentumBatchNorm3d",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "NormCopies",
    "RangeBatchNorm1d",
    "RangeBatchNorm2d",
    "RangeBatchNorm3d",
    "RunningGroupNorm",
    "SampledBatchNorm1d",
    "SampledBatchNorm2d",
    "SampledBatchNorm3d",
    "VirtualDataset",
    "accumulate",
    "average_running_stats",
    "freeze",
    "joint_forward",
    "masked",
    "no_update",
    "set_loss_scale",
    "thaw",
    "update_scaler",
    "update_target",
    "use_copy",
    "weight_centralization",
]
