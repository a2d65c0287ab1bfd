"""Every method in slow, obvious float64, straight from the papers' equations.

Nothing here comes from the library. Activations are ``(N, C, L)``; statistics
are taken channel by channel and group by group, in plain loops. A layer object
holds the state; `forward` gives the output and a function that maps the gradient
of the output to the gradients of input, weight and bias.

Numbers of equations: momentum-bn (MBN), moving-average-bn (MABN), four-things (FT).
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Backward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Layer:
    """State and settings that all methods have."""

    channels: int
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    momentum: float | None = 0.1
    momentum_warmup: int = 0
    norm_batch_size: int | None = None
    example_weight: float = 0.0
    running_mean: Tensor = field(init=False)
    running_var: Tensor = field(init=False)
    num_batches_tracked: int = 0

    def __post_init__(self) -> None:
        self.running_mean = torch.zeros(self.channels, dtype=torch.float64)
        self.running_var = torch.ones(self.channels, dtype=torch.float64)

    # --- training ---------------------------------------------------------

    def forward(self, x: Tensor) -> tuple[Tensor, Backward]:
        """Successive normalization batches, the memory running along them."""
        size = self.norm_batch_size or len(x)
        parts = [self.one_batch(part) for part in x.split(size)]

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            pieces = zip(parts, dy.split(size), strict=True)
            grads = [part_backward(part) for (_, part_backward), part in pieces]
            dx, dw, db = zip(*grads, strict=True)
            return torch.cat(dx), sum(dw), sum(db)

        return torch.cat([y for y, _ in parts]), backward

    def one_batch(self, x: Tensor) -> tuple[Tensor, Backward]:
        """One normalization batch."""
        raise NotImplementedError

    def track(self, channel: int, mean: Tensor, var: Tensor, update_weight: float) -> None:
        """running <- (1 - update_weight) running + update_weight new, where the new is finite."""
        if math.isfinite(mean) and math.isfinite(var):
            old_mean, old_var = (
                self.running_mean[channel].clone(),
                self.running_var[channel].clone(),
            )
            self.running_mean[channel] = (1 - update_weight) * old_mean + update_weight * mean
            self.running_var[channel] = (1 - update_weight) * old_var + update_weight * var

    def update_weight(self) -> float:
        """Count a batch; the weight of it in the running statistics."""
        self.num_batches_tracked += 1
        return self.newest_weight()

    def newest_weight(self) -> float:
        """The weight of the newest batch: the mean of all, momentum, or what it starts with."""
        if self.momentum is None:
            return 1 / self.num_batches_tracked
        if self.momentum_warmup:
            k = self.momentum_warmup
            return max(self.momentum, k / (self.num_batches_tracked - 1 + k))
        return self.momentum

    def by_running(self, x: Tensor) -> tuple[Tensor, Backward]:
        """A batch without statistics of its own: the running ones, constants in backward."""
        mean, var = self.running_mean.clone(), self.running_var.clone()
        z = (x - mean[None, :, None]) / torch.sqrt(var + self.eps)[None, :, None]

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dx = dy * (self.weight / torch.sqrt(var + self.eps))[None, :, None]
            return dx, (dy * z).sum((0, 2)), dy.sum((0, 2))

        return self.weight[None, :, None] * z + self.bias[None, :, None], backward

    # --- inference --------------------------------------------------------

    def infer(self, x: Tensor) -> Tensor:
        """FT eq. 3: an example's first and second moments mixed with the running ones."""
        alpha, y = self.example_weight, torch.empty_like(x)
        for i in range(len(x)):
            for c in range(self.channels):
                first, second = x[i, c].mean(), (x[i, c] ** 2).mean()
                running_second = self.running_var[c] + self.running_mean[c] ** 2
                mean = alpha * first + (1 - alpha) * self.running_mean[c]
                var = alpha * second + (1 - alpha) * running_second - mean**2
                z = (x[i, c] - mean) / torch.sqrt(var + self.eps)
                y[i, c] = self.weight[c] * z + self.bias[c]
        return y

    def state(self) -> dict[str, Any]:
        """Under the names of the library's state_dict."""
        return {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "num_batches_tracked": self.num_batches_tracked,
        }


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance."""
    mean = values.sum() / values.numel()
    return mean, ((values - mean) ** 2).sum() / values.numel()


def unbiased(var: Tensor, count: int) -> Tensor:
    """Bessel's correction."""
    return var * count / (count - 1)


# --- batch normalization and its corrections ----------------------------------


