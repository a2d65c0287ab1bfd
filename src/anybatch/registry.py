"""The one table of methods: conversion, command line, documentation and tests read it."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from anybatch import layers
from anybatch.core.arguments import closest, shown
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.group_norm import group_norm, instance_norm, layer_norm

IOFFE_2015 = "Ioffe and Szegedy, Batch Normalization, 2015"
IOFFE_2017 = "Ioffe, Batch Renormalization, 2017"
MOMENTUM = "Yong et al., Momentum Batch Normalization for Deep Learning with Small Batch Size, 2020"
MOVING_AVERAGE = (
    "Yan et al., Towards Stabilizing Batch Statistics in Backward Propagation of "
    "Batch Normalization, 2020"
)
CROSS_ITERATION = "Yao et al., Cross-Iteration Batch Normalization, 2021"
FOUR_THINGS = (
    "Summers and Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, 2020"
)
GROUP = "Wu and He, Group Normalization, 2018"
SAMPLING = "Chen et al., Batch Normalization Sampling, 2018"


@dataclass(frozen=True)
class Method:
    """A way to normalize.

    Attributes:
        name: Short name, as in ``convert(model, "mabn")``.
        title: Name in full.
        class_name: Class without its dimension ("GroupNorm" stands for torch's).
        paper: Source.
        summary: What it does, in a sentence.
        when: When to use it, in a sentence.
        exact_eval: A trained batch norm converted to it keeps its output at inference.
        folds: Inference is an affine map per channel, which a convolution can absorb.
        scheduled: It needs `anybatch.NormScheduler`.
        binds: It must be bound to the convolution or linear layer that feeds it.
        suggested: Options that `anybatch.convert` sets, where the layer's own defaults are the
            paper's and others have done better.
        at_start: Options that `anybatch.convert` sets besides, but not in layers that are there.
        when_trained: Options that `anybatch.convert` sets besides, on a trained network.
        when_cut: Options that `anybatch.convert` sets besides, where ``norm_batch_size`` cuts a
            batch into several with one memory.
        fixed: Arguments of the class that the name stands for; they are no options.
        wraps: The network must be wrapped in `anybatch.VirtualDataset` for training.
        builder: Function that makes the layer, for torch's own; None for a class of anybatch.
    """

    name: str
    title: str
    class_name: str
    paper: str
    summary: str
    when: str
    exact_eval: bool = True
    folds: bool = True
    scheduled: bool = False
    binds: bool = False
    suggested: Mapping[str, Any] = field(default_factory=dict, hash=False)
    at_start: Mapping[str, Any] = field(default_factory=dict, hash=False)
    when_trained: Mapping[str, Any] = field(default_factory=dict, hash=False)
    when_cut: Mapping[str, Any] = field(default_factory=dict, hash=False)
    fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)
    wraps: bool = False
    builder: Callable[..., nn.Module] | None = field(default=None, repr=False)

    def of_cuts(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """`when_cut`, where options cut a batch, else nothing.

        >>> get_method("mabn").of_cuts({"norm_batch_size": 2})["window"]
        64
        """
        cut = options.get("norm_batch_size") is not None and options.get("memories", 1) == 1
        return self.when_cut if cut else {}

    def layer(self, dims: int) -> type[nn.Module]:
        """The class for 1, 2 or 3 dimensions.

        Raises:
            ValueError: For another number of dimensions.
        """
        if dims not in (1, 2, 3):
            raise ValueError(f"dims={dims!r}: give 1, 2 or 3")
        if self.builder is not None:
            return nn.GroupNorm
        found: type[nn.Module] = getattr(layers, f"{self.class_name}{dims}d")
        return found

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The method's own arguments, by name."""
        maker = self.builder or self.layer(2)
        parameters = inspect.signature(maker).parameters.items()
        own = {n: p for n, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return {n: p for n, p in own.items() if n not in (*self.fixed, "bias")}

    @property
    def accepted(self) -> tuple[str, ...]:
        """Names of the options that `anybatch.convert` takes for the method."""
        keeps_statistics = issubclass(self.layer(2), NormLayer)
        return (*self.options, *(("momentum",) if keeps_statistics else ()))

    @property
    def uses_batch_size(self) -> bool:
        """True if the batch size that `anybatch.convert` is given makes a difference."""
        return "batch_size" in self.options

    def build(
        self,
        num_features: int,
        dims: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> nn.Module:
        """Make a layer.

        Args:
            num_features: Channels.
            dims: 1, 2 or 3.
            eps: Added to the variance.
            affine: Learn scale and shift.
            track_running_stats: Keep running statistics.
            device: Of parameters and state.
            dtype: Of parameters and state.
            **options: The method's own arguments, and ``momentum``.

        Returns:
            The layer.

        Raises:
            TypeError: For an option the method does not have.

        Example:
            >>> get_method("ghost").build(8, 2, ghost_size=4).ghost_size
            4
        """
        self.check_options(options)
        if self.builder is not None:
            return self.builder(num_features, eps, affine, device, dtype, **options)
        return self.layer(dims)(
            num_features,
            eps=eps,
            affine=affine,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
            **self.fixed,
            **options,
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError for an option that the method does not have."""
        check_options([self], options)


def check_options(methods: Iterable[Method], options: Mapping[str, Any]) -> None:
    """Raise for an option that none of some methods has.

    Args:
        methods: The methods.
        options: Their options.

    Raises:
        TypeError: It names the options that there are, and a close one.

    Example:
        >>> check_options([METHODS["mabn"]], {"window": 8})
    """
    methods = list(methods)
    known = dict.fromkeys(name for method in methods for name in method.accepted)
    for name, value in options.items():
        if name in known:
            continue
        titles = ", ".join(sorted({method.name for method in methods}))
        takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
        hint = closest(name, known)
        raise TypeError(f"{name}={shown(value)}: {titles} has no such option; {hint}{takes}")


# Running statistics with a small momentum lag for hundreds of steps, those of cbn for dozens.
_STARTS_FAST = {"momentum_warmup": 10}
_UNMIXED = {"num_virtual": None, "mix": 0.5}
_UNSAMPLED = {"ratio": 1 / 32, "size": None, "mix": 0.5, "ranks": None}

_TABLE = (
    Method(
        "bn",
        "Batch normalization",
        "BatchNorm",
        IOFFE_2015,
        "Statistics of the batch. Any batch size runs, and none leaves NaN in the state.",
        "Batches of 16 or more, or where `diagnose` finds no problem.",
    ),
    Method(
        "sync",
        "Synchronized batch normalization",
        "BatchNorm",
        IOFFE_2015,
        "Joint statistics of the batches of all processes, on CPU and GPU.",
        "Several devices with a few examples each and fast links.",
        suggested={"process_group": "world"},
    ),
    Method(
        "mbn",
        "Momentum batch normalization",
        "MomentumBatchNorm",
        MOMENTUM,
        "Moving averages of mean and variance, whose weight grows over the epochs.",
        "Segmentation at 2 to 4 images, with a scheduler stepped once an epoch.",
        scheduled=True,
        at_start=_STARTS_FAST,
    ),
    Method(
        "mabn",
        "Moving average batch normalization",
        "MovingAverageBatchNorm",
        MOVING_AVERAGE,
        "Averages over recent steps: of the second moment forward, of its gradient backward.",
        "Classification at batches of 1 to 4, from scratch or fine-tuned; detection from scratch.",
        at_start=_STARTS_FAST,
        when_cut={"window": 64, "momentum": 0.005},
    ),
    Method(
        "cbn",
        "Cross-iteration batch normalization",
        "CrossIterationBatchNorm",
        CROSS_ITERATION,
        "Statistics of recent steps, corrected to the current weights by a Taylor polynomial.",
        "Detection from scratch at 1 image; segmentation as the second choice.",
        scheduled=True,
        binds=True,
        suggested={"backward_stats": "window", "running_stats": "window"},
        at_start=_STARTS_FAST,
    ),
    Method(
        "brn",
        "Batch renormalization",
        "BatchRenorm",
        IOFFE_2017,
        "Batch statistics corrected towards the running ones, within limits.",
        "Reinforcement learning, and batches that are not identically distributed.",
        at_start=_STARTS_FAST,
        when_trained={"warmup_steps": 0},
    ),
    Method(
        "ghost",
        "Ghost batch normalization",
        "GhostBatchNorm",
        FOUR_THINGS,
        "Each group of examples in a batch has its own statistics.",
        "Large batches that generalize worse than small ones; tabular data.",
    ),
    Method(
        "bgn",
        "Batch-group normalization",
        "BatchGroupNorm",
        FOUR_THINGS,
        "Groups of channels and of examples share statistics.",
        "Batches of 2, if inference may cost more than with batch norm.",
        exact_eval=False,
        folds=False,
    ),
    Method(
        "ns",
        "Naive sampling",
        "SampledBatchNorm",
        SAMPLING,
        "Statistics of the first examples of a batch, the same ones in every layer.",
        "As the baseline of the other sampling methods.",
        fixed={"sample": "naive", **_UNMIXED, "seed": 0, "generator": None},
    ),
    Method(
        "bs",
        "Batch sampling",
        "SampledBatchNorm",
        SAMPLING,
        "Statistics of a few adjacent examples, different in each layer and epoch.",
        "Large batches whose training step should be faster. Never for small batches.",
        scheduled=True,
        fixed={"sample": "batch", **_UNMIXED},
    ),
    Method(
        "fs",
        "Feature sampling",
        "SampledBatchNorm",
        SAMPLING,
        "Statistics of one patch per example, at a different place in each layer and epoch.",
        "Large batches of images whose training step should be faster. The first to try.",
        scheduled=True,
        fixed={"sample": "feature", **_UNMIXED},
    ),
    Method(
        "points",
        "Random sampling of points",
        "SampledBatchNorm",
        SAMPLING,
        "Statistics of values at random positions, different in each layer and epoch.",
        "As the unbiased baseline of the structured samples.",
        scheduled=True,
        fixed={"sample": "points", **_UNMIXED},
    ),
    Method(
        "vdn",
        "Virtual dataset normalization",
        "SampledBatchNorm",
        SAMPLING,
        "Statistics of a few random examples with the dataset's mean and standard deviation.",
        "If statistics must not depend on the batch in training. In a VirtualDataset.",
        fixed={"sample": "virtual", **_UNSAMPLED, "seed": 0, "generator": None},
        wraps=True,
    ),
    Method(
        "fs+vdn",
        "Feature sampling with virtual examples",
        "SampledBatchNorm",
        SAMPLING,
        "Weighted mean of the statistics of feature sampling and of virtual examples.",
        "If feature sampling alone is too noisy. In a VirtualDataset.",
        scheduled=True,
        fixed={"sample": "feature+virtual"},
        wraps=True,
    ),
    Method(
        "bs+vdn",
        "Batch sampling with virtual examples",
        "SampledBatchNorm",
        SAMPLING,
        "Weighted mean of the statistics of batch sampling and of virtual examples.",
        "If batch sampling alone is too noisy. In a VirtualDataset.",
        scheduled=True,
        fixed={"sample": "batch+virtual"},
        wraps=True,
    ),
    Method(
        "l1",
        "L1 batch normalization",
        "L1BatchNorm",
        "Wu et al., L1-Norm Batch Normalization for Efficient Training of Deep Neural Networks, "
        "2018",
        "Mean absolute deviation instead of the standard deviation.",
        "Hardware without fast squares and roots, or as a baseline.",
    ),
    Method(
        "range",
        "Range batch normalization",
        "RangeBatchNorm",
        "Banner et al., Scalable Methods for 8-bit Training of Neural Networks, 2018",
        "Range of the values instead of the standard deviation.",
        "Training in low precision, or as a baseline.",
    ),
    Method(
        "gn",
        "Group normalization",
        "GroupNorm",
        GROUP,
        "Groups of channels of an example share statistics: torch's layer.",
        "Batches of 1, if inference may cost more than with batch norm.",
        exact_eval=False,
        folds=False,
        builder=group_norm,
    ),
    Method(
        "ln",
        "Layer normalization",
        "GroupNorm",
        "Ba et al., Layer Normalization, 2016",
        "All channels of an example share statistics: torch's group norm with one group.",
        "Sequence models, or as a baseline.",
        exact_eval=False,
        folds=False,
        builder=layer_norm,
    ),
    Method(
        "in",
        "Instance normalization",
        "GroupNorm",
        "Ulyanov et al., Instance Normalization, 2016",
        "Each channel of an example has its own statistics: torch's group norm with one group "
        "per channel.",
        "Style transfer, or as a baseline. Never on inputs without spatial extent.",
        exact_eval=False,
        folds=False,
        builder=instance_norm,
    ),
)

FROZEN = Method(
    "frozen",
    "Frozen batch normalization",
    "FrozenBatchNorm",
    IOFFE_2015,
    "Running statistics, scale and shift as constants, in training too.",
    "Fine-tuning on data like the pretraining data, and the last epochs of a training.",
)
"""A target of `anybatch.convert` besides the methods; it needs trained norms and trains nothing."""

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def get_method(name: str) -> Method:
    """Look a method up by its short name.

    Args:
        name: As in the table, "mabn" for example, in lower or upper case; or "frozen".

    Returns:
        The method.

    Raises:
        ValueError: For a name that is not in the table; it says which one is close. For a layer's
            class or its name, it says which method that is.

    Example:
        >>> get_method("mabn").title
        'Moving average batch normalization'
    """
    known = {**METHODS, FROZEN.name: FROZEN}
    if isinstance(name, str) and name.lower() in known:
        return known[name.lower()]
    given = name.__name__ if isinstance(name, type) else str(name)
    plain = re.sub(r"[^a-z0-9+]", "", re.sub(r"[123]d$", "", given).lower())
    meant = _SHORT_NAMES.get(plain)
    hint = f"did you mean {meant!r}? " if meant else closest(given.lower(), known, 0.5)
    raise ValueError(f"method={shown(name)}: {hint}give one of {', '.join(known)}")


def _spelled_out() -> dict[str, str]:
    """Class names and titles, in small letters without spaces, with the short names."""
    names: dict[str, str] = {}
    for method in METHODS.values():
        for long in (method.class_name, method.title):
            names.setdefault(re.sub(r"[^a-z0-9+]", "", long.lower()), method.name)
    torch_names = {"layernorm": "ln", "instancenorm": "in", "syncbatchnorm": "sync"}
    return {**names, **torch_names, "sampledbatchnorm": "bs"}


_SHORT_NAMES = _spelled_out()
