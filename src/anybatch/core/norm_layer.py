"""The base class of all normalization layers: arguments, forward, repr.

A method adds a file with its rule. What the layers share is in the bases, one concern each:
`NormState` (parameters, state, checkpoints), `ScopedLayer` (masks and processes), `RuleLayer` (the
rule on a batch's statistics, and fallbacks), `InferenceLayer`, `DispatchedLayer` (backends) and
`MemoriesLayer` (several memories).
"""

from functools import partial
from typing import Any, NoReturn, TypedDict

import torch
from torch import Tensor

from anybatch.backends import LOW_PRECISION
from anybatch.backends.protocol import Statistics
from anybatch.core.activation_checkpointing import RecomputeCache, computed_again, is_selective
from anybatch.core.arguments import check_between, check_count
from anybatch.core.described import Described
from anybatch.core.fused_activation import read_activation
from anybatch.core.graphs import as_leaf, refuse_script
from anybatch.core.memories import MemoriesLayer
from anybatch.core.reduction_scope import WORLD
from anybatch.core.tensor_subclasses import is_distributed, is_overridden, on_local, on_plain


class NormOptions(TypedDict, total=False):
    """Keyword arguments that every layer takes and gives on, see `NormLayer`."""

    bias: bool
    norm_batch_size: int | None
    memories: int
    example_weight: float
    process_group: Any
    outlier_limit: float | None