class BatchNorm(Layer):
    """Ioffe and Szegedy 2015; the backward pass is MABN eq. 4 and 5."""

    def one_batch(self, x: Tensor) -> tuple[Tensor, Backward]:
        n, channels, length = x.shape
        if n * length == 1:
            return self.by_running(x)
        update_weight = self.update_weight()
        y, channel_backward = torch.empty_like(x), []
        for c in range(channels):
            mean, var = moments(x[:, c])
            y[:, c], back = self.channel(c, x[:, c], mean, var)
            channel_backward.append(back)
            self.track(c, mean, unbiased(var, n * length), update_weight)
        self.after_batch(x)
        return y, _by_channel(channel_backward)

    def channel(self, c: int, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Callable]:
        """One channel: output, and its backward."""
        w, sigma = self.weight[c].clone(), torch.sqrt(var + self.eps)
        z = (x - mean) / sigma

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = dy * w
            dx = (g - g.mean() - z * (g * z).mean()) / sigma
            return dx, (dy * z).sum(), dy.sum()

        return w * z + self.bias[c], backward

    def after_batch(self, x: Tensor) -> None:
        """What else a batch changes."""


def _by_channel(backwards: list[Callable]) -> Backward:
    def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grads = [back(dy[:, c]) for c, back in enumerate(backwards)]
        dx, dw, db = zip(*grads, strict=True)
        return torch.stack(dx, 1), torch.stack(dw), torch.stack(db)

    return backward


@dataclass
class BatchRenorm(BatchNorm):
    """Ioffe 2017, algorithm 1 (MABN eq. 14): r and d from the running statistics before a step."""

    momentum: float | None = 0.01
    max_r: float = 3.0
    max_d: float = 5.0
    warmup_steps: int = 10000
    smooth: bool = False
    step: int = 0

    def limits(self) -> tuple[float, float]:
        """Largest r and d at the coming step."""
        if self.smooth:
            opened = min(self.step / self.warmup_steps, 1.0)
        else:
            opened = 0.0 if self.step < self.warmup_steps else 1.0
        return 1 + (self.max_r - 1) * opened, self.max_d * opened

    def channel(self, c: int, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Callable]:
        w, sigma = self.weight[c].clone(), torch.sqrt(var + self.eps)
        running_sigma = torch.sqrt(self.running_var[c] + self.eps)
        max_r, max_d = self.limits()
        r = float((sigma / running_sigma).clamp(1 / max_r, max_r))
        d = float(((mean - self.running_mean[c]) / running_sigma).clamp(-max_d, max_d))
        z = (x - mean) / sigma

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = dy * w * r
            dx = (g - g.mean() - z * (g * z).mean()) / sigma
            return dx, (dy * (r * z + d)).sum(), dy.sum()

        return w * (r * z + d) + self.bias[c], backward

    def after_batch(self, x: Tensor) -> None:
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {**super().state(), "step": self.step}


@dataclass
class MomentumBatchNorm(BatchNorm):
    """MBN algorithm 1: eq. 8 forward, 11 and 12 for the weights, 13 backward."""

    batch_size: int = 2
    ideal_batch_size: int = 32
    ideal_decay: float = 0.85
    auto_momentum: bool = True
    average_weight: float = 0.0
    started: int = 0  # batches that were finite in every channel
    whole: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean = torch.zeros(self.channels, dtype=torch.float64)
        self.var = torch.zeros(self.channels, dtype=torch.float64)
        if self.auto_momentum:  # eq. 12: tau = tau_0 ** (m / m_0)
            self.momentum = 1 - self.ideal_decay ** (self.batch_size / self.ideal_batch_size)

    def set_progress(self, epoch: int, total: int) -> None:
        """Eq. 11."""
        rho = min(self.batch_size / self.ideal_batch_size, 1.0) ** (1 / total)
        self.average_weight = rho ** (total / (total - 1) * max(total - epoch, 0)) - rho**total

    def channel(self, c: int, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Callable]:
        w, keep = self.weight[c].clone(), self.average_weight if self.started else 0.0
        mu = keep * self.mean[c] + (1 - keep) * mean
        sigma2 = keep * self.var[c] + (1 - keep) * var
        if math.isfinite(sigma2):
            self.mean[c], self.var[c] = mu, sigma2
        else:
            self.whole = False
        sigma, m = torch.sqrt(sigma2 + self.eps), x.numel()

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # Eq. 13, line by line; its x-hat - mu_M is x - mu_M.
            dxhat = dy * w
            dvar = (dxhat * (x - mu)).sum() * -0.5 * (sigma2 + self.eps) ** -1.5 * (1 - keep)
            dmean = dxhat.sum() * (keep - 1) / sigma + dvar * (-2 * (x - mean)).sum() / m
            dx = dxhat / sigma + dvar * 2 * (x - mean) / m + dmean / m
            return dx, (dy * (x - mu) / sigma).sum(), dy.sum()

        return w * (x - mu) / sigma + self.bias[c], backward

    def after_batch(self, x: Tensor) -> None:
        self.started += self.whole
        self.whole = True

    def state(self) -> dict[str, Any]:
        own = {"mean": self.mean, "var": self.var, "count": self.started}
        own |= {"average_weight": self.average_weight, "batch_size": self.batch_size}
        return {**super().state(), **own}


