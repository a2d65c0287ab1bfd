"""Example weights from how training normalized: after EvalNorm (Singh and Shrivastava 2019)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch import backends
from anybatch.backends.protocol import Statistics
from anybatch.core.arguments import check_count
from anybatch.core.autograd import normalize_by
from anybatch.core.fused_activation import read_activation
from anybatch.core.name_patterns import Where
from anybatch.core.norm_layer import NormLayer
from anybatch.core.tensor_subclasses import on_plain
from anybatch.core.text_tables import text_table
from anybatch.evaluation.batches import Forward, Shown, device_of, reading, run
from anybatch.evaluation.example_weighing import set_example_weight, weighable
from anybatch.evaluation.restore_model import borrowed
from anybatch.evaluation.valid_positions import valid_positions


@dataclass(frozen=True)
class EvalNorm:
    """The result of `eval_norm`; print it for a table.

    Attributes:
        alphas: Example weight by name of the layer.
        batch_size: Examples that shared statistics in training.
        batches: Batches of that size that were measured.
    """

    alphas: dict[str, float]
    batch_size: int
    batches: int

    def apply(self, model: nn.Module) -> nn.Module:
        """Give each layer its weight, in place: see `set_example_weight`.

        Args:
            model: The network.

        Returns:
            The model.
        """
        for name, alpha in self.alphas.items():
            model = set_example_weight(model, alpha, where=_named(name))
        return model

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"batch_size": self.batch_size, "batches": self.batches, "alphas": dict(self.alphas)}

    def __str__(self) -> str:
        rows = [(name or "(the model)", f"{alpha:.4f}") for name, alpha in self.alphas.items()]
        table = text_table(("layer", "example weight"), rows)
        found = f"{self.batches} batches of {self.batch_size}; 1 / {self.batch_size} is"
        return f"{table}\n{found} {1 / self.batch_size:.4f}"


def eval_norm(
    model: nn.Module,
    loader: Iterable[Any],
    batch_size: int,
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    where: Where | None = None,
    progress: Shown = None,
) -> EvalNorm:
    """Find each layer's example weight that best foretells the statistics of training batches.

    In training an example i was normalized by the mean m_B and the mean square
    deviation q_B of its batch, at inference it is by the running mean and variance.
    With m_i and ``q_i = mean((x_i - running_mean)**2)`` of the example alone,
    ``running + alpha * (own - running)`` foretells them. This finds, over all
    examples i and channels, the alpha that does so with the least squared error::

        sum_i  (m_B - M(alpha))**2 / (V + eps)  +  (q_B - Q(alpha))**2 / (V + eps)**2
        M(alpha) = running_mean + alpha * (m_i - running_mean)
        Q(alpha) = V + alpha * (q_i - V),    V = running_var

    which has a closed form. For independent examples it is 1 / batch_size; it is more
    where, behind other norms, the examples of a batch have become alike. The weights
    are used as those of `example_weighing` are, a layer each, without any labels.

    This is the idea of EvalNorm, not its algorithm: the paper also corrects the
    statistics of inference towards those of a training batch with the example in it,
    a few numbers a layer; its own estimate runs online, while the network is trained.
    What it does was taken from its abstract; its figures are not claimed here.

    Args:
        model: A network trained with batch norms, whose running statistics are good;
            else `recalibrate` it first. It is left as it was.
        loader: Gives training data, mixed as in training; targets are not used.
        batch_size: Examples that shared statistics in training (the ghost size where
            there was one). Batches are cut into so many; a rest is left out.
        forward: Called as ``forward(model, batch)`` (default: see `evaluation.batches.run`).
        max_batches: Use only so many of the loader's batches (default None: all).
        where: Which layers: a name pattern or a predicate ``(name, module)``.
        progress: Show a bar (default None: where standard error is a terminal), or a
            function that is called with the batches done and their number.

    Returns:
        The weights; ``.apply(model)`` sets them.

    Raises:
        ValueError: For a batch_size below 2, a loader whose batches are smaller, no
            batch norm that this applies to (centred, without channel groups, not
            frozen), or activations that are not finite.
        TypeError: For a batch_size that is no whole number.

    Source: Singh and Shrivastava, EvalNorm: Estimating Batch Normalization Statistics
    for Evaluation, 2019 (arXiv 1904.06031); four-things, section 3.1.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(3))
        >>> result = eval_norm(net, torch.randn(4000, 3).split(400), batch_size=4)
        >>> abs(result.alphas["0"] - 0.25) < 0.03
        True
    """
    check_count("batch_size", batch_size)
    if batch_size < 2:
        raise ValueError(
            "batch_size=1: alone in its batch, an example was normalized by nothing but itself; "
            "give the batch size of training, from 2 on, or use example_weighing(model, 1.0)"
        )
    with borrowed(model, training=False) as inner:
        layers = {
            name: module
            for name, module in weighable(inner, where).items()
            if not isinstance(module, nn.GroupNorm)
            if not isinstance(module, NormLayer) or _applies(module)
        }
        if not layers:
            uncentred = any(isinstance(m, NormLayer) and not m.centered for m in inner.modules())
            why = "; a layer that does not subtract the mean (mabn) has no such output" * uncentred
            raise ValueError(
                f"model: {type(model).__name__} has no batch norm to do this for{why}; "
                "anybatch.tune_example_weight takes every layer"
            )
        fits = {name: _Fit(module, batch_size) for name, module in layers.items()}
        for name, module in layers.items():
            module.__dict__["forward"] = fits[name].forward
        device = device_of(inner)
        reader = reading(loader, device=device, max_batches=max_batches, progress=progress)
        with torch.no_grad(), reader as batches:
            for batch in batches:
                run(inner, batch, forward)
        found = {name: fit.alpha(name) for name, fit in fits.items() if fit.batches}
        if not found:
            raise ValueError(
                f"batch_size={batch_size}: the loader's batches are smaller; let it give as many "
                "examples or a multiple"
            )
    return EvalNorm(found, batch_size, max(fit.batches for fit in fits.values()))


class _Fit:
    """Normalizes by successive batches, and compares them with the examples in them."""

    def __init__(self, norm: nn.Module, batch_size: int) -> None:
        self.norm, self.size = norm, batch_size
        self.shared: Tensor | float = 0.0
        self.total: Tensor | float = 0.0
        self.batches = 0

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """The layer as in training, with statistics of `batch_size` examples each."""
        valid = valid_positions(self.norm, (input, mask), {}, input)
        y = on_plain(partial(self._normalize, valid), input)
        if activation is None and residual is None:
            return y
        return read_activation(activation, residual, input).of(y)

    def _normalize(self, valid: Tensor | None, x: Tensor) -> Tensor:
        size = self.size
        whole = x.shape[0] // size
        if not whole:
            raise ValueError(
                f"batch_size={size}: the loader gave a batch of {x.shape[0]}; let it give as many "
                "examples or a multiple (drop_last=True leaves a smaller last one out)"
            )
        rest = x.shape[0] - whole * size
        sizes = (size,) * whole if rest == 0 else (*(size,) * (whole - 1), size + rest)
        used = slice(whole * size)
        self._compare(x[used].double(), None if valid is None else valid[used])
        weight, bias = self.norm._parameters.get("weight"), self.norm._parameters.get("bias")
        mean, var = self._moments(x, sizes, valid)[:2]
        like = [None if p is None else p.to(var.dtype) for p in (weight, bias)]
        eps = float(self.norm.eps)  # type: ignore[arg-type]
        return normalize_by(x, like[0], like[1], sizes, Statistics(mean, var), eps)

    def _moments(
        self, x: Tensor, sizes: tuple[int, ...], valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and number of the values of each group; running ones for no values."""
        if valid is None:
            return *backends.moments(x, sizes), backends.all_counts(x, sizes)
        mean, var, counts = backends.masked_moments(x, sizes, valid)
        middle, scale = (row.to(var.dtype) for row in self._running())
        some = counts > 0
        return torch.where(some, mean, middle), torch.where(some, var, scale), counts

    def _running(self) -> list[Tensor]:
        running = [self.norm._buffers[name] for name in ("running_mean", "running_var")]
        return [row for row in running if row is not None]

    def _compare(self, x: Tensor, valid: Tensor | None) -> None:
        middle, scale = (row.double() for row in self._running())
        eps = float(self.norm.eps)  # type: ignore[arg-type]
        scale = scale + eps
        own_mean, own_var, counts = self._moments(x, (1,) * x.shape[0], valid)
        own_mean, own_var = own_mean.view(x.shape[:2]), own_var.view(x.shape[:2])
        counts = counts.view(-1, self.size, 1) if counts.dim() else counts.view(1, 1, 1)
        share, some = counts / counts.sum(1, keepdim=True).clamp(min=1), counts > 0
        first = (own_mean - middle) / scale.sqrt()
        second = (own_var + (own_mean - middle).square() + eps) / scale - 1
        for own in (first, second):
            each = own.view(-1, self.size, own.shape[1]) * some
            batch = (each * share).sum(1)
            self.shared = self.shared + (batch * each.sum(1)).sum()
            self.total = self.total + each.square().sum()
        self.batches += x.shape[0] // self.size

    def alpha(self, name: str) -> float:
        """The weight with the least squared error."""
        alpha = float(self.shared / self.total) if float(self.total) else 1 / self.size
        if not 0 <= alpha <= 1 + 1e-9:
            raise ValueError(f"model: the input of {name or 'it'} is not finite on these data")
        return min(alpha, 1.0)


def _applies(layer: NormLayer) -> bool:
    """True if a layer normalized by mean and variance of the batch in training."""
    return layer.centered and layer.num_statistics == layer.num_features and not layer.frozen


def _named(wanted: str) -> Callable[[str, nn.Module], bool]:
    return lambda name, _: name == wanted
