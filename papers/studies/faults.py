"""Faults in the numbers, and how long a layer remembers them.

python -m papers.studies.faults [--outlier-limit 100]
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from anybatch.conversion.convert import convert
from anybatch.registry import METHODS
from anybatch.schedule import NormScheduler

BATCH, CLOSE, LIMIT, BEFORE = 4, 0.05, 400, 60
OPTIONS: dict[str, dict[str, Any]] = {
    "mabn": {"warmup_steps": 10, "renorm_warmup_steps": 20},
    "brn": {"warmup_steps": 10},
    "mbn": {"batch_size": BATCH},
    "cbn": {"batch_size": BATCH, "window": 4, "burn_in": 0.0},
    "ghost": {"ghost_size": 2},
    "bgn": {"num_groups": 4},
    **{name: {"ratio": 1 / 2} for name in ("ns", "bs", "fs", "points")},
}
# Virtual examples are drawn anew in each step: two layers are never alike.
REMEMBERING = [name for name, method in METHODS.items() if method.exact_eval and not method.wraps]


def _at_one_value(value: float) -> Callable[[Tensor], Tensor]:
    def strike(x: Tensor) -> Tensor:
        x[1, 1, 2, 2] = value
        return x

    return strike


def _with_channel(value: float) -> Callable[[Tensor], Tensor]:
    def strike(x: Tensor) -> Tensor:
        x[:, 1] = value
        return x

    return strike


# What becomes of the input of one step.
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one infinite value": _at_one_value(torch.inf),
    "one NaN": _at_one_value(torch.nan),
    "a batch of NaN": lambda x: torch.full_like(x, torch.nan),
    "overflow of float16": lambda x: (3e4 * x).half().to(x.dtype),
    "a constant channel": _with_channel(3.0),
    "a dead channel": _with_channel(0.0),
    "equal examples": lambda x: x[:1].expand_as(x).clone(),
    "values of 1e30": lambda x: 1e30 * x,
    "values of 1e-40": lambda x: 1e-40 * x,
    "values of 1e4": lambda x: 1e4 * x,
    "values of 10": lambda x: 10 * x,
}
GRADIENT = "a gradient that is infinite"
DOMAIN = "another domain, from then on"


@dataclass(frozen=True)
class Recovery:
    """The time that a fault lasts.

    Attributes:
        fault: What happened, in one step.
        method: Short name; "torch" for torch's batch norm.
        training: Steps after it until the outputs in training are, and stay, within 5 % (root mean
            square) of those of a layer to which it did not happen; None where that was not within
            400.
        evaluation: The same of outputs in evaluation mode.
        finite: Whether every output after the step of the fault was finite.
    """

    fault: str
    method: str
    training: int | None
    evaluation: int | None
    finite: bool


def recovery(
    fault: str, method: str, seed: int = 0, *, outlier_limit: float | None = None
) -> Recovery:
    """Let a fault happen to a layer, and count the steps until it is forgotten.

    Args:
        fault: One of `FAULTS`, `GRADIENT` or `DOMAIN`.
        method: Short name of a method, or "torch".
        seed: Of weights and data.
        outlier_limit: Of the layer.

    Returns:
        The recovery.

    Example:
        >>> recovery("one NaN", "torch").evaluation is None
        True
        >>> recovery("one NaN", "bn").evaluation
        0
    """
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(BATCH, 3, 8, 8, generator=generator) + 0.5
        return x, torch.randn(BATCH, 8, 6, 6, generator=generator)

    def moved(x: Tensor) -> Tensor:
        return 10 * x + 5 if fault == DOMAIN else x

    struck = _network(method, seed, outlier_limit)
    for _ in range(BEFORE):
        _step(struck, *batch())
    spared = copy.deepcopy(struck)
    if fault == DOMAIN:
        for _ in range(LIMIT):
            x, dy = batch()
            _step(spared, moved(x), dy)
    x, dy = batch()
    _step(spared, moved(x), dy)
    if fault == GRADIENT:
        _step(struck, x, dy.index_fill(1, torch.tensor([2]), torch.inf))
    elif fault == DOMAIN:
        _step(struck, moved(x), dy)
    else:
        _step(struck, FAULTS[fault](x.clone()), dy)
    apart: dict[str, int | None] = {"training": 0, "evaluation": 0}
    finite = True
    with torch.no_grad():
        probe = moved(batch()[0])
    for number in range(LIMIT + 1):
        outputs = {"evaluation": [_evaluate(model, probe) for model in (struck, spared)]}
        x, dy = batch()
        outputs["training"] = [_step(model, moved(x), dy) for model in (struck, spared)]
        for mode, (found, expected) in outputs.items():
            finite = finite and bool(found.isfinite().all())
            distance = (found - expected).square().mean() / expected.square().mean()
            if not distance <= CLOSE**2:
                apart[mode] = number + 1 if number < LIMIT else None
    return Recovery(fault, method, apart["training"], apart["evaluation"], finite)


def _network(method: str, seed: int, outlier_limit: float | None) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    if method != "torch":
        options: Mapping[str, Any] = OPTIONS.get(method, {})
        convert(model, method, centralize=False, outlier_limit=outlier_limit, **options)
        if METHODS[method].scheduled:
            NormScheduler(model, 2, last_epoch=1)
    return model


def _step(model: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """A step that leaves the weights, as one does that a gradient scaler skips."""
    model.train()
    y: Tensor = model(x)
    y.backward(dy)
    return y.detach()


def _evaluate(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outlier-limit", type=float)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    methods = ["torch", *REMEMBERING]
    print(f"| fault | {' | '.join(methods)} |")
    print("|---|" + "---|" * len(methods))
    for fault in track([*FAULTS, GRADIENT, DOMAIN]):
        cells = []
        for method in methods:
            limit = None if method == "torch" else given.outlier_limit
            found = [
                recovery(fault, method, seed, outlier_limit=limit) for seed in range(given.seeds)
            ]
            train, evaluate = (
                [getattr(one, m) for one in found] for m in ("training", "evaluation")
            )
            worst = ["never" if None in steps else str(max(steps)) for steps in (train, evaluate)]
            cells.append(" / ".join(worst))
        print(f"| {fault} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
