# mypy: disable-error-code="no-untyped-def"
"""Momentum batch normalization (Yong et al. 2020, momentum-bn)."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Unpack

from anybatch.core.arguments import check_between, check_count
from anybatch.core.norm_layer import NormLayer, NormOptions
from anybatch.core.notices import Notice
from anybatch.core.rule import Counter, Number, Row, State, chosen, lerp, rule, where


class MomentumBatchNorm(NormLayer):
    """Momentum batch normalization: moving averages with a scheduled weight.

    ::

        mu    = lambda * mu_before    + (1 - lambda) * batch mean         (eq. 8)
        var   = lambda * var_before   + (1 - lambda) * batch variance
        y     = weight * (x - mu) / sqrt(var + eps) + bias

    The old averages are constants in the backward pass (equation 13). Lambda
    grows from 0 in the first epoch to ``1 - batch_size / ideal_batch_size`` in the
    last (equation 11), so that at the end the noise of a small batch's statistics
    is that of a batch of ``ideal_batch_size``. `anybatch.NormScheduler` moves it;
    without a scheduler lambda stays 0, which is batch normalization, and the first
    training batch warns.

    Args:
        momentum: Weight of the newest batch in the running statistics used at
            inference. "auto" (default) is ``1 - ideal_decay ** (batch_size /
            ideal_batch_size)`` (equation 12); None averages over all batches.
        track_running_stats: Must be True.
        batch_size: Examples in a normalization batch, of a forward where several make an
            optimizer step, as `anybatch.accumulate` tells (default None: read from the
            first batch and kept).
        ideal_batch_size: Examples in a batch whose noise is wanted (default 32).
        ideal_decay: Decay of the running statistics at that batch size (default 0.85).

    Source: momentum-bn, algorithm 1 and equations 8 to 13.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.MomentumBatchNorm1d(4, batch_size=2)
        >>> norm.set_progress(epoch=10, total_epochs=10)
        >>> round(norm.average_weight, 4)  # 1 - 2 / 32
        0.9375
    """

    needs_running_stats = True
    state = State(
        mean=Row(("applied_mean",)),
        var=Row(("applied_var",)),
        count=Counter(complete=True),  # every channel has something to start from
        batch_size=Number(whole=True),
        average_weight=Number(),
    )
    set_state: ClassVar[tuple[str, ...]] = ("batch_size", "average_weight")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | str | None = "auto",
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        batch_size: int | None = None,
        ideal_batch_size: int = 32,
        ideal_decay: float = 0.85,
        **common: Unpack[NormOptions],
    ) -> None:
        if batch_size is not None:
            check_count("batch_size", batch_size)
        check_count("ideal_batch_size", ideal_batch_size)
        check_between("ideal_decay", ideal_decay, 0.0, 1.0)
        if isinstance(momentum, str) and momentum != "auto":
            raise ValueError(f"momentum={momentum!r}: give a number from 0 to 1, None or 'auto'")
        self.auto_momentum = momentum == "auto"
        weight = 1 - ideal_decay if isinstance(momentum, str) else momentum
        shared = (num_features, eps, weight, affine, track_running_stats, device, dtype)
        super().__init__(*shared, **common)
        self.ideal_batch_size, self.ideal_decay = ideal_batch_size, ideal_decay
        self.progress: tuple[int, int] | None = None  # until a scheduler has set it
        self.unscheduled = Notice()
        self.given_batch_size, self.batch_size = batch_size, batch_size
        self.declare_state()

    @property
    def average_weight(self) -> float:
        """Lambda of equation 11, the weight of the old averages; reading it synchronizes."""
        return float(self.method_state["average_weight"])

    def reset_memory(self) -> None:
        super().reset_memory()
        if self.method_state:
            self._set_batch_size(self.given_batch_size)

    def set_progress(self, epoch: int, total_epochs: int) -> None:
        """Set lambda for an epoch (equation 11).

        Args:
            epoch: From 1 on.
            total_epochs: T.
        """
        check_count("epoch", epoch)
        check_count("total_epochs", total_epochs)
        self.progress = (epoch, total_epochs)
        self.method_state["average_weight"].fill_(self._scheduled_weight())

    @property
    def step_size(self) -> int | None:
        """Examples whose statistics are averaged at a time: those of an optimizer step."""
        if self.batch_size is None or self.step is None or self.step.steps is None:
            return self.batch_size
        return self.batch_size * self.step.steps

    def accumulate(self, steps: int | None, counts: bool = True) -> None:
        super().accumulate(steps, counts)
        self._set_batch_size(self.batch_size)

    def _scheduled_weight(self) -> float:
        epoch, total = self.progress or (1, 1)
        if self.step_size is None or total == 1:
            return 0.0
        ratio = min(self.step_size / self.ideal_batch_size, 1.0)  # rho ** T
        return float(ratio ** (max(total - epoch, 0) / (total - 1)) - ratio)

    def _set_batch_size(self, batch_size: int | None) -> None:
        self.batch_size = batch_size
        self.method_state["batch_size"].fill_(batch_size or 0)
        if self.auto_momentum and self.step_size is not None:  # eq. 12
            self.momentum = 1 - self.ideal_decay ** (self.step_size / self.ideal_batch_size)
        if self.progress is not None and self.progress[0] > 1:
            self.method_state["average_weight"].fill_(self._scheduled_weight())

    def _begin(self, examples: int) -> None:
        """Read the batch size from the first training batch; warn if there is no scheduler."""
        if self.batch_size is None:
            self._set_batch_size(self.examples_of_all(examples))
        if self.progress is None and not torch.compiler.is_compiling():
            self.unscheduled.warn(
                f"{type(self).__name__} trains without a schedule: the weight of its averages "
                "stays as it is, and at 0, where it starts, this is plain batch normalization. "
                "Before training make scheduler = anybatch.NormScheduler(model, total_epochs), "
                "and call scheduler.step() after each epoch."
            )

    @rule
    def choose(mean, var, old_mean, old_var, count, average_weight):  # eq. 8
        keep = where(count > 1, average_weight, 0.0)
        return chosen(lerp(mean, old_mean, keep), lerp(var, old_var, keep), batch_weight=1 - keep)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.method_state["batch_size"].is_meta:
            return
        weight = self.method_state["average_weight"].clone()
        self._set_batch_size(int(self.method_state["batch_size"]) or self.given_batch_size)
        self.method_state["average_weight"].copy_(weight)

    @property
    def steady(self) -> bool:  # type: ignore[override]
        """The first batch's size may set the momentum, or it may warn."""
        settled = self.progress is not None or self.unscheduled.given
        return self.batch_size is not None and settled

    def meet(self, examples: int) -> None:
        if torch.compiler.is_compiling():  # a compiler would compile anew for each epoch
            begins = self.batch_size is None
        else:
            begins = self.batch_size is None or self.progress is None
        if begins:
            self._begin(examples)

    def own_arguments(self) -> Mapping[str, Any]:
        names = ("batch_size", "ideal_batch_size", "ideal_decay")
        return {name: getattr(self, name) for name in names}


class MomentumBatchNorm1d(MomentumBatchNorm, dims=1): ...


class MomentumBatchNorm2d(MomentumBatchNorm, dims=2): ...


class MomentumBatchNorm3d(MomentumBatchNorm, dims=3): ...


def share_notice(layers: Iterable[nn.Module]) -> None:
    """Let the momentum batch norms of one network warn once for all of them."""
    notice = Notice()
    for layer in layers:
        if isinstance(layer, MomentumBatchNorm):
            layer.unscheduled = notice
