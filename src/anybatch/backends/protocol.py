"""The interface between layers and backends: what a method describes, what a backend does."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from anybatch.backends.rule import RuleSet

# How a batch is cut: examples of each group, groups and examples of each normalization batch.
Cut = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

BACKWARD = "backward_"  # state that moves in the backward pass has a name that begins so

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of input, weight and bias


@lru_cache(maxsize=256)
def iter_norm_batches(cut: Cut) -> tuple[tuple[int, int, int, tuple[int, ...]], ...]:
    """First example, first group, examples and sizes of the groups of each normalization batch."""
    sizes, numbers, batches = cut
    found, first, group = [], 0, 0
    for examples, number in zip(batches, numbers, strict=True):
        found.append((first, group, examples, sizes[group : group + number]))
        first, group = first + examples, group + number
    return tuple(found)


class Statistics(NamedTuple):
    """What a rule decided: how each group of examples is normalized.

    Tables are ``(G, K)``: one row per group of examples, one column per channel
    group (mostly a channel); ``(K,)`` where there is one group.

    Attributes:
        mean: Mean to subtract; None for none (the uncentred form).
        var: Variance, or second moment in the uncentred form.
        r: Factor on the normalized value; None for 1. No gradient passes it.
        d: Constant added to it; None for 0. No gradient passes it.
        center: Centre of the variance whose gradient flows; None is `mean`.
        batch_weight: Weight of the batch's own statistics in `mean` and `var`.
        use_batch_stats: Whether the backward statistics are the batch's own, a number or
            ``(G, 1)``; None where the method does not ask.
        counts: Values per channel behind them, a number or ``(G, 1)``; None where these are all of
            the batch's.
    """

    mean: Tensor | None
    var: Tensor
    r: Tensor | None = None
    d: Tensor | None = None
    center: Tensor | None = None
    batch_weight: float | Tensor = 1.0
    use_batch_stats: Tensor | None = None
    counts: Tensor | None = None

    # Compilers of torch 2.6 cannot look into `_replace`.

    def of(self, counts: Tensor | None) -> "Statistics":
        """The same, of so many values."""
        mean, var, r, d, center, batch_weight, use_batch_stats, _ = self
        return Statistics(mean, var, r, d, center, batch_weight, use_batch_stats, counts)

    def where(
        self, fits: Tensor, mean: Tensor | None, var: Tensor, batch_weight: float
    ) -> "Statistics":
        """These where `fits`, elsewhere a plain mean and variance with another `batch_weight`."""
        own_mean, own_var, r, d, center, own_weight, use_batch_stats, counts = self
        if isinstance(own_weight, Tensor) or own_weight != batch_weight:
            own_weight = torch.where(fits, own_weight, batch_weight)
        return Statistics(
            None if own_mean is None or mean is None else torch.where(fits, own_mean, mean),
            torch.where(fits, own_var, var),
            None if r is None else torch.where(fits, r, 1.0),
            None if d is None else torch.where(fits, d, 0.0),
            None if center is None or mean is None else torch.where(fits, center, mean),
            own_weight,
            use_batch_stats,
            counts,
        )

    def weighted(self, batch_weight: float) -> "Statistics":
        """The same with another weight of the batch's own."""
        mean, var, r, d, center, _, use_batch_stats, counts = self
        return Statistics(mean, var, r, d, center, batch_weight, use_batch_stats, counts)


class BackwardMemory(Protocol):
    """Replaces the two batch statistics of the backward pass by remembered ones."""

    def __call__(self, g: Tensor | None, psi: Tensor) -> tuple[Tensor | None, Tensor]:
        """Take mean(g) (None in the uncentred form) and mean(g z), give those to use."""


class Scope(Protocol):
    """Which elements contribute to statistics: valid positions, several processes' batches."""

    @property
    def mask(self) -> Tensor | None:
        """Valid positions ``(N, 1, ...)``; None for all."""

    @property
    def group(self) -> Any:
        """Processes whose batches are one; None for this one alone."""

    def gradient(self, full: Tensor, plain: Tensor) -> Tensor:
        """The gradient through the statistics at valid positions, elsewhere the plain one."""

    def sum(self, *tables: Tensor | None) -> list[Tensor | None]:
        """Sums over all processes."""


class Contribution(NamedTuple):
    """The values that contribute to the statistics of a batch, where they are not all of its own.

    Attributes:
        counts: Values per channel of each group, more than one.
        scope: Valid positions; None for all.
        layer: The layer.
        step: Its `StepMemory`, of an optimizer step of several forwards; None where one makes it.
    """

    counts: tuple[int, ...]
    scope: Any
    layer: Any
    step: Any


