"""Comparison of what `diagnose` says before a training with what the training then shows.

python -m papers.studies.diagnosis --root FOLDER [--json FILE]

Fresh networks are diagnosed at several batch sizes; beside the reading stands what the stored
trainings of the same network lost against a larger batch. ``FOLDER`` holds cifar100 and camvid.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import papers.tasks  # noqa: F401  (segmentation is an objective of the tools)
from anybatch.core.files import write_json
from anybatch.core.text_tables import text_table
from anybatch.evaluation.diagnosis.diagnose import diagnose
from anybatch.tools.data import Dataset, load
from anybatch.tools.images import as_tensor, standardized
from anybatch.tools.machine import machine
from anybatch.tools.network_factory import build
from anybatch.tools.objective import batches_from, objective
from anybatch.tools.run import BASELINE
from papers.datasets.camvid import IGNORED
from papers.paper_run import PaperRun
from papers.reproduction.pages import stored
from papers.reproduction.store import Row

DOCS = Path(__file__).parents[2] / "docs"
STREETS = "resnet50"  # on CamVid's images, with targets that say nothing; no stored training
Batch = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """A network on data, at several batch sizes.

    Attributes:
        run: Its network and data; of the trainings that it is compared with also the epochs.
        batches: Batch sizes.
        target: The one that a training loses nothing at.
    """

    run: PaperRun
    batches: tuple[int, ...]
    target: int = 32


def cases(root: Path) -> list[Case]:
    """The networks and data."""
    cifar = PaperRun(data="cifar100", root=str(root / "cifar100"), train_size=10_000)
    camvid = PaperRun(data="camvid", root=str(root), model="unet", image_size=72, epochs=15)
    return [
        Case(PaperRun(data="digits", model="mlp"), (2, 4, 8, 16, 32)),
        Case(cifar.but(model="resnet8", epochs=6), (2, 4, 8, 16, 32)),
        Case(cifar.but(model="resnet20", epochs=8), (2, 4, 32)),
        Case(camvid, (2, 8), 8),
        Case(camvid.but(data="imagefolder", model=STREETS), (2, 4, 8, 16)),
    ]


def data_of(run: PaperRun) -> Dataset:
    """The data of a run; for the network of large images, squares of CamVid's."""
    if run.model != STREETS:
        return load(run)
    data = load(run.but(data="camvid", model="unet", image_size=224))
    x = as_tensor(data.train_x)
    left = (x.shape[3] - x.shape[2]) // 2
    square = standardized(x[:, :, :, left : left + x.shape[2]])
    return replace(data, train_x=square, train_y=torch.arange(len(x)) % 100, classes=100)


def loss(output: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy, of images or of the pixels that are labelled."""
    return F.cross_entropy(output, batch[1], ignore_index=IGNORED)


def measured(run: PaperRun, data: Dataset, seeds: int, batches: int) -> dict[str, Any]:
    """Diagnose a fresh network of each seed."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = build(run.model, data)
        some = list(batches_from(run.but(seed=seed), data, 1, batches))
        found.append(diagnose(model, some, loss=loss, progress=False))
    together = [one.reading.network_values for one in found]
    return {
        "network": run.model,
        "batch": run.batch_size,
        "all norms act as": round(statistics.fmean(together), 2),
        "spread": round(statistics.stdev(together), 2) if seeds > 1 else 0.0,
        "noisy": f"{statistics.fmean(len(one.reading.noisy) for one in found):.0f}",
        "norms": len(found[0].layers),
        "problem": statistics.mode(one.reading.problem for one in found),
    }


def lost(case: Case, batch: int, rows: Iterable[Row]) -> float | None:
    """Points that stored trainings lost at a batch size against the target; None without any."""
    run = case.run
    wanted = {"data": run.data, "model": run.model, "epochs": run.epochs, "options": []}
    wanted |= {"train_size": run.train_size, "batch_size": case.target}
    metric = objective(run).metric
    own = [
        row
        for row in rows
        if all(row["settings"].get(name) == value for name, value in wanted.items())
        and row["settings"]["method"] in ("bn", BASELINE)
        and not row["settings"].get("centralize")
    ]

    def score(size: int) -> float | None:
        same = [r for r in own if (r["settings"].get("norm_batch_size") or case.target) == size]
        scores = {r["seed"]: r["result"][metric] for r in same}
        return 100 * statistics.fmean(scores.values()) if len(scores) > 1 else None

    of_target, of_batch = score(case.target), score(batch)
    return None if of_target is None or of_batch is None else of_target - of_batch


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, and write it where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--models", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, trainings = [], stored(DOCS).values()
    for case in cases(given.root):
        if given.models is None or case.run.model in given.models:
            data = data_of(case.run)
            for batch in case.batches:
                row = measured(case.run.but(batch_size=batch), data, given.seeds, given.batches)
                points = lost(case, batch, trainings)
                rows.append(row | {"lost": None if points is None else round(points, 1)})
    print(text_table(tuple(rows[0]), [tuple(map(_shown, row.values())) for row in rows]))
    if given.json is not None:
        write_json(given.json, {"rows": rows, "made_with": machine()})
    return rows


def _shown(value: object) -> str:
    return "-" if value is None or value == math.inf else str(value)


if __name__ == "__main__":
    main()