# --- moving average batch normalization -----------------------------------------


@dataclass
class MovingAverageBatchNorm(Layer):
    """MABN section 4; the readings of its table 4 are those of the library's documentation."""

    momentum: float | None = 0.02
    window: int = 16
    clip: float = 5.0
    warmup_steps: int = 100
    renorm_warmup_steps: int = 1000
    centered: bool = False
    forward_stats: str = "ema"
    backward_stats: str = "sma"
    step: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        # Per channel: the steps seen so far, newest last; pairs in the centred form.
        self.seen: list[list[Tensor]] = [[] for _ in range(self.channels)]
        self.seen_backward: list[list[Tensor]] = [[] for _ in range(self.channels)]
        self.average_backward: list[Tensor | None] = [None] * self.channels
        self.backward_step = 0

    def one_batch(self, x: Tensor) -> tuple[Tensor, Backward]:
        if self.centered and x.shape[0] * x.shape[2] == 1:
            return self.by_running(x)
        self.step += 1
        update_weight = self.update_weight()
        warming = self.step <= self.window or self.step < self.warmup_steps
        plain = self.step <= max(self.renorm_warmup_steps, self.warmup_steps)
        y, backwards = torch.empty_like(x), []
        for c in range(self.channels):
            y[:, c], back = self.channel(c, x[:, c], warming, plain, update_weight)
            backwards.append(back)
        by_channel = _by_channel(backwards)

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            result = by_channel(dy)
            self.backward_step += 1
            return result

        return y, backward

    def channel(
        self, c: int, x: Tensor, warming: bool, plain: bool, update_weight: float
    ) -> tuple[Tensor, Callable]:
        """One channel: output, and its backward."""
        own = torch.stack(moments(x)) if self.centered else (x**2).mean()[None]
        if torch.isfinite(own).all():
            self.seen[c].append(own)
        average = own
        if not warming:  # eq. 13, of the forward statistics
            average = torch.stack(self.seen[c][-self.window :]).sum(0) / self.window
        running = torch.stack([self.running_mean[c], self.running_var[c]])
        running = running if self.centered else running[1:]
        # What the backward pass is that of, and what the output is normalized by.
        inner = own if self.backward_stats == "batch" else average
        outer = {"batch": own, "sma": average, "ema": running}[self.forward_stats]
        mean, var = (inner[0], inner[1]) if self.centered else (torch.zeros(()), inner[0])
        chi, hat = torch.sqrt(var + self.eps), torch.sqrt(outer[-1] + self.eps)
        r, d = 1.0, 0.0
        if not plain:  # eq. 19; eq. 14 in the centred form
            r = float((chi / hat).clamp(1 / self.clip, self.clip))
            if self.centered:
                d = float(((mean - outer[0]) / hat).clamp(-self.clip, self.clip))
        self.track(c, mean, var, update_weight)
        w, z = self.weight[c].clone(), (x - mean) / chi

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = dy * w * r
            new = torch.stack([g.mean(), (g * z).mean()]) if self.centered else (g * z).mean()[None]
            average = self.average(c, new)
            if warming or self.backward_stats == "batch":
                average = new
            mean_g = average[0] if self.centered else 0.0  # eq. 4; eq. 16 has none
            dx = (g - mean_g - z * average[-1]) / chi  # eq. 20
            return dx, (dy * (r * z + d)).sum(), dy.sum()

        return w * (r * z + d) + self.bias[c], backward

    def average(self, c: int, new: Tensor) -> Tensor:
        """Remember the backward statistics of a step, give their average."""
        good = bool(torch.isfinite(new).all())
        if self.backward_stats == "ema":
            old = self.average_backward[c]
            update_weight = self.newest_weight()
            mixed = new if old is None else (1 - update_weight) * old + update_weight * new
            if good:
                self.average_backward[c] = mixed
            return mixed
        if good:
            self.seen_backward[c].append(new)
        latest = self.seen_backward[c][-self.window :] or [new]
        return torch.stack(latest).sum(0) / len(latest)

    def infer(self, x: Tensor) -> Tensor:
        if self.centered:
            return super().infer(x)
        y = torch.empty_like(x)
        for i in range(len(x)):
            for c in range(self.channels):
                second = self.example_weight * (x[i, c] ** 2).mean()
                second = second + (1 - self.example_weight) * self.running_var[c]
                y[i, c] = self.weight[c] * x[i, c] / torch.sqrt(second + self.eps) + self.bias[c]
        return y

    def state(self) -> dict[str, Any]:
        own: dict[str, Any] = {"step": self.step}
        if self.forward_stats == "sma" or self.backward_stats != "batch":
            own["window"] = self._table(self.seen)
        if self.backward_stats == "sma":
            own["backward_average"] = self._table(self.seen_backward)
        elif self.backward_stats == "ema":
            blank = torch.zeros(2 if self.centered else 1, dtype=torch.float64)
            rows = [blank if row is None else row for row in self.average_backward]
            own["backward_average"] = torch.stack(rows, 1).flatten()
        if self.backward_stats != "batch":
            own["backward_step"] = self.backward_step
        return {**super().state(), **own}

    def _table(self, seen: list[list[Tensor]]) -> Tensor:
        """The last steps as (window, statistics x channels), zeros where there were none."""
        blank = torch.zeros(2 if self.centered else 1, dtype=torch.float64)
        columns = []
        for steps in seen:
            latest = steps[-self.window :]
            columns.append(torch.stack([blank] * (self.window - len(latest)) + latest))
        return torch.stack(columns, 2).flatten(1)


