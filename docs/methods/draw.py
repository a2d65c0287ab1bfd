"""Draw the images of the method cards: the statistics used in a stream of small batches.

python docs/methods/draw.py
"""

import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import anybatch
from anybatch.registry import METHODS

FOLDER = Path(__file__).parent / "images"
STEPS, BATCH, CHANNELS = 60, 4, 4
OPTIONS = {
    "mbn": {"batch_size": BATCH},
    "mabn": {"warmup_steps": 17, "renorm_warmup_steps": 17},
    "cbn": {"window": 4, "burn_in": 0.0},
    "brn": {"warmup_steps": 15},
    "ghost": {"ghost_size": 2},
    "bgn": {"num_groups": 2},
    **{name: {"ratio": 1 / 4} for name in ("ns", "bs", "fs", "points", "fs+vdn", "bs+vdn")},
}
TRUE, OWN, USED = "#7F7F7F", "#56B4E9", "#D55E00"


def network(method: str) -> nn.Module:
    """Build a convolution whose outputs have the scale of its inputs, and the norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
    with torch.no_grad():
        model[0].weight.div_(model[0].weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        model[0].bias.zero_()
    return anybatch.convert(model, method, centralize=False, **OPTIONS.get(method, {}))


def scale_of(x: Tensor, y: Tensor) -> float:
    """Return the divisor of the affine map from x to y."""
    x, y = x.flatten(), y.flatten()
    return float((x - x.mean()).square().sum() / ((x - x.mean()) * (y - y.mean())).sum())


def stream(method: str) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """Return the scale of a channel per step: true, of the batch, and used for each example."""
    model = network(method)
    run = model
    if METHODS[method].wraps:
        run = anybatch.VirtualDataset(model, torch.zeros(3), torch.full((3,), 1.0))
    scheduler = anybatch.NormScheduler(model, 4)
    generator = torch.Generator().manual_seed(1)
    true, own, used = [], [], []
    for step in range(STEPS):
        size = 1.0 + 0.5 * (step >= STEPS // 2)  # the scale of the data moves once
        loudness = torch.rand(BATCH, 1, 1, 1, generator=generator) * 1.2 + 0.4
        x = torch.randn(BATCH, 3, 4, 4, generator=generator) * size * loudness
        between = model[0](x).detach()
        y = run(x)
        y.sum().backward()
        true.append(size * (0.4**2 + 0.4 * 1.2 + 1.2**2 / 3) ** 0.5)
        own.append([float(between[:, 0].std())])
        used.append([scale_of(between[n, 0], y[n, 0].detach()) for n in range(BATCH)])
        if step % 15 == 14:
            scheduler.step()
    return true, own, used


def draw(method: str) -> Figure:
    """Draw the image of a method."""
    true, own, used = stream(method)
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    steps = range(1, STEPS + 1)
    axes.plot(steps, true, color=TRUE, lw=1.5, ls="--", label="of all data")
    axes.plot(steps, [v[0] for v in own], "o-", color=OWN, ms=3, lw=0.8, label="of the batch")
    for index, values in enumerate(zip(*used, strict=True)):
        label = f"used by {method}" if index == 0 else None
        axes.plot(steps, values, ".-", color=USED, ms=3, lw=0.9, alpha=0.8, label=label)
    axes.set_ylim(0, 3)
    axes.set_xlabel("step")
    axes.set_ylabel("standard deviation")
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Draw the image of every method."""
    warnings.simplefilter("ignore")
    FOLDER.mkdir(exist_ok=True)
    for method in METHODS:
        path = FOLDER / f"{method}.png"
        draw(method).savefig(path, dpi=100)
        print(path)


if __name__ == "__main__":
    main()
