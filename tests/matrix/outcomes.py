"""What each way of calling each layer gives, and the page of the documentation that shows it."""

import re
from pathlib import Path
from typing import NamedTuple

from matrix.layers import FAMILIES, FROZEN
from matrix.ways import WAYS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "internals" / "ways-of-calling.md"
MODES = {True: "training", False: "evaluation"}


class Refusal(NamedTuple):
    """An error with a way out.

    Attributes:
        message: A regular expression that finds it, which is also how the page shows it.
        families: Layers that raise it.
    """

    message: str
    families: tuple[str, ...]


class Limit(NamedTuple):
    """A result that is right in what is compared, and where it differs from a plain call's.

    Attributes:
        note: How it differs, for the page.
        families: Layers of which this holds.
        compared: Names of results that are compared.
    """

    note: str
    families: tuple[str, ...]
    compared: tuple[str, ...]


STATEFUL = (  # whose state is more than buffers
    "MomentumBatchNorm",
    "MovingAverageBatchNorm",
    "CrossIterationBatchNorm",
    "BatchRenorm",
    "SampledBatchNorm",
)
AVERAGED = ("MovingAverageBatchNorm",)  # whose backward pass averages over steps
OUTCOMES: dict[tuple[str, bool], Refusal | Limit] = {
    ("`vmap` of an ensemble", True): Refusal(
        "torch.func: .* in training, which are no buffers, so that functional_call cannot pass "
        'them; convert to "bn", "ghost" or "bgn", or call it in anybatch.no_update\\(\\) or in '
        "evaluation mode",
        STATEFUL,
    ),
    ("`jvp`", True): Refusal(
        "torch.func or forward-mode differentiation: .* its backward pass averages gradients over "
        "steps; freeze its statistics",
        AVERAGED,
    ),
    ("`jacobian`", True): Refusal(
        "a batch of gradients: .* its backward pass averages gradients over steps; freeze its "
        "statistics",
        AVERAGED,
    ),
    ("backward twice", True): Limit(
        "each backward pass is a step of the backward statistics",
        AVERAGED,
        ("output", "the first gradient", "running_mean", "running_var"),
    ),
}

for _training in MODES:
    OUTCOMES["`DistributedDataParallel`", _training] = Refusal(
        "DistributedDataParallel is not needed when a module doesn't have any parameter", (FROZEN,)
    )


def outcome(way: str, training: bool, family: str) -> Refusal | Limit | None:
    """What is not simply right about a cell of the matrix; None where all is."""
    found = OUTCOMES.get((way, training))
    return found if found is not None and family in found.families else None


def page() -> str:
    """The page of the documentation."""
    notes: dict[str, int] = {}
    lines = [HEAD]
    for training, mode in MODES.items():
        lines += [f"## In {mode}", "", _row(["", *map(_short, FAMILIES)])]
        lines.append(_row(["---"] * (len(FAMILIES) + 1)))
        for way in WAYS:
            cells = [_cell(outcome(way, training, family), notes) for family in FAMILIES]
            lines.append(_row([way, *cells]))
        lines.append("")
    lines += [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines) + "\n"


def _cell(found: Refusal | Limit | None, notes: dict[str, int]) -> str:
    if found is None:
        return "yes"
    if isinstance(found, Limit):
        note, word = f"Right, but {found.note}.", "yes"
    else:
        shown = re.sub(r"\\(.)", r"\1", found.message).replace(".*", "...")
        note, word = f'Refused: "{shown}".', "no"
    return f"{word} ({notes.setdefault(note, len(notes) + 1)})"


def _short(family: str) -> str:
    return f"`{family}`" if family[-1] == "m" else family


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


HEAD = """# Which ways of calling a layer work?

All that torch offers, with the results of a plain call; what is refused says so and names a way
out. Layers of one, two and three dimensions behave alike, and so do the methods of a class.

```python
import torch, anybatch

norm = anybatch.BatchRenorm2d(8, warmup_steps=0)
with anybatch.no_update():  # a Jacobian is no step
    table = torch.autograd.functional.jacobian(norm, torch.randn(2, 8, 2, 2), vectorize=True)
```

**yes** means: output, gradients and state are those of a plain call and backward, in float64 to
1e-8; those of a plain call are an independent reference's. **no** means an error, and nothing
changed. After each, a new layer still gives what its reference gives. Transforms that are no step
(`make_fx`, `jvp`, `jacobian`) run in `anybatch.no_update()`.

This page is written by `python -m tests.matrix` from the table that `tests/matrix/` tests.
"""
