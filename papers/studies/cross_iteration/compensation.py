"""Old statistics at today's weights, compensated for one layer's weights or two.

Predictions by nothing, by one layer's weights, by their second order (table 9) and by the weights
of two layers, their errors, and the time of a step. The layers of the library compensate one: here
everything is slow and plain, for chains of convolution, norm and ReLU.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.backends.protocol import Statistics
from anybatch.core.autograd import normalize_by

if TYPE_CHECKING:
    pass

KINDS = ("naive", "one layer", "one layer, second order", "two layers")
_TAYLOR = {"naive": (0, 0), "one layer": (1, 1), KINDS[2]: (1, 2), "two layers": (2, 1)}


class Snapshot(NamedTuple):
    """State of a step that predicts one layer's statistics at other weights.

    Attributes:
        start: Input of the layer before, or of the layer itself where it is the first.
        earlier: Weight and bias of the convolution before, then mean, variance, scale, shift and
            eps of its norm, all held constant but for the weight; None for the first layer.
        weight: Weight of the convolution.
        values: Values per channel.
    """

    start: Tensor
    earlier: tuple[Any, ...] | None
    weight: Tensor
    values: int


def _moments(snapshot: Snapshot, earlier: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean of squares of the convolution's output without its bias."""
    x = snapshot.start
    if snapshot.earlier is not None:
        _, bias, mean, var, scale, shift, eps = snapshot.earlier
        x = F.conv2d(x, snapshot.earlier[0] if earlier is None else earlier, bias, padding=1)
        x = F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps).relu()
    out = F.conv2d(x, weight, padding=1)
    return out.mean((0, 2, 3)), out.square().mean((0, 2, 3))