# --- groups of examples, groups of channels ----------------------------------------


def equal_groups(examples: int, size: int) -> list[int]:
    """ceil(n / size) groups as equal as can be, larger ones first."""
    groups = math.ceil(examples / size)
    return [examples // groups + (k < examples % groups) for k in range(groups)]


@dataclass
class GhostBatchNorm(Layer):
    """FT section 3.2, eq. 4."""

    ghost_size: int = 32

    def one_batch(self, x: Tensor) -> tuple[Tensor, Backward]:
        sizes = equal_groups(len(x), self.ghost_size)
        parts, tracked = [], []
        for part in x.split(sizes):
            if part.shape[0] * part.shape[2] == 1:
                parts.append(self.by_running(part))
                continue
            twin = BatchNorm(self.channels, self.weight, self.bias, self.eps, 1.0)
            parts.append(twin.forward(part))
            tracked.append((len(part), twin.running_mean, twin.running_var))
        self._track_groups(tracked)

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            pieces = zip(parts, dy.split(sizes), strict=True)
            dx, dw, db = zip(*[back(part) for (_, back), part in pieces], strict=True)
            return torch.cat(dx), sum(dw), sum(db)

        return torch.cat([y for y, _ in parts]), backward

    def _track_groups(self, groups: list[tuple[int, Tensor, Tensor]]) -> None:
        """One update a forward, each group weighing by its share of the examples."""
        if not groups:
            return
        update_weight, total = self.update_weight(), sum(size for size, _, _ in groups)
        mean = sum(size / total * mean for size, mean, _ in groups)
        var = sum(size / total * var for size, _, var in groups)
        for c in range(self.channels):
            self.track(c, mean[c], var[c], update_weight)


@dataclass
class BatchGroupNorm(GhostBatchNorm):
    """FT section 3.4: statistics over a group of examples and a group of channels."""

    num_groups: int = 1
    ghost_size: int = 2

    def one_batch(self, x: Tensor) -> tuple[Tensor, Backward]:
        n, channels, length = x.shape
        width = channels // self.num_groups
        if width == 1 and length == 1 and min(equal_groups(n, self.ghost_size)) == 1:
            return super().one_batch(x)
        sizes = equal_groups(n, self.ghost_size)
        outputs, tracked = [], []
        for part in x.split(sizes):
            leaf = part.detach().clone().requires_grad_()
            w = self.weight.detach().clone().requires_grad_()
            b = self.bias.detach().clone().requires_grad_()
            rows = []
            for k in range(self.num_groups):
                group = leaf[:, k * width : (k + 1) * width]
                mean, var = moments(group)
                rows.append((group - mean) / torch.sqrt(var + self.eps))
            y = w[None, :, None] * torch.cat(rows, 1) + b[None, :, None]
            outputs.append((y, leaf, w, b))
            count = len(part) * length
            if count > 1:
                each = [moments(part[:, c]) for c in range(channels)]
                mean = torch.stack([m for m, _ in each])
                var = torch.stack([unbiased(v, count) for _, v in each])
                tracked.append((len(part), mean, var))
        self._track_groups(tracked)

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            pieces = zip(outputs, dy.split(sizes), strict=True)
            grads = [torch.autograd.grad(y, (x, w, b), d) for (y, x, w, b), d in pieces]
            dx, dw, db = zip(*grads, strict=True)
            return torch.cat(dx), sum(dw), sum(db)

        return torch.cat([y.detach() for y, *_ in outputs]), backward

    def infer(self, x: Tensor) -> Tensor:
        alpha, y, width = self.example_weight, torch.empty_like(x), self.channels // self.num_groups
        for i in range(len(x)):
            for k in range(self.num_groups):
                part = slice(k * width, (k + 1) * width)
                running_second = self.running_var[part] + self.running_mean[part] ** 2
                first = alpha * x[i, part].mean(1) + (1 - alpha) * self.running_mean[part]
                second = alpha * (x[i, part] ** 2).mean(1) + (1 - alpha) * running_second
                mean, var = first.mean(), second.mean() - first.mean() ** 2
                z = (x[i, part] - mean) / torch.sqrt(var + self.eps)
                y[i, part] = self.weight[part, None] * z + self.bias[part, None]
        return y


@dataclass
class L1BatchNorm(BatchNorm):
    """Wu et al. 2018: the mean absolute deviation, times sqrt(pi / 2), as the spread."""

    def spread(self, x: Tensor, mean: Tensor) -> Tensor:
        """In the place of the standard deviation."""
        return math.sqrt(math.pi / 2) * (x - mean).abs().sum() / x.numel()

    def one_batch(self, x: Tensor) -> tuple[Tensor, Backward]:
        n, channels, length = x.shape
        if n * length == 1:
            return self.by_running(x)
        update_weight = self.update_weight()
        y, backwards = torch.empty_like(x), []
        for c in range(channels):
            mean = x[:, c].sum() / (n * length)
            self.track(c, mean, self.spread(x[:, c], mean) ** 2, update_weight)
            y[:, c], back = self.by_autograd(c, x[:, c])
            backwards.append(back)
        return y, _by_channel(backwards)

    def by_autograd(self, c: int, x: Tensor) -> tuple[Tensor, Callable]:
        """The formula, and torch's derivative of it."""
        leaves = [t.detach().clone().requires_grad_() for t in (x, self.weight[c], self.bias[c])]
        inner, w, b = leaves
        with torch.enable_grad():
            mean = inner.sum() / x.numel()
            sigma = torch.sqrt(self.spread(inner, mean) ** 2 + self.eps)
            y = w * (inner - mean) / sigma + b

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return torch.autograd.grad(y, leaves, dy)

        return y.detach(), backward

    def infer(self, x: Tensor) -> Tensor:
        """Own and running statistics mixed as if the squared spreads were variances."""
        alpha, rows = self.example_weight, []
        for i in range(len(x)):
            for c in range(self.channels):
                first = x[i, c].mean()
                second = self.spread(x[i, c], first) ** 2 + first**2
                running_second = self.running_var[c] + self.running_mean[c] ** 2
                mean = alpha * first + (1 - alpha) * self.running_mean[c]
                var = alpha * second + (1 - alpha) * running_second - mean**2
                z = (x[i, c] - mean) / torch.sqrt(var + self.eps)
                rows.append(self.weight[c] * z + self.bias[c])
        return torch.stack(rows).view(x.shape)


@dataclass
class RangeBatchNorm(L1BatchNorm):
    """Banner et al. 2018: the range of the centred values over sqrt(2 ln n) as the spread."""

    def spread(self, x: Tensor, mean: Tensor) -> Tensor:
        centred = x - mean
        if x.numel() == 1:
            return centred.sum() * 0
        return (centred.max() - centred.min()) / math.sqrt(2 * math.log(x.numel()))


@dataclass
class SampledBatchNorm(BatchNorm):
    """Chen et al. 2018, eq. 3, 4 and 6: statistics of a set of places (example, pixel).

    `spatial` is the shape of a map, which ``(N, C, L)`` does not tell. An epoch's numbers are those
    of Python's generator, seeded with "seed/epoch"; a number below 2 ** 31 scaled to the possible
    places is the place.
    """

    sample: str = "batch"
    ratio: float = 1 / 32
    size: Any = None
    num_virtual: int = 0
    mix: float = 0.5
    seed: int = 0
    epoch: int = 1
    spatial: tuple[int, ...] = ()

    def set_progress(self, epoch: int, total: int) -> None:
        """The epoch is the number of the draw."""
        self.epoch = epoch

    def numbers(self) -> list[int]:
        """Of this epoch."""
        source = random.Random(f"{self.seed}/{self.epoch}")
        return [source.getrandbits(31) for _ in range(4)]

    def places(self, n: int, length: int) -> list[tuple[float, list[tuple[int, int]]]]:
        """Weights, and the places (example, pixel) that have them."""
        everything = range(length)
        kind, first = self.sample.split("+")[0], 0
        parts = []
        if "virtual" in self.sample:
            first = min(self.num_virtual, n)
            parts.append((self.mix, [(i, k) for i in range(first) for k in everything]))
        rest = range(first, n)
        if kind != "virtual" and len(rest):
            parts.append((1 - self.mix, self.chosen(kind, rest, length)))
        if len(parts) == 1:
            return [(1.0, parts[0][1])]
        several = [(share, where) for share, where in parts if len(where) > 1 and share > 0]
        kept = several or [part for part in parts if part[0] > 0][:1]
        return kept if len(kept) > 1 else [(1.0, kept[0][1])]

    def chosen(self, kind: str, rows: range, length: int) -> list[tuple[int, int]]:
        """Places of the sampled part."""
        numbers, n = self.numbers(), len(rows)
        if kind == "points":
            total = n * length
            s = self.closest(self.ratio * total if self.size is None else self.size, total)
            s = max(s, min(16, total)) if self.size is None else s
            order = sorted(range(total), key=lambda p: self.hash(p, numbers[0]))
            picked = sorted(order[:s]) if s < total else range(total)
            return [(rows[p // length], p % length) for p in picked]
        if kind == "feature":
            patch = self.patch(n)
            pixels = list(itertools.product(*(range(side) for side in self.spatial)))
            begins = [
                numbers[d + 1] * (whole - side + 1) // 2**31
                for d, (side, whole) in enumerate(zip(patch, self.spatial, strict=True))
            ]
            inside = [
                k
                for k, pixel in enumerate(pixels)
                if all(b <= p < b + s for b, p, s in zip(begins, pixel, patch, strict=True))
            ]
            return [(i, k) for i in rows for k in inside]
        s = self.closest(self.ratio * n if self.size is None else self.size, n)
        while self.size is None and s * length < 16 and s < n:
            s += 1
        begin = numbers[0] * (n - s + 1) // 2**31 if kind == "batch" else 0
        return [(i, k) for i in rows[begin : begin + s] for k in range(length)]

    def closest(self, wanted: float, most: int) -> int:
        """The closest count from 1 to `most`, halves up."""
        return min(max(math.floor(wanted + 0.5), 1), most)

    def patch(self, n: int) -> list[int]:
        """Sides in turn, the shortest first, each its share of what is left of the area."""
        if self.size is not None:
            given = self.size if isinstance(self.size, tuple) else [self.size] * len(self.spatial)
            return [min(a, b) for a, b in zip(given, self.spatial, strict=True)]
        area = math.prod(self.spatial)
        for wanted in (self.ratio * area, min(16.0 / n, area)):
            sides, left = list(self.spatial), wanted
            order = sorted(range(len(sides)), key=lambda d: self.spatial[d])
            for k, d in enumerate(order):
                later = math.prod(self.spatial[e] for e in order[k:])
                scale = (left / later) ** (1 / (len(order) - k))
                sides[d] = self.closest(self.spatial[d] * scale, self.spatial[d])
                left /= sides[d]
            if n * math.prod(sides) >= 16:
                break
        return sides

    @staticmethod
    def hash(position: int, key: int) -> int:
        """One to one on 31 bits."""
        value = (position * 0x1E3779B1 + key) % 2**31
        value = ((value ^ (value >> 15)) * 0x45EBCA6B) % 2**31
        value = ((value ^ (value >> 13)) * 0x42B2AE35) % 2**31
        return value ^ (value >> 16)

    def one_batch(self, x: Tensor) -> tuple[Tensor, Backward]:
        n, channels, length = x.shape
        parts = self.places(n, length)
        count = sum(len(where) for _, where in parts)
        if count == 1:
            return self.by_running(x)
        update_weight = self.update_weight()
        y, backwards = torch.empty_like(x), []
        for c in range(channels):
            y[:, c], back = self.from_sample(c, x[:, c], parts)
            backwards.append(back)
            values = [
                (share, moments(torch.stack([x[i, c, k] for i, k in w]))) for share, w in parts
            ]
            mean, var = (sum(share * pair[j] for share, pair in values) for j in (0, 1))
            self.track(c, mean, unbiased(var, count), update_weight)
        return y, _by_channel(backwards)

    def from_sample(
        self, c: int, x: Tensor, parts: list[tuple[float, list[tuple[int, int]]]]
    ) -> tuple[Tensor, Callable]:
        """Eq. 1 with eq. 3 and 4; backward line by line as eq. 5 and 6."""
        w = self.weight[c].clone()
        own = [moments(torch.stack([x[i, k] for i, k in where])) for _, where in parts]
        mean = sum(share * m for (share, _), (m, _) in zip(parts, own, strict=True))
        var = sum(share * v for (share, _), (_, v) in zip(parts, own, strict=True))
        sigma = torch.sqrt(var + self.eps)
        z = (x - mean) / sigma

        def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dz = dy * w
            dmean = (dz * -1 / sigma).sum()
            dvar = (dz * (x - mean) * -0.5 * (var + self.eps) ** -1.5).sum()
            dx = dz / sigma
            for (share, where), (m, _) in zip(parts, own, strict=True):
                for i, k in where:
                    dx[i, k] += share * dmean / len(where)
                    dx[i, k] += share * dvar * 2 * (x[i, k] - m) / len(where)
            return dx, (dy * z).sum(), dy.sum()

        return w * z + self.bias[c], backward

    def state(self) -> dict[str, Any]:
        own = {"seed": self.seed, "draw": self.epoch, "index": torch.tensor(self.numbers())}
        return {**super().state(), **own}


@dataclass
class CrossIteration:
    """CBN: a convolution and the norm of its output, differentiable by autograd.

    Numbers of equations: cross-iteration-bn. ``convolve(x, w)`` is the convolution without its
    bias, which adds to the mean alone. The Taylor polynomials of eq. 7 and 8 are directional
    derivatives of the statistics of the old inputs, as functions of the weights.
    """

    convolve: Callable[[Tensor, Tensor], Tensor]
    channels: int
    window: int
    order: int = 1
    burn_in_steps: int = 0
    eps: float = 1e-5
    momentum: float = 0.1
    backward_stats: str = "batch"
    running_stats: str = "batch"
    running_mean: Tensor = field(init=False)
    running_var: Tensor = field(init=False)
    step: int = 0
    past: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    past_backward: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running_mean = torch.zeros(self.channels, dtype=torch.float64)
        self.running_var = torch.ones(self.channels, dtype=torch.float64)

    def statistics(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and mean of squares of the convolution's output, a channel each."""
        values = self.convolve(x, w).transpose(0, 1).flatten(1)
        return values.mean(1), values.square().mean(1)

    def taylor(self, x: Tensor, then: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """eq. 7, 8 (and section 4.4 for the second order), then eq. 10's maximum."""

        def along(t: Tensor) -> tuple[Tensor, Tensor]:
            return self.statistics(x, then + t * (now - then))

        zero, one = torch.tensor(0.0).double(), torch.tensor(1.0).double()
        mu, nu = along(zero)
        if self.order >= 1:
            d_mu, d_nu = torch.func.jvp(along, (zero,), (one,))[1]
            mu, nu = mu + d_mu, nu + d_nu
        if self.order == 2:

            def slope(t: Tensor) -> tuple[Tensor, Tensor]:
                return torch.func.jvp(along, (t,), (one,))[1]

            dd_mu, dd_nu = torch.func.jvp(slope, (zero,), (one,))[1]
            mu, nu = mu + dd_mu / 2, nu + dd_nu / 2
        return mu, torch.maximum(nu, mu**2)

    def forward(
        self, x: Tensor, w: Tensor, b: Tensor | None, gamma: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the mean and variance that it was normalized by (eq. 9 to 12)."""
        self.step += 1
        out = self.convolve(x, w)
        shift = torch.zeros(self.channels).double() if b is None else b
        own_mu, own_nu = self.statistics(x, w)
        count = float(out.numel() // self.channels)
        entries = []
        if self.window > 1 and self.step > self.burn_in_steps:
            for past_x, past_w, past_b in self.past[-(self.window - 1) :]:
                with torch.no_grad():
                    mu, nu = self.taylor(past_x, past_w, w.detach())
                values = self.convolve(past_x, past_w).numel() // self.channels
                then = past_b if self.order == 0 else shift.detach()  # naive: not even the bias
                entries.append((float(values), mu + then, nu + 2 * mu * then + then**2))
            self.past.append((x.detach(), w.detach().clone(), shift.detach().clone()))
        entries.append((count, own_mu + shift, own_nu + 2 * own_mu * shift + shift**2))
        total = sum(n for n, _, _ in entries)
        mean = sum(n * mu for n, mu, _ in entries) / total
        var = sum(n * nu for n, _, nu in entries) / total - mean**2
        own_var = (own_nu - own_mu**2) * count / (count - 1)
        new = (own_mu + shift, own_var)
        if self.running_stats == "window":
            new = (mean, var * total / (total - 1))
        update_weight = self.momentum
        self.running_mean = (1 - update_weight) * self.running_mean + update_weight * new[
            0
        ].detach()
        self.running_var = (1 - update_weight) * self.running_var + update_weight * new[1].detach()
        column = (1, -1, *(1,) * (out.dim() - 2))
        out = out + shift.view(column)
        z = (out - mean.view(column)) / torch.sqrt(var + self.eps).view(column)
        return gamma.view(column) * z + beta.view(column), mean.detach(), var.detach()

    def windowed_gradient(
        self, out: Tensor, dy: Tensor, gamma: Tensor, mean: Tensor, var: Tensor
    ) -> Tensor:
        """moving-average-bn, eq. 13: the mean of g * z is its average over the window."""
        column = (1, -1, *(1,) * (out.dim() - 2))
        sigma = torch.sqrt(var + self.eps).view(column)
        z, g = (out - mean.view(column)) / sigma, dy * gamma.view(column)
        own_g, own_psi = (t.transpose(0, 1).flatten(1).mean(1) for t in (g, g * z))
        self.past_backward = [*self.past_backward, own_psi][-self.window :]
        psi = sum(self.past_backward) / len(self.past_backward)
        return (g - own_g.view(column) - z * psi.view(column)) / sigma


# --- what is done to a trained network ------------------------------------------------


def population(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel of ``(N, C, ...)``, all values at once."""
    flat = values.double().transpose(0, 1).flatten(1)
    mean = flat.sum(1) / flat.shape[1]
    return mean, ((flat - mean[:, None]) ** 2).sum(1) / (flat.shape[1] - 1)


def recalibrated(model: torch.nn.Module, data: Any, names: list[str]) -> dict[str, Any]:
    """Population statistics of each layer's input under those of the layers before it.

    The whole data set goes through a float64 model in evaluation mode as one batch,
    once a layer, in the order in which the layers run.

    Returns:
        ``{name: (mean, var)}`` of the named layers.
    """
    inputs: dict[str, Tensor] = {}
    layers = dict(model.named_modules())
    for name in names:

        def keep(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            inputs[name] = args[0] if args else kwargs["input"]

        layers[name].register_forward_pre_hook(keep, with_kwargs=True)
    found: dict[str, Any] = {}
    for _ in names:
        inputs.clear()
        with torch.no_grad():
            model(**data) if isinstance(data, dict) else model(data)
            name = next(name for name in inputs if name not in found)
            found[name] = population(inputs[name])
            layers[name].running_mean.copy_(found[name][0])
            layers[name].running_var.copy_(found[name][1])
    return found


def weighed(x: Tensor, norm: Any, groups: int, alpha: float) -> Tensor:
    """FT eq. 3 of a trained norm, mean and mean square averaged over each channel group."""
    y, size = torch.empty_like(x), x.shape[1] // groups
    for i in range(len(x)):
        for first in range(0, x.shape[1], size):
            channels = range(first, first + size)
            mean = second = torch.zeros((), dtype=x.dtype)
            for c in channels:
                m, v = norm.running_mean[c], norm.running_var[c]
                mean = mean + (alpha * x[i, c].mean() + (1 - alpha) * m) / size
                second = second + (alpha * (x[i, c] ** 2).mean() + (1 - alpha) * (v + m**2)) / size
            for c in channels:
                z = (x[i, c] - mean) / torch.sqrt(second - mean**2 + norm.eps)
                y[i, c] = norm.weight[c] * z + norm.bias[c]
    return y


def foretelling(x: Tensor, mean: Tensor, var: Tensor, eps: float, size: int) -> float:
    """The alpha that best foretells batches' statistics from their examples', by least squares."""
    asked, given = [], []
    for start in range(0, len(x) - size + 1, size):
        batch = x[start : start + size]
        for c in range(x.shape[1]):
            v = var[c] + eps
            for example in batch[:, c]:
                given.append((example.mean() - mean[c]) / v.sqrt())
                asked.append((batch[:, c].mean() - mean[c]) / v.sqrt())
                given.append((((example - mean[c]) ** 2).mean() + eps) / v - 1)
                asked.append((((batch[:, c] - mean[c]) ** 2).mean() + eps) / v - 1)
    matrix, right = torch.stack(given)[:, None], torch.stack(asked)[:, None]
    return float(torch.linalg.lstsq(matrix, right).solution)


def generalized_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Rezatofighi et al. 2019, algorithm 1, of two boxes (left, top, right, bottom)."""
    wide = max(min(one[2], other[2]) - max(one[0], other[0]), 0)
    high = max(min(one[3], other[3]) - max(one[1], other[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - wide * high
    hull_wide = max(one[2], other[2]) - min(one[0], other[0])
    hull_high = max(one[3], other[3]) - min(one[1], other[1])
    return wide * high / union - (hull_wide * hull_high - union) / (hull_wide * hull_high)


def suppressed(
    boxes: Sequence[Sequence[float]], scores: Sequence[float], classes: Sequence[int], most: float
) -> list[int]:
    """Boxes, best first, but those that a kept one of their class overlaps by more than most."""
    kept: list[int] = []
    for k in sorted(range(len(boxes)), key=lambda k: -scores[k]):
        left, top, right, bottom = boxes[k]
        for j in kept:
            wide = max(min(right, boxes[j][2]) - max(left, boxes[j][0]), 0)
            high = max(min(bottom, boxes[j][3]) - max(top, boxes[j][1]), 0)
            own = (right - left) * (bottom - top)
            others = (boxes[j][2] - boxes[j][0]) * (boxes[j][3] - boxes[j][1])
            if classes[j] == classes[k] and wide * high > most * (own + others - wide * high):
                break
        else:
            kept.append(k)
    return kept


def focal_loss(logit: float, wanted: bool) -> float:
    """Lin et al. 2017, equation 5, with alpha 0.25 and gamma 2."""
    p = 1 / (1 + math.exp(-logit))
    if wanted:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def learned_box(point: Sequence[float], boxes: Sequence[Sequence[float]], reach: float) -> int:
    """FCOS: the smallest of the boxes (class, 4 sides, crowd) that a place is in the middle of."""
    best, which = math.inf, -1
    for k, (label, left, top, right, bottom, crowd) in enumerate(boxes):
        if label < 0 or crowd or not (left < point[0] < right and top < point[1] < bottom):
            continue
        across, down = abs(point[0] - (left + right) / 2), abs(point[1] - (top + bottom) / 2)
        if max(across, down) <= reach and (right - left) * (bottom - top) < best:
            best, which = (right - left) * (bottom - top), k
    return which