class Formula(Protocol):
    """A gradient of a method's own, by torch's operators.

    Attributes:
        moments: Gives the batch's own mean and variance by operators that autograd records, as
            ``moments(x, call)``; None where they are not a function of the batch.
    """

    @property
    def moments(self) -> Any:
        """See above."""

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, call: Any, needs: Sequence[bool]
    ) -> Gradients:
        """Gradients of input, weight and bias, None where not needed."""


class RuleState(NamedTuple):
    """State and options of a layer that a rule reads, as `anybatch.backends.rule.Part` has them.

    Attributes:
        rows: Rows ``(C,)``.
        windows: Windows ``(length, C)``.
        counters: Numbers of steps.
        numbers: Numbers on the layer's device.
        options: Attributes of the layer.
    """

    rows: tuple[Tensor, ...] = ()
    windows: tuple[Tensor, ...] = ()
    counters: tuple[Tensor, ...] = ()
    numbers: tuple[Tensor, ...] = ()
    options: tuple[float, ...] = ()


class MethodSpec(NamedTuple):
    """A method of one layer, as kernels take it.

    Statistics that a forward used are rows of one table: mean, variance, and what the rule gives.

    Attributes:
        method: Its rules.
        kept: The layer's state and options for the forward rule.
        averages: Those for the backward rule.
        centered: Whether there is a mean.
        limit: Times its running variance that a channel may have; see `anybatch.core.outliers`.
        outliers: Batches in a row in which a channel had more; None without a limit.
    """

    method: RuleSet = RuleSet()
    kept: RuleState = RuleState()
    averages: RuleState = RuleState()
    centered: bool = True
    limit: float = math.inf
    outliers: Tensor | None = None

    @property
    def family(self) -> str:
        """The kernels that it is for."""
        return "rule"

    @property
    def rows(self) -> int:
        """Rows of the table of statistics."""
        return 2 + len(self.method.forward.uses)

    def tensors(self) -> tuple[Tensor, ...]:
        """The layer's state."""
        kept, averages = self.kept, self.averages
        state = (*kept.rows, *kept.windows, *kept.counters, *kept.numbers)
        return (*state, *averages.rows, *averages.windows, *averages.counters)

    def statistics(self, table: Tensor) -> Statistics:
        """The statistics of a table ``(rows, G, K)`` or ``(rows, K)``."""
        rest = dict(zip(self.method.forward.uses, table[2:], strict=True))
        use = rest["use_batch_stats"][..., :1] > 0 if "use_batch_stats" in rest else None
        given = rest.get("r"), rest.get("d"), rest.get("center"), rest.get("batch_weight", 1.0), use
        return Statistics(table[0] if self.centered else None, table[1], *given)


class SpreadSpec(NamedTuple):
    """A norm by another spread than the standard deviation.

    Attributes:
        name: "l1" or "range".
    """

    name: str

    @property
    def family(self) -> str:
        """The kernels that it is for."""
        return "spread"


class SamplePart(Protocol):
    """A part of the data behind a normalization batch's statistics.

    Attributes:
        sample: Where it is.
        share: Its weight in mean and variance.
        values: Number of values per channel.
    """

    sample: Any
    share: float
    values: int


class SampleSpec(NamedTuple):
    """A norm by the statistics of a sample.

    Attributes:
        parts: The parts of the sample.
        tables: Takes what kernels prepare of them.
    """

    parts: tuple[Any, ...]
    tables: dict[Any, Any]

    @property
    def family(self) -> str:
        """The kernels that it is for."""
        return "sample"


class CrossIterationSpec(NamedTuple):
    """Cross-iteration batch normalization.

    Attributes:
        windowed: Whether it takes the window; else it is batch normalization.
        memory: The state.
        rings: Names of the rings in it, one slot a step.
        views: Keeps arrays of the same storage.
        gradient_sample: Positions that gradients of statistics are estimated from; None for all.
        tracks_window: Whether running statistics follow the window.
        backward_window: Recent ``mean(g * z)``; None for the batch's own.
        burn_in_steps: Steps before the window is used.
    """

    windowed: bool
    memory: dict[str, Tensor]
    rings: tuple[str, ...]
    views: Any
    gradient_sample: int | None
    tracks_window: bool
    backward_window: Tensor | None
    burn_in_steps: int

    @property
    def family(self) -> str:
        """The kernels that it is for."""
        return "window"


class Spec(Protocol):
    """What kernels need of a method: a `MethodSpec`, or that of kernels of its own."""

    @property
    def family(self) -> str:
        """The kernels that it is for."""


