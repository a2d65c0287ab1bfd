"""Torch's cases of its SyncBatchNorm, which needs CUDA, with the synchronized layer over gloo.

Rewritten from `torch/testing/_internal/distributed/distributed_test.py`: two processes under
DistributedDataParallel give what one `torch.nn.BatchNorm` gives for the whole batch.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import anybatch
from processes import spawn

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]
CHANNELS = 4


class Case(NamedTuple):
    """A case of torch's.

    Attributes:
        shares: Examples of each process.
        spatial: Spatial dimensions.
        affine: Whether there is a scale and a shift.
        momentum: None averages over all batches.
        last: Whether channels are last.
    """

    shares: tuple[int, int] = (3, 3)
    spatial: tuple[int, ...] = (4, 3)
    affine: bool = True
    momentum: float | None = 0.1
    last: bool = False


CASES = {
    "SyncBatchNorm": Case(),
    "SyncBatchNorm_Channels_Last": Case(last=True),
    "SyncBatchNorm_No_Affine": Case(affine=False),
    "SyncBatchNorm_2D_Input": Case(spatial=()),
    "SyncBatchNorm_Single_Input_Per_Process": Case(shares=(1, 1), spatial=()),
    "SyncBatchNorm_Diff_Input_Sizes_Running_Value": Case(shares=(1, 4)),
    "SyncBatchNorm_Diff_Input_Sizes_gradient": Case(shares=(5, 2), spatial=(2,)),
    "SyncBatchNorm_Average_Of_All": Case(momentum=None),
}


def batches(case: Case, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (sum(case.shares), CHANNELS, *case.spatial)
    x, dy = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    if case.last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x * (1 + step) + step, dy


def _run_cases(rank: int) -> None:
    for name, case in CASES.items():
        _run_case(rank, name, case)


def _run_case(rank: int, name: str, case: Case) -> None:
    torch.manual_seed(0)
    dims = max(len(case.spatial), 1)
    kind = (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1]
    norm = kind(CHANNELS, momentum=case.momentum, affine=case.affine, dtype=torch.float64)
    layer = anybatch.convert(nn.Sequential(copy.deepcopy(norm)), "sync")[0]
    # Without parameters DistributedDataParallel refuses, as around torch's layer.
    run = nn.parallel.DistributedDataParallel(layer) if case.affine else layer
    for step in range(3):
        x, dy = batches(case, step)
        own = [part.split(case.shares)[rank] for part in (x, dy)]
        whole, part = (
            x.requires_grad_(),
            own[0].detach().clone(memory_format=torch.preserve_format).requires_grad_(),
        )
        for one in (norm, layer):
            one.zero_grad()
        y, z = norm(whole), run(part)
        y.backward(dy)
        z.backward(own[1])
        pairs = {"output": (z, y), "gradient": (part.grad, whole.grad)}
        for what, (found, expected) in pairs.items():
            close(found, expected.split(case.shares)[rank], f"{name}, {what}")
        for key, parameter in norm.named_parameters():  # of which it takes the mean
            close(2 * layer.get_parameter(key).grad, parameter.grad, f"{name}, {key}")
        for key, buffer in norm.named_buffers():
            close(layer.get_buffer(key), buffer, f"{name}, {key}")


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, msg=lambda message: f"{what}: {message}")


@pytest.mark.exhaustive
def test_two_processes_give_what_torchs_layer_gives_for_the_whole_batch() -> None:
    spawn(_run_cases)