def predict(
    snapshot: Snapshot, earlier: Tensor | None, weight: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """An old batch's mean and variance at today's weights, by a Taylor polynomial.

    Args:
        snapshot: Of the old step.
        earlier: Today's weight of the layer before; None where there is none.
        weight: Today's weight of the layer.
        kind: One of `KINDS`. For "two layers" the polynomial is of both layers' weights, the
            statistics, scale and shift of the norm between them being constants; for the others of
            this layer's alone (equations 7 and 8).

    Returns:
        Mean, and variance clamped as in equation 10, without the bias.
    """
    layers, order = _TAYLOR[kind]
    then = None if snapshot.earlier is None else snapshot.earlier[0]

    def along(t: Tensor) -> tuple[Tensor, Tensor]:
        now = snapshot.weight + t * (weight - snapshot.weight)
        if layers == 2 and then is not None and earlier is not None:
            return _moments(snapshot, then + t * (earlier - then), now)
        return _moments(snapshot, then, now)

    with torch.no_grad():
        zero, one = weight.new_zeros(()), weight.new_ones(())
        mean, second = along(zero)
        if order >= 1:
            slopes = torch.func.jvp(along, (zero,), (one,))[1]
            mean, second = mean + slopes[0], second + slopes[1]
        if order == 2:
            curves = torch.func.jvp(
                lambda t: torch.func.jvp(along, (t,), (one,))[1], (zero,), (one,)
            )[1]
            mean, second = mean + curves[0] / 2, second + curves[1] / 2
        return mean, (second - mean.square()).clamp_(min=0)


class Chain(nn.Module):
    """Convolutions with cross-iteration norms and ReLUs, and a linear head, for experiments.

    Args:
        widths: Channels, from those of the input on.
        classes: Of the head.
        window: Steps in the averages, this one included (default 8).
        kind: One of `KINDS`: how old statistics are moved to today's weights.
    """

    def __init__(
        self, widths: Sequence[int], classes: int, window: int = 8, kind: str = "one layer"
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: give one of {', '.join(map(repr, KINDS))}")
        self.window, self.kind = window, kind
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], classes)
        self.used: list[Statistics] = []
        self.past: list[deque[Snapshot]] = [deque(maxlen=window - 1) for _ in self.convs]

    @property
    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Each convolution with its norm."""
        return list(zip(self.convs, self.norms, strict=True))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        before: Tensor | None = None  # input of the layer before
        self.used = [] if self.training else self.used
        earlier: tuple[Any, ...] | None = None
        for (conv, norm), past in zip(self.pairs, self.past, strict=True):
            out = conv(x)
            if not self.training:
                x = norm(out).relu()
                continue
            snapshot = Snapshot(
                x.detach() if before is None else before,
                earlier,
                conv.weight.detach().clone(),
                out.numel() // out.shape[1],
            )
            statistics = self._statistics(out.detach(), conv, snapshot, past)
            past.append(snapshot)
            self.used.append(statistics)
            _track(norm, statistics)
            before, earlier = x.detach(), _constants(conv, norm, statistics)
            sizes = (out.shape[0],)
            x = normalize_by(out, norm.weight, norm.bias, sizes, statistics, norm.eps).relu()
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores

    def _statistics(
        self, out: Tensor, conv: nn.Conv2d, now: Snapshot, past: deque[Snapshot]
    ) -> Statistics:
        """Equations 9 to 11 over the window."""
        var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
        weight = None if now.earlier is None else now.earlier[0]
        entries = [(now.values, mean, var)]
        for old in past:
            moved, spread = predict(old, weight, now.weight, self.kind)
            bias = 0.0 if conv.bias is None else conv.bias.detach()
            entries.append((old.values, moved + bias, spread))
        total = sum(values for values, _, _ in entries)
        pooled = sum((m * (n / total) for n, m, _ in entries), torch.zeros_like(mean))
        parts = ((v + (m - pooled).square()) * (n / total) for n, m, v in entries)
        spread = sum(parts, torch.zeros_like(var))
        return Statistics(pooled, spread, batch_weight=now.values / total)


def _constants(conv: nn.Conv2d, norm: nn.BatchNorm2d, statistics: Statistics) -> tuple[Any, ...]:
    tensors = (conv.weight, conv.bias, statistics.mean, statistics.var, norm.weight, norm.bias)
    return (*(None if t is None else t.detach().clone() for t in tensors), norm.eps)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, statistics: Statistics) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    assert statistics.mean is not None
    norm.running_mean.lerp_(statistics.mean, 0.1)
    norm.running_var.lerp_(statistics.var, 0.1)


def batches(x: Tensor, y: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Random batches of a data set, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(x), (size,), generator=generator)
        yield x[index], y[index]


@dataclass(frozen=True)
class Errors:
    """Errors of predicted statistics, by kind and age.

    Attributes:
        layer: Truth: the old input of the layer under today's weights of the layer.
        network: Truth: the old batch through the whole of today's network.
    """

    layer: dict[str, list[float]]
    network: dict[str, list[float]]


def compensation_errors(
    x: Tensor,
    y: Tensor,
    *,
    widths: Sequence[int] = (8, 8, 16),
    batch_size: int = 4,
    window: int = 8,
    steps: int = 50,
    rate: float = 0.01,
    seed: int = 0,
) -> Errors:
    """Train a chain and measure how well each kind predicts old statistics at today's weights.

    The error of a step is the root mean square, over the channels of the last convolution, of the
    mean's in standard deviations and the variance's as a part of the variance; here averaged over
    the steps from `window` on.

    Args:
        x: Images ``(N, C, H, W)``.
        y: Their classes.
        widths: Channels of the convolutions.
        batch_size: Examples in a step.
        window: Steps in the averages.
        steps: Steps of SGD with momentum 0.9.
        rate: Its learning rate.
        seed: Of weights and batches.

    Returns:
        Errors by kind, a list by age from 1 to ``window - 1``.
    """
    torch.manual_seed(seed)
    net = Chain((x.shape[1], *widths), int(y.max()) + 1, window)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    kept: deque[Tensor] = deque(maxlen=window - 1)
    sums: dict[tuple[str, str, int], list[float]] = {}
    for step, (some, classes) in enumerate(batches(x, y, batch_size, steps, seed)):
        if step >= window:
            now, earlier = (net.pairs[k][0].weight.detach() for k in (-1, -2))
            for age in range(1, window):
                old = net.past[-1][-age]
                truths = {"layer": _by_layer(old, now), "network": _by_network(net, kept[-age])}
                for kind in KINDS:
                    found = predict(old, earlier, now, kind)
                    for name, truth in truths.items():
                        error = _distance(found, truth)
                        sums.setdefault((name, kind, age), []).append(error)
        loss = F.cross_entropy(net(some), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept.append(some)
    ages = range(1, window)
    tables = [
        {kind: [fmean(sums[name, kind, age]) for age in ages] for kind in KINDS}
        for name in ("layer", "network")
    ]
    return Errors(*tables)


@torch.no_grad()
def _by_layer(old: Snapshot, weight: Tensor) -> tuple[Tensor, Tensor]:
    mean, second = _moments(old, None, weight)
    return mean, second - mean.square()


@torch.no_grad()
def _by_network(net: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of the last convolution for an old batch under today's network.

    Norms in between take the statistics that they took last, not those of this batch alone.
    """
    for (conv, norm), statistics in zip(net.pairs[:-1], net.used, strict=False):
        mean, var = statistics.mean, statistics.var
        out = conv(x)
        x = F.batch_norm(out, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps).relu()
    out = F.conv2d(x, net.pairs[-1][0].weight, padding=1)
    var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
    return mean, var


def _distance(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    var = truth[1].clamp(min=1e-6)
    mean_error = (found[0] - truth[0]).square() / var
    var_error = (found[1] / var - 1).square()
    return float((mean_error + var_error).mean().sqrt())


def step_seconds(x: Tensor, y: Tensor, *, batch_size: int = 4, rounds: int = 7) -> dict[str, float]:
    """Time a training step of a chain, for each kind in the same plain code.

    Args:
        x: Images.
        y: Their classes.
        batch_size: Examples in a step.
        rounds: Blocks of 5 steps a kind, interleaved.

    Returns:
        The median seconds of a step.
    """
    torch.manual_seed(0)
    nets = {kind: Chain((x.shape[1], 8, 8, 16), int(y.max()) + 1, 8, kind) for kind in KINDS}
    some = list(batches(x, y, batch_size, 13, 0))

    def block(net: Chain, steps: int) -> float:
        start = time.perf_counter()
        for given, classes in some[:steps]:
            F.cross_entropy(net(given), classes).backward()
        return (time.perf_counter() - start) / steps

    for net in nets.values():
        block(net, 8)  # fills the window
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, net in nets.items():
            taken[kind].append(block(net, 5))
    return {kind: median(values) for kind, values in taken.items()}