class NormLayer(Described, MemoriesLayer):
    """Base of all layers.

    It derives from torch's ``_NormBase`` and not from ``_BatchNorm``, so that
    names and shapes of a batch norm's state, strict loading and folding are
    torch's, while ``SyncBatchNorm.convert_sync_batchnorm`` leaves it alone.

    Statistics, memory and, through ``.half()`` and ``.bfloat16()``, parameters
    stay float32 (float64 for float64). Memory beyond torch's buffers lives in
    `method_state`, tensors that follow the layer's device and are in its
    ``state_dict``, but are no buffers: DistributedDataParallel overwrites
    buffers with those of rank 0.

    Args:
        num_features: Channels C of the input.
        eps: Added to the variance (default 1e-5).
        momentum: Weight of the new value in the running statistics (default
            0.1); None for the average over all batches.
        affine: Learn a scale and a shift a channel (default True).
        bias: Learn the shift, where affine is true (default True).
        track_running_stats: Keep running statistics for inference (default True).
        device: Of parameters and state.
        dtype: Of parameters and state; float16 and bfloat16 give float32.
        norm_batch_size: Normalize as if the batch had come in successive batches
            of so many examples, memory running along them (default None: as one).
        memories: Memories that these batches take in turn (default 1). With as many as a forward
            has batches, each moves once a step, as those of several devices do; running statistics
            are those of the first.
        example_weight: Share of an example's own statistics in its normalization
            at inference, alpha of four-things, equation 3 (default 0.0).
        process_group: Processes of ``torch.distributed`` whose batches are one in training:
            a process group, or "world" for all (default None: this process alone).
        outlier_limit: A batch in which a channel's variance about its running mean is more than so
            many times the running variance is normalized by its own statistics in that channel, and
            enters no memory there; after ten such batches in a row it does (default None: any).
        momentum_warmup: With k, the n-th batch weighs ``k / (n - 1 + k)`` in running statistics
            until `momentum` is more: these forget their initial values, and then what is older than
            the last ``1 / k`` of the batches (default 0: `momentum` from the first batch on).

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d.

    Raises:
        ValueError: For an argument out of range or an input of another shape.
        TypeError: For an input that is not floating point.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        norm_batch_size: int | None = None,
        memories: int = 1,
        example_weight: float = 0.0,
        process_group: Any = None,
        outlier_limit: float | None = None,
        momentum_warmup: int = 0,
    ) -> None:
        check_count("num_features", num_features)
        check_count("momentum_warmup", momentum_warmup, 0)
        check_between("example_weight", example_weight, 0.0, 1.0)
        if process_group is not None and norm_batch_size is not None:
            raise ValueError(
                f"norm_batch_size={norm_batch_size}: it cuts a batch where process_group joins "
                "batches; leave one of them out"
            )
        if outlier_limit is not None:
            if not (isinstance(outlier_limit, (int, float)) and outlier_limit > 1):
                raise ValueError(f"outlier_limit={outlier_limit!r}: give a number above 1 or None")
            if not track_running_stats:
                raise ValueError(
                    f"outlier_limit={outlier_limit!r}: batches are compared with running "
                    "statistics; leave track_running_stats True"
                )
        if momentum is not None:
            check_between("momentum", momentum, 0.0, 1.0)
        if not (isinstance(eps, (int, float)) and eps > 0):
            raise ValueError(f"eps={eps!r}: give a number above 0, such as 1e-5")
        if self.needs_running_stats and not track_running_stats:
            raise ValueError(
                f"track_running_stats=False: {type(self).__name__} normalizes by remembered "
                "statistics in training; leave it True"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        dtype = torch.float32 if dtype in LOW_PRECISION else dtype
        self.method_state: dict[str, Tensor] = {}
        self.frozen = self.affine_frozen = False
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.norm_batch_size, self.memories = norm_batch_size, memories
        self.example_weight = float(example_weight)
        self.process_group = process_group
        self.mask: Tensor | None = None
        self.momentum_warmup = momentum_warmup
        self._compared = False
        self.outlier_limit = outlier_limit
        if outlier_limit is not None:
            self.method_state["outliers"] = self.new_state(num_features).long()
        self._last: Statistics | None = None
        self._recent = RecomputeCache()

    def set_progress(self, epoch: int, total_epochs: int) -> None:
        """Tell the layer where training is; epochs count from 1."""

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Normalize; with an `activation`, write ``relu(norm(x) + residual)`` in the same pass.

        Args:
            input: ``(N, C, ...)``.
            mask: Where input is valid, true or not 0: ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``.
                Statistics are those of the valid positions; the output is normalized everywhere.
                None for all; `anybatch.masked` gives it to the layers of a network.
            residual: A tensor of the input's shape and type, added to the normalized input before
                the activation (default None: nothing).
            activation: "relu", or None (default). What is kept for backward is the input and the
                output, as of a norm and a ReLU apart.

        Returns:
            A tensor of the input's shape, type and format; for a subclass of ``Tensor`` the class
            and metadata that it gives to results of torch's functions.
        """
        if type(input) is not Tensor or residual is not None:
            if not isinstance(input, Tensor):
                return as_leaf(self, input, mask=mask, residual=residual, activation=activation)
            plain = partial(self._forward_plain, mask, activation)
            if is_overridden(input, residual):
                return on_plain(plain, input, residual)
            if is_distributed(input):
                return on_local(self, plain, input, residual)
        then = None
        if activation is not None or residual is not None:
            then = read_activation(activation, residual, input)
        mask = self.mask if mask is None else mask
        known = self._run_cached_plan(input, then, mask)
        if known is not None:
            return known
        if is_selective():
            with computed_again():
                return self._forward_plain(mask, activation, input, residual)
        shape = input.shape
        # A trace has tensors for sizes, and warns of each decision by them.
        traced = torch._C._get_tracing_state() is not None
        if len(shape) not in self._ranks or not (traced or shape[1] == self.num_features):
            self._refuse(input)
        if not input.is_floating_point():
            self._refuse(input)
        training = self.training and not self.frozen
        if not training and self.running_mean is not None and self.running_var is not None:
            y = self._infer(input, mask)
            return y if then is None else then.of(y)
        source = None
        if mask is not None or self._group is not None:
            source = self._source(input, mask, training)
        if input.numel() or (source is not None and source.group is not None):
            if not training or self.memories == 1:
                return self._normalize_batch(input, training, source, then)
            return self._normalize_in_turn(input, source, then)
        y = self._empty(input, training)
        return y if then is None else then.of(y)

    def _forward_plain(
        self, mask: Tensor | None, activation: str | None, input: Tensor, residual: Tensor | None
    ) -> Tensor:
        return NormLayer.forward(self, input, mask, residual=residual, activation=activation)

    def _refuse(self, x: Tensor) -> NoReturn:
        """Say what is wrong with an input."""
        given = f"input of shape {tuple(x.shape)}: {type(self).__name__}"
        if x.dim() not in self._ranks:
            wanted = {1: "(N, C) or (N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}
            takes = wanted.get(self.dims, "(N, C, ...)")
            raise ValueError(f"{given} takes {takes}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{given} has num_features={self.num_features}, "
                f"the input {x.shape[1]} channels (dimension 1)"
            )
        raise TypeError(
            f"input of type {x.dtype}: {type(self).__name__} needs floating point; "
            "give input.float()"
        )

    @property
    def _ranks(self) -> tuple[int, ...]:
        return (2, 3) if self.dims == 1 else (self.dims + 2,)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def extra_repr(self) -> str:
        """The arguments, those of the method where they differ from the default, and frozen."""
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.norm_batch_size is not None:
            parts.append(f"norm_batch_size={self.norm_batch_size}")
        if self.memories > 1:
            parts.append(f"memories={self.memories}")
        if self.example_weight:
            parts.append(f"example_weight={self.example_weight}")
        parts += [f"{name}={value}" for name, value in self.own_arguments().items()]
        rare = {name: getattr(self, name) for name in ("outlier_limit", "momentum_warmup")}
        parts += [f"{name}={value}" for name, value in rare.items() if value]
        if self.process_group is not None:
            named = self.process_group == WORLD
            parts.append(f"process_group={'world' if named else 'of its own'}")
        if self.frozen or self.affine_frozen:
            frozen = (("statistics", self.frozen), ("affine", self.affine_frozen))
            parts.append("frozen=" + "+".join(name for name, flag in frozen if flag))
        return ", ".join(parts)
