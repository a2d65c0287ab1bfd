"""Utterances of different lengths in small batches: what padding costs, and what masks give back.

Who is speaking: nine speakers, 12 coefficients per frame, 7 to 29 frames (Japanese Vowels, Kudo et
al. 1999; 270 utterances to train on, 370 to test). The network is three convolution modules of a
Conformer and a mean over valid frames. Prints accuracy and how much padding changes the output.

    pip install . aeon
    python examples/speech.py --seeds 20

The data are in the package aeon; ``--data`` reads its two files from another folder.
"""

import argparse
import contextlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch

SPEAKERS, COEFFICIENTS = 9, 12
Utterance = tuple[Tensor, int]  # frames (12, L) and the speaker

# The norms' method, and what `anybatch.masked` is told; None: nothing is masked.
WAYS: dict[str, tuple[str, dict[str, bool] | None]] = {
    "batch norm": ("bn", None),
    "batch norm, masked": ("bn", {}),
    "batch norm, masked, zero=True": ("bn", {"zero": True}),
    "group norm": ("gn", None),
    "mabn, masked, zero=True": ("mabn", {"zero": True}),
}


def read(file: Path) -> list[Utterance]:
    """Read a file of aeon: per line 12 series, separated by colons, and the speaker."""
    lines = [line for line in file.read_text().splitlines() if line and line[0] not in "#@"]
    found = []
    for line in lines:
        *series, speaker = line.split(":")
        frames = torch.tensor([[float(value) for value in one.split(",")] for one in series])
        found.append((frames, int(speaker) - 1))
    return found


def data_folder() -> Path:
    """The folder of Japanese Vowels in the package aeon, which is not imported."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or spec.origin is None:
        raise SystemExit("The data are in the package aeon: pip install aeon, or give --data")
    return Path(spec.origin).parent / "datasets" / "data" / "JapaneseVowels"


def padded(utterances: Sequence[Utterance], size: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A batch ``(N, 12, L)`` of as many frames as the longest has, or more; lengths; speakers."""
    frames, speakers = zip(*utterances, strict=True)
    lengths = torch.tensor([one.shape[1] for one in frames])
    x = torch.zeros(len(frames), COEFFICIENTS, max(int(lengths.max()), size))
    for row, one in zip(x, frames, strict=True):
        row[:, : one.shape[1]] = one
    return x, lengths, torch.tensor(speakers)


class ConvolutionModule(nn.Module):
    """The convolution module of a Conformer (Gulati et al. 2020), on ``(N, C, L)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.gated = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 7, padding=3, groups=width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.transpose(1, 2)).transpose(1, 2)
        y = self.norm(self.depthwise(F.glu(self.gated(y), dim=1)))
        return x + self.last(F.silu(y))


class Recognizer(nn.Module):
    """Three modules, and the mean over valid frames."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.frames = nn.Conv1d(COEFFICIENTS, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvolutionModule(width) for _ in range(3)))
        self.scores = nn.Linear(width, SPEAKERS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.blocks(self.frames(x))
        valid = torch.arange(y.shape[2]) < lengths.unsqueeze(1)
        mean = (y * valid.unsqueeze(1)).sum(2) / lengths.unsqueeze(1)
        return self.scores(mean)


def scores_of(
    model: nn.Module, batch: Sequence[Utterance], masks: dict[str, bool] | None, size: int = 0
) -> tuple[Tensor, Tensor]:
    """The network's scores for a padded batch, and the speakers."""
    x, lengths, speakers = padded(batch, size)
    masked = anybatch.masked(model, lengths=lengths, **masks) if masks is not None else None
    with masked or contextlib.nullcontext():
        return model(x, lengths), speakers


def train(way: str, data: list[Utterance], seed: int, epochs: int, batch_size: int) -> nn.Module:
    """Train one network."""
    method, masks = WAYS[way]
    torch.manual_seed(seed)
    model = anybatch.convert(Recognizer(), method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    steps = epochs * (len(data) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(data)).tolist()
        for start in range(0, len(data) - batch_size + 1, batch_size):
            batch = [data[number] for number in order[start : start + batch_size]]
            scores, speakers = scores_of(model, batch, masks)
            optimizer.zero_grad()
            F.cross_entropy(scores, speakers).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def measure(way: str, model: nn.Module, data: list[Utterance]) -> dict[str, float]:
    """Accuracy of utterances alone and padded to 64 frames, and what padding changes, in %."""
    masks = WAYS[way][1]
    alone = torch.cat([scores_of(model, [one], masks)[0] for one in data])
    together, speakers = scores_of(model, data, masks, size=64)
    answers, padded_answers = alone.argmax(1), together.argmax(1)
    return {
        "alone": 100 * (answers == speakers).float().mean().item(),
        "padded": 100 * (padded_answers == speakers).float().mean().item(),
        "answers changed": 100 * (answers != padded_answers).float().mean().item(),
        "scores move": 100 * ((alone - together).std() / alone.std()).item(),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Train and measure every way, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, help="folder with JapaneseVowels_TRAIN.ts and _TEST.ts"
    )
    parser.add_argument("--seeds", type=int, default=20, help="trainings of each row")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=4, help="utterances in a batch")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.epochs, given.batch_size) < 1:
        parser.error("--seeds, --epochs and --batch-size: give whole numbers from 1 on")
    folder = given.data or data_folder()
    files = [folder / f"JapaneseVowels_{split}.ts" for split in ("TRAIN", "TEST")]
    if lacking := [file.name for file in files if not file.is_file()]:
        parser.error(f"--data {folder}: it has no {' and no '.join(lacking)}")
    train_data, test_data = map(read, files)
    mean = torch.cat([frames for frames, _ in train_data], 1).mean(1, keepdim=True)
    spread = torch.cat([frames for frames, _ in train_data], 1).std(1, keepdim=True)
    train_data, test_data = (
        [((frames - mean) / spread, speaker) for frames, speaker in data]
        for data in (train_data, test_data)
    )
    found: dict[str, list[dict[str, float]]] = {}
    for way in given.ways:
        for seed in range(given.seeds):
            model = train(way, train_data, seed, given.epochs, given.batch_size)
            found.setdefault(way, []).append(measure(way, model, test_data))
        numbers = []
        for name in found[way][0]:
            values = [row[name] for row in found[way]]
            spread_of = stdev(values) if len(values) > 1 else 0.0
            numbers.append(f"{name} {fmean(values):.1f} ± {spread_of:.1f}")
        print(f"{way:30} {', '.join(numbers)}", flush=True)
    return found


if __name__ == "__main__":
    main()
