"""Settings of every method beside the reference's, and what compares the two."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

import reference
from anybatch.registry import METHODS
from tolerances import tolerance

MABN = {"window": 4, "warmup_steps": 7, "renorm_warmup_steps": 15, "momentum": 0.1, "clip": 1.3}
BRN = {"warmup_steps": 12, "max_r": 1.2, "max_d": 0.3, "momentum": 0.1}
CASES: dict[str, tuple[str, type[reference.Layer], dict[str, Any]]] = {
    "bn": ("bn", reference.BatchNorm, {}),
    "bn cumulative": ("bn", reference.BatchNorm, {"momentum": None}),
    "bn norm 2": ("bn", reference.BatchNorm, {"norm_batch_size": 2}),
    "mbn": ("mbn", reference.MomentumBatchNorm, {"batch_size": 3, "ideal_batch_size": 20}),
    "mbn cumulative": ("mbn", reference.MomentumBatchNorm, {"batch_size": 3, "momentum": None}),
    "mbn norm 2": ("mbn", reference.MomentumBatchNorm, {"batch_size": 2, "norm_batch_size": 2}),
    "brn": ("brn", reference.BatchRenorm, BRN),
    "brn smooth": ("brn", reference.BatchRenorm, {**BRN, "smooth": True}),
    "brn norm 2": ("brn", reference.BatchRenorm, {**BRN, "norm_batch_size": 2}),
    "brn cumulative": ("brn", reference.BatchRenorm, {**BRN, "momentum": None}),
    "mabn": ("mabn", reference.MovingAverageBatchNorm, MABN),
    "mabn cumulative": ("mabn", reference.MovingAverageBatchNorm, {**MABN, "momentum": None}),
    "mabn window over warm-up": (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "window": 9, "warmup_steps": 3, "renorm_warmup_steps": 12},
    ),
    "mabn warm-up over renorm": (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "warmup_steps": 15, "renorm_warmup_steps": 7},
    ),
    "mabn norm 2": ("mabn", reference.MovingAverageBatchNorm, {**MABN, "norm_batch_size": 2}),
    "mabn centered norm 2": (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "centered": True, "norm_batch_size": 2},
    ),
    "ghost 2": ("ghost", reference.GhostBatchNorm, {"ghost_size": 2}),
    "ghost cumulative": ("ghost", reference.GhostBatchNorm, {"ghost_size": 2, "momentum": None}),
    "ghost 4 norm 5": ("ghost", reference.GhostBatchNorm, {"ghost_size": 4, "norm_batch_size": 5}),
    "bgn 3": ("bgn", reference.BatchGroupNorm, {"num_groups": 3}),
    "bgn 2 of 3": ("bgn", reference.BatchGroupNorm, {"num_groups": 2, "examples_per_group": 3}),
    "bgn 6": ("bgn", reference.BatchGroupNorm, {"num_groups": 6}),
    "bgn norm 3": ("bgn", reference.BatchGroupNorm, {"num_groups": 3, "norm_batch_size": 3}),
}
for _name, _kind in (("l1", reference.L1BatchNorm), ("range", reference.RangeBatchNorm)):
    CASES[_name] = (_name, _kind, {})
    CASES[f"{_name} norm 2"] = (_name, _kind, {"norm_batch_size": 2})
    CASES[f"{_name} cumulative"] = (_name, _kind, {"momentum": None})
_S = reference.SampledBatchNorm
for _name, _sample, _options in (
    ("ns", "naive", {"ratio": 0.4}),
    ("ns", "naive", {"size": 2}),
    ("bs", "batch", {"ratio": 0.4, "seed": 3}),
    ("bs", "batch", {"size": 2, "seed": 4, "norm_batch_size": 3}),
    ("bs", "batch", {"ratio": 0.5, "seed": 5, "momentum": None}),
    ("fs", "feature", {"ratio": 0.3, "seed": 6}),
    ("fs", "feature", {"size": 2, "seed": 7}),
    ("fs", "feature", {"ratio": 0.01, "seed": 8, "norm_batch_size": 2}),
    ("points", "points", {"ratio": 0.4, "seed": 9}),
    ("points", "points", {"size": 3, "seed": 10, "norm_batch_size": 3}),
    ("vdn", "virtual", {"num_virtual": 2}),
    ("fs+vdn", "feature+virtual", {"num_virtual": 1, "ratio": 0.3, "seed": 11}),
    ("bs+vdn", "batch+virtual", {"num_virtual": 2, "size": 2, "mix": 0.3, "seed": 12}),
):
    CASES[f"{_name} {_options}"] = (_name, _S, _options)
for _centered, _forward, _backward in product((False, True), *(("ema", "sma", "batch"),) * 2):
    CASES[f"mabn {'centered ' * _centered}{_forward} {_backward}"] = (
        "mabn",
        reference.MovingAverageBatchNorm,
        {**MABN, "centered": _centered, "forward_stats": _forward, "backward_stats": _backward},
    )
for _name, (_method, _kind, _options) in list(CASES.items()):
    if _name in ("bn", "mbn", "brn norm 2", "mabn", "mabn ema ema", "ghost 2", "l1", "bgn 3"):
        CASES[f"{_name} momentum warm-up"] = (_method, _kind, {**_options, "momentum_warmup": 2})
CHANNELS = 6
SHAPES = {"(N, C)": (), "(N, C, L)": (5,), "(N, C, H, W)": (3, 2), "(N, C, D, H, W)": (2, 1, 3)}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def pair(
    case: str, dims: int, dtype: torch.dtype, eps: float = 1e-5
) -> tuple[Any, reference.Layer]:
    """The library's layer and the reference's, with the same settings and parameters."""
    name, kind, options = CASES[case]
    options = {**options, "eps": eps}
    layer = METHODS[name].build(CHANNELS, dims, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(CHANNELS) + 0.5)
        layer.bias.copy_(torch.randn(CHANNELS))
    theirs = {"ghost_size" if k == "examples_per_group" else k: v for k, v in options.items()}
    if "sample" in METHODS[name].fixed:
        theirs["sample"] = METHODS[name].fixed["sample"]
    if name == "mbn" and "momentum" in options:
        theirs["auto_momentum"] = False
    weight, bias = (p.detach().double() for p in (layer.weight, layer.bias))
    return layer, kind(CHANNELS, weight, bias, **theirs)


def drifting(step: int, shape: tuple[int, ...]) -> Tensor:
    """Inputs whose mean and spread move, in size too: 3, 5 or 4 examples."""
    x = torch.randn((3, 5, 4)[step % 3], CHANNELS, *shape, dtype=torch.float64)
    channel = torch.arange(CHANNELS, dtype=torch.float64).view(1, -1, *(1,) * len(shape))
    return x * (1 + 0.02 * step + 0.2 * channel) + 0.3 * channel - 0.02 * step


def flat(x: Tensor) -> Tensor:
    """As the reference sees it: (N, C, L)."""
    return x.detach().double().reshape(x.shape[0], x.shape[1], -1)


def check(actual: Tensor, expected: Any, dtype: torch.dtype, what: str) -> None:
    """Assert that two tensors agree."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.detach().double().reshape(expected.shape)
    difference = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance(dtype, expected), f"{what}: off by {difference:.3g}"