def start_of(update_weight: float) -> tuple[int, float]:
    """Read a weight of the newest batch: the ``k`` of its start, 0 for none, and the least weight.

    >>> start_of(-10.25), start_of(-1.0), start_of(0.1)
    ((10, 0.25), (1, 0.0), (0, 0.1))
    """
    if update_weight >= 0:
        return 0, update_weight
    start = int(-update_weight)
    return start, -update_weight - start


class NormCall(NamedTuple):
    """How a layer goes through a batch, forward and backward.

    Attributes:
        cut: How the batch is cut.
        num_statistics: Statistics of a group of examples: channels, or groups of channels.
        eps: Added to the variance.
        update: Whether state may change.
        spec: The method as kernels take it; None where torch's operators run its rule.
        last: Whether channels are last in memory.
        update_weight: Of the newest batch in running statistics. ``-(k + w)`` with a whole ``k``
            is ``k / (n - 1 + k)`` for the n-th batch, and at least ``w``; -1 is the mean of all.
        work: What a backend prepared for batches of this shape.
        formula: The method's own gradient; None for that of `anybatch.backends.aten.normalize`.
        statistics: What the rule decided, where torch's operators ran it.
        memory: Averages for its backward pass.
        scope: Which elements contribute; None for all of the batch.
        beyond: What a backend has to take beside the batch's values, such as a mask, or "".
    """

    cut: Cut
    num_statistics: int
    eps: float
    update: bool
    spec: Any = None
    last: bool = False
    update_weight: float = 0.0
    work: Any = None
    formula: Formula | None = None
    statistics: Statistics | None = None
    memory: BackwardMemory | None = None
    scope: Any = None
    beyond: str = ""


Rows = tuple[Tensor | None, ...]  # weight, bias, running mean and running variance of a layer


class KernelFailure(RuntimeError):
    """Kernels that could not be compiled or launched; state is as it was before."""


class Kernels(NamedTuple):
    """Compiled kernels that must agree with torch's operators on a device before they serve there.

    Attributes:
        name: Of those that serve a batch.
        identity: Device, driver, versions and sources that they are made from; None where no
            agreement is kept on disk.
    """

    name: str
    identity: str | None


class Backend(Protocol):
    """What normalizes batches.

    Attributes:
        name: For `anybatch.explain`.
        takes_relu: Families of kernels that apply a ReLU, and add a residual before it.
        takes_scopes: Families of kernels that take what is `beyond` a batch's values.
    """

    name: str
    takes_relu: frozenset[str]
    takes_scopes: frozenset[str]

    def supports(self, call: NormCall, x: Tensor, rows: Rows) -> str | None:
        """Why it cannot serve a batch; None if it can.

        Args:
            call: How the layer would go through it.
            x: The batch.
            rows: Weight, bias, running mean and running variance of the layer.
        """

    def memory_obstacle(self, x: Tensor, rows: Rows) -> str | None:
        """The part of `supports` that neither shape, layout nor the layer's settings decide.

        No `rows` stand for those that it had no objection to.
        """

    def kernels(self, call: NormCall, x: Tensor) -> Kernels | None:
        """The kernels that would serve a batch; None for those that serve untried."""

    def prepare(self, call: NormCall, x: Tensor) -> NormCall:
        """The call for batches of this shape and layout, with what `forward` needs for them."""

    def forward(
        self,
        call: NormCall,
        x: Tensor,
        weight: Any,
        bias: Any,
        residual: Tensor | None,
        state: tuple[Any, ...],
        relu: bool,
    ) -> tuple[Tensor, tuple[Tensor | None, ...], Any]:
        """Normalize a batch, and move the state.

        Args:
            call: How.
            x: The batch.
            weight: Scale.
            bias: Shift.
            residual: What is added before the ReLU.
            state: Running mean, running variance, batches, what a family adds; a `Contribution`.
            relu: Whether a ReLU follows.

        Returns:
            The output, tensors to save for backward beside input and scale, and what else
            `backward` needs.
        """

    def backward(
        self,
        call: NormCall,
        context: Any,
        dy: Tensor,
        x: Tensor,
        weight: Any,
        saved: Sequence[Any],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, scale, shift and residual.

        Args:
            call: As in `forward`.
            context: What `forward` returned.
            dy: Gradient of the output, of the type of ``x``.
            x: The batch.
            weight: Scale.
            saved: The tensors that `forward` asked to save.
            needs: Which of input, scale, shift and residual need a gradient.
        """

    def statistics(self, call: NormCall, context: Any, like: Tensor) -> list[Statistics]:
        """The statistics of a forward as tensors, those of normalization batches in turn."""
