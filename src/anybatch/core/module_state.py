"""State of a layer: torch's own, the memory that a method adds, and what keeps both safe."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from anybatch import backends
from anybatch.backends.protocol import start_of
from anybatch.core.activation_checkpointing import RecomputeCache
from anybatch.core.gradient_accumulation import StepMemory, in_loss_units
from anybatch.core.tensor_subclasses import as_plain

STEP = "step."  # before the names of memory within an optimizer step
_OUTLIERS = "outliers"  # batches in a row that were out of proportion, a channel
_HOOKS = ("hooks", "hooks_with_kwargs", "hooks_always_called")


class NormState(_NormBase):
    """Parameters, running statistics and memory of a layer.

    Attributes:
        method_state: Tensors beyond torch's buffers, by name. They follow the layer's
            device and are in its ``state_dict``, but are no buffers:
            DistributedDataParallel overwrites buffers with those of rank 0.
        per_step_state: Names of memory that has a slot per step, of which only the newest is
            written.
        set_state: Names of memory that no forward moves: it is set once a training or an epoch.
        step: Memory within an optimizer step of several forwards; None where one makes it.
        frozen: Whether running statistics and memory are frozen.
        affine_frozen: Whether weight and bias are frozen.
        momentum_warmup: The ``k`` of running statistics' start, see `NormCall.update_weight`.
        loss_scale: The scale of the loss in what it has averaged of gradients; in checkpoints it
            is 1.
        tags: Names of attributes that others hung on the norm that it was converted from.
    """

    method_state: dict[str, Tensor]
    per_step_state: ClassVar[tuple[str, ...]] = ()
    set_state: ClassVar[tuple[str, ...]] = ()
    pools: ClassVar[bool] = True  # statistics of micro-batches make those of all
    step: StepMemory | None = None
    frozen: bool
    affine_frozen: bool
    momentum_warmup: int = 0
    loss_scale: float = 1.0
    tags: tuple[str, ...] = ()
    _last: Any
    _recent: RecomputeCache
    _plans: dict[Any, Any] | None = None  # see `anybatch.core.dispatch.ExecutionPlan`

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "mask" and not torch.compiler.is_compiling():
            self.__dict__.pop("_plans", None)
        super().__setattr__(name, value)

    @property
    def num_statistics(self) -> int:
        """Statistics a group of examples has: channels, or groups of channels."""
        return self.num_features

    def forget_plans(self) -> None:
        """Drop what is remembered of how batches are served."""
        self._plans = None

    def remembered(self) -> tuple[Tensor, Tensor]:
        """Mean and variance to fall back on where a batch has none, rows ``(C,)``."""
        if self.running_mean is None or self.running_var is None:
            zeros = torch.zeros(self.num_features, device=self._device())
            return zeros, torch.ones_like(zeros)
        return self.running_mean, self.running_var

    def reset_memory(self) -> None:
        """Forget everything that is not torch's own state."""
        for tensor in self.method_state.values():
            tensor.zero_()

    # --- running statistics ---------------------------------------------------

    def track(self, mean: Tensor | None, var: Tensor) -> None:
        """Move the running statistics towards a batch's mean and unbiased variance.

        Channels whose statistics are not finite are passed over.

        Args:
            mean: Row ``(C,)``; None leaves the running mean alone.
            var: Row ``(C,)``.
        """
        if self.running_mean is None or self.running_var is None or not self.track_running_stats:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        update_weight = self._update_weight()
        finite = backends.is_finite(var)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            if new is not None:
                _lerp(running, torch.where(finite, new, running), update_weight)

    def _update_weight(self) -> float | Tensor:
        """Weight of the newest batch in the running statistics."""
        start, least = start_of(self._number())
        if not start:
            return least
        if self.num_batches_tracked is None or self.running_mean is None:
            return least  # 0 for the mean of all, as torch's batch norm
        batches = self.num_batches_tracked.to(self.running_mean.dtype)
        return (start / (batches - 1 + start)).clamp(least, 1)

    def new_state(self, *shape: int) -> Tensor:
        """Zeros of the type and place of the layer's statistics."""
        like = self.weight if self.running_var is None else self.running_var
        return torch.zeros(shape) if like is None else like.detach().new_zeros(shape)

    def new_counter(self) -> Tensor:
        """A whole number on the layer's device: reading it there costs no synchronization."""
        return self.new_state().long()

    def _device(self) -> torch.device | None:
        tensors = [self.weight, self.running_mean, *self.method_state.values()]
        devices = [t.device for t in tensors if t is not None]
        return next((one for one in devices if one.type != "meta"), next(iter(devices), None))

    def _parameters_like(self, var: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in the type of the statistics (they may be a model's bfloat16)."""
        weight, bias = (None if t is None else as_plain(t) for t in (self.weight, self.bias))
        return (
            weight if weight is None or weight.dtype == var.dtype else weight.to(var.dtype),
            bias if bias is None or bias.dtype == var.dtype else bias.to(var.dtype),
        )

    def reset_running_stats(self) -> None:
        """Reset running statistics and memory."""
        super().reset_running_stats()
        self.reset_memory()
        if self.step is not None:
            self.step.begin()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NormState":
        def lift(t: Tensor) -> Tensor:
            """Apply ``fn``, but keep the type of statistics where ``fn`` gives a coarser one."""
            if t.is_meta:  # there are no numbers to move
                moved = fn(t)
                return moved if moved.is_meta else moved.zero_()
            if t.dtype not in (torch.float32, torch.float64):
                return fn(t)
            target = fn(t.new_empty(0))
            return t.to(target.device) if target.dtype in backends.LOW_PRECISION else fn(t)

        was_meta = any(t.is_meta for t in self.method_state.values())
        super()._apply(lift, recurse)  # type: ignore[no-untyped-call]
        self.method_state = {name: lift(tensor) for name, tensor in self.method_state.items()}
        if self.step is not None:
            self.step.apply(lift)
        if was_meta and not any(t.is_meta for t in self.method_state.values()):
            self.reset_memory()
        self._last, self._recent = None, RecomputeCache()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, name, tensor in self._memory():
            scaled = self.loss_scale != 1 and in_loss_units(name, tensor)
            value = tensor / self.loss_scale if scaled else tensor
            destination[prefix + key] = value if keep_vars else value.detach()
        if self.frozen or self.affine_frozen:
            flags = torch.tensor([self.frozen, self.affine_frozen], device="cpu")
            destination[prefix + "frozen"] = flags

    def _memory(self) -> Iterator[tuple[str, str, Tensor]]:
        """Memory of the method and of an optimizer step: key in checkpoints, name, tensor."""
        yield from ((name, name, tensor) for name, tensor in self.method_state.items())
        if self.step is not None:
            yield from ((STEP + name, name, t) for name, t in self.step.tensors.items())

    def rescale(self, factor: float) -> None:
        """Multiply what it has averaged of gradients."""
        if factor != 1:
            for _, name, tensor in self._memory():
                if in_loss_units(name, tensor):
                    tensor.mul_(factor)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Attribute in which `torch.distributed.checkpoint` looks up each entry of a checkpoint."""
        return {key.partition(".")[0]: "_entries" for key in self.state_dict()}

    @property
    def _entries(self) -> SimpleNamespace:
        """The entries of a checkpoint as attributes, those with points in their names nested."""
        found = SimpleNamespace()
        for key, tensor in self.state_dict(keep_vars=True).items():
            *way, name = key.split(".")
            place = found
            for part in way:
                place = place.__dict__.setdefault(part, SimpleNamespace())
            place.__dict__[name] = tensor
        return found

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super_load = super()._load_from_state_dict
        rest = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        own = {name: state_dict.get(prefix + name) for name in self.method_state}
        frozen = state_dict.get(prefix + "frozen")
        step = prefix + STEP
        named = {prefix + name for name in (*own, "frozen", *self._parameters, *self._buffers)}
        steps = any(key.startswith(step) for key in state_dict)
        if not steps and named.isdisjoint(state_dict):  # nothing of this layer
            super_load(state_dict, *rest)
            return
        ours = {prefix + name for name in (*own, "frozen")}
        if steps:  # of a layer that may accumulate or not
            memory = self.step or StepMemory(self, None)
            ours |= {step + name for name in memory.tensors}
        super_load({key: value for key, value in state_dict.items() if key not in ours}, *rest)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if assign:  # which buffers were is the caller's, and training writes into them
            for name, buffer in self._buffers.items():
                if buffer is not None and prefix + name in state_dict:
                    self._buffers[name] = buffer.detach().clone()
        for name, tensor in self.method_state.items():
            value = own[name]
            if value is not None and value.shape != tensor.shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: the checkpoint holds "
                    f"{tuple(value.shape)}, this layer {tuple(tensor.shape)}"
                )
            elif value is not None and assign:
                self.method_state[name] = as_plain(value).detach().to(tensor.dtype, copy=True)
            elif value is not None:
                tensor.copy_(value)
        if assign:
            self._leave_meta()
        if frozen is not None:
            self.frozen, affine = (bool(flag) for flag in frozen)
            if affine != self.affine_frozen:
                self.freeze_affine(affine)
        if own.pop(_OUTLIERS, ...) is None:  # of a layer without a limit: none so far
            self.method_state[_OUTLIERS].zero_()
        lacking = [name for name, value in own.items() if value is None]
        if lacking:  # half of a memory is none
            if len(lacking) < len(own):
                warnings.warn(
                    f"{prefix[:-1]}: the checkpoint lacks {', '.join(lacking)} of what "
                    f"{type(self).__name__} remembers; its memory starts fresh",
                    stacklevel=2,
                )
            if assign:  # as it may rewrite them
                self._copy_parameters(state_dict, prefix)
            self._start_from_batchnorm(error_msgs, prefix)
        if self.step is not None:
            self.step.load(state_dict, step, self._device() if assign else None)
        self.rescale(self.loss_scale)
        self._last, self._recent = None, RecomputeCache()
        counted = (
            prefix + "num_batches_tracked" in state_dict or prefix + "running_var" not in state_dict
        )
        self._meet_statistics(counted)

    def end_momentum_warmup(self) -> None:
        """Count as many batches as end `momentum_warmup`: the next one weighs `momentum`."""
        k, count = self.momentum_warmup, self.num_batches_tracked
        if not (k and self.momentum) or count is None or count.is_meta:
            return
        if k / (int(count) + k) > self.momentum:
            count.fill_(1000 * k)  # enough for what momentum becomes

    def _meet_statistics(self, counted: bool = True) -> None:
        """End the warm-up if nobody counted the batches of statistics, as in old checkpoints."""
        count = self.num_batches_tracked
        if not self.momentum_warmup or count is None or count.is_meta or self.running_var is None:
            return
        if not (counted and int(count)) and not has_initial_statistics(self):
            self.end_momentum_warmup()

    def _leave_meta(self) -> None:
        """Give memory that is still on the meta device real tensors, beside the parameters."""
        if any(tensor.is_meta for tensor in self.method_state.values()):
            device = self._device()
            if device is not None and device.type != "meta":
                for name, tensor in self.method_state.items():
                    if tensor.is_meta:
                        self.method_state[name] = torch.zeros_like(tensor, device=device)

    def _copy_parameters(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Replace parameters that are a checkpoint's own tensors by copies."""
        for name, value in self._parameters.items():
            if value is not None and prefix + name in state_dict:
                copy = value.detach().clone()
                self._parameters[name] = nn.Parameter(copy, requires_grad=value.requires_grad)

    def _start_from_batchnorm(self, error_msgs: list[str], prefix: str) -> None:
        """After loading a checkpoint without this layer's memory: start it fresh."""
        self.reset_memory()

    def freeze_affine(self, frozen: bool) -> None:
        """Freeze or thaw weight and bias."""
        self.affine_frozen = frozen
        if frozen:
            make_constant(self)
        else:
            self.requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_last": None, "_recent": RecomputeCache(), "_plans": None}
        return {**self.__dict__, **fresh}

    def _rows(self) -> tuple[Tensor | None, ...]:
        """Scale, shift and running statistics, as compiled kernels need them, all or none."""
        of, kept = self._parameters, self._buffers
        return of.get("weight"), of.get("bias"), kept["running_mean"], kept["running_var"]

    def _number(self) -> float:
        """Momentum and its warm-up in one number, see `NormCall.update_weight`."""
        if self.momentum is None:
            return -1.0
        constant = not self.momentum_warmup or not 0 < self.momentum < 1
        return float(self.momentum) if constant else -self.momentum_warmup - self.momentum

    def pooling_obstacle(self) -> str | None:
        """The reason why statistics of micro-batches are not those of all; None if they are."""
        if self.pools:
            return None
        return (
            f"{type(self).__name__} has statistics that do not pool over micro-batches; "
            "convert it to another method, or do not accumulate"
        )

    def accumulate(self, steps: int | None, counts: bool = True) -> None:
        """Count optimizer steps of several forwards; see `anybatch.accumulate`.

        Args:
            steps: Forwards in a step, None if that is not known; 1 for no accumulation.
            counts: Whether so many forwards end a step; else only `StepMemory.begin` does.
        """
        raise NotImplementedError

    # --- taking over another layer -----------------------------------------

    def adopt_(self, norm: nn.Module) -> "NormState":
        """Take over another batch norm: parameters, statistics, flags and hooks.

        Parameters stay the same objects, so that an optimizer stays valid; this
        layer's memory starts fresh; the output in evaluation mode is unchanged.

        Args:
            norm: A torch batch norm or an anybatch layer.

        Returns:
            This layer.

        Raises:
            ValueError: If it has another number of channels, or if the output
                could not stay the same. ``norm`` is then as it was.
        """
        if not isinstance(norm, _NormBase) or norm.num_features != self.num_features:
            raise ValueError(f"norm={norm!r}: give a batch norm of {self.num_features} channels")
        accumulates = isinstance(norm, NormState) and norm.step is not None
        if accumulates and (obstacle := self.pooling_obstacle()) is not None:
            raise ValueError(obstacle)
        self.weight, self.bias, self.affine = norm.weight, norm.bias, norm.affine
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(norm, name)
            if value is not None and name in self._buffers:
                low = value.dtype in backends.LOW_PRECISION
                self._buffers[name] = value.float() if low else value
        if norm.running_var is not None:
            self.track_running_stats = norm.track_running_stats
        self._apply_to_device(norm)
        self.training = norm.training
        self.reset_memory()
        self._meet_statistics()
        if isinstance(norm, NormState):
            self.frozen, self.affine_frozen = norm.frozen, norm.affine_frozen
            if norm.step is not None:
                self.accumulate(norm.step.steps, norm.step.counts)
                assert self.step is not None
                self.step.owner = norm.step.owner
        for name, value in norm.__dict__.items():
            if name.endswith(_HOOKS) or name == "_is_full_backward_hook":
                self.__dict__[name] = value  # the same object: handles stay valid
        return self

    def _apply_to_device(self, norm: nn.Module) -> None:
        tensors = [*norm.parameters(recurse=False), *norm.buffers(recurse=False)]
        if tensors:
            device = tensors[0].device
            self.method_state = {
                name: tensor.to(device) for name, tensor in self.method_state.items()
            }


def has_initial_statistics(norm: nn.Module) -> bool:
    """True if a batch norm has counted no batch, and its running statistics say so."""
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    count = norm._buffers.get("num_batches_tracked")
    if var is None or mean is None or isinstance(mean, nn.UninitializedBuffer):
        return False
    if var.is_meta:  # which holds no numbers: the recipe of the network is that of a new one
        return True
    counted = count is not None and bool(count > 0)
    return not counted and bool((mean == 0).all()) and bool((var == 1).all())


def make_constant(norm: nn.Module) -> None:
    """Make scale and shift constants: no optimizer moves them by a gradient that they had."""
    norm.requires_grad_(False)
    for parameter in norm.parameters(recurse=False):
        parameter.grad = None


def _lerp(running: Tensor, new: Tensor, update_weight: float | Tensor) -> None:
    new = new if new.dtype == running.dtype else new.to(running.dtype)
    if torch._C._are_functorch_transforms_active():  # where `lerp_` has no batching rule
        running.copy_(torch.lerp(running, new, torch.as_tensor(update_weight, dtype=new.dtype)))
    else:
        running.lerp_(new, update_weight)
