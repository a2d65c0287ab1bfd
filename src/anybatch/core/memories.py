"""Several memories of one layer, which the normalization batches of a forward take in turn."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from anybatch.backends.aten import recorded
from anybatch.core.activation_checkpointing import RecomputeCache
from anybatch.core.arguments import check_count
from anybatch.core.dispatched_layer import DispatchedLayer
from anybatch.core.fused_activation import Activation
from anybatch.core.gradient_accumulation import StepMemory
from anybatch.core.module_state import STEP
from anybatch.core.reduction_scope import ReductionScope

_STATE = ("_buffers", "method_state", "_recent", "_last", "_plans", "_flow", "_others")
_PREFIX = "memories."  # before the names of further memories in a checkpoint
Self = TypeVar("Self", bound="MemoriesLayer")


class MemoriesLayer(DispatchedLayer):
    """A layer whose normalization batches may have a memory each, as on several devices.

    A further memory is a copy of the layer with the same parameters and settings and with state of
    its own. It starts as the layer's state is at the first such forward.
    """

    _others: tuple[Any, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("norm_batch_size", "memories"):
            own = self.__dict__
            now = {
                "norm_batch_size": own.get("norm_batch_size"),
                "memories": own.get("memories", 1),
            }
            self._check_cut(**{**now, name: value})
        super().__setattr__(name, value)

    def _check_cut(self, norm_batch_size: int | None, memories: int) -> None:
        """Raise for parts of a batch that there cannot be."""
        check_count("memories", memories)
        if memories > 1 and norm_batch_size is None:
            raise ValueError(
                f"memories={memories}: give norm_batch_size, the examples that go to each"
            )
        if norm_batch_size is not None:
            check_count("norm_batch_size", norm_batch_size)
            if self.__dict__.get("step") is not None:
                raise ValueError(
                    f"norm_batch_size={norm_batch_size}: it cuts a batch where accumulate joins "
                    "batches; undo that first (anybatch.accumulate(model, 1))"
                )

    def accumulate(self, steps: int | None, counts: bool = True) -> None:
        if steps != 1 and self.norm_batch_size is not None:
            raise ValueError(
                f"norm_batch_size={self.norm_batch_size}: it cuts a batch where accumulate joins "
                "batches; set it to None"
            )
        self.step = None if steps == 1 else StepMemory(self, steps, counts)
        self._last, self._recent = None, RecomputeCache()

    def lender(self: Self, x: Tensor) -> Callable[[Self, tuple[slice, ...], Tensor], None]:
        """Return a function that gives a layer the bound layer's call for a part of ``x``."""
        return lambda layer, examples, part: None

    def open_state(self, x: Tensor) -> None:
        """Make the state whose size the first batch decides."""

    def _normalize_in_turn(
        self, x: Tensor, source: ReductionScope | None, then: Activation | None
    ) -> Tensor:
        """Run the training forward; each normalization batch uses the next memory.

        A compiler breaks its graph here: it cannot make the further memories' layers.
        """
        if recorded.is_transformed():
            raise RuntimeError(
                f"torch.func: {type(self).__name__} has memories={self.memories}, whose state is "
                "in no buffer, so that functional_call cannot pass it; set memories=1, or call it "
                "in evaluation mode"
            )
        self.open_state(x)
        size = self.norm_batch_size or x.shape[0]
        pieces = x.split(size)
        done, lend = list(pieces), self.lender(x)
        for at, layer in enumerate((self, *self._follow())[: len(pieces)]):
            own = range(at, len(pieces), self.memories)
            examples = tuple(slice(one * size, (one + 1) * size) for one in own)
            # All of a memory's parts in one call: their backward passes come in order as well.
            part = pieces[at] if len(own) == 1 else torch.cat([pieces[one] for one in own])
            lend(layer, examples, part)
            y = layer._by_own_memory(part, source and source.at(*examples))
            for one, piece in zip(own, y.split(size), strict=True):
                done[one] = piece
        y = torch.cat(done)
        return y if then is None else then.of(y, fresh=True)

    def _by_own_memory(self, x: Tensor, source: ReductionScope | None) -> Tensor:
        return self._normalize_batch(x, True, source)

    def _follow(self: Self) -> tuple[Self, ...]:
        """The layers of the further memories, with this layer's parameters and settings."""
        if len(self._others) != self.memories - 1:
            self._others = tuple(self._other() for _ in range(self.memories - 1))
        settings = {name: v for name, v in self.__dict__.items() if name not in _STATE}
        shared = {name: self.method_state[name] for name in self.set_state}
        stale = self.__dict__.get("_plans") is None  # a setting has changed
        for other in self._others:
            other.__dict__.update(settings)
            other.method_state.update(shared)
            if stale:
                other.forget_plans()
        return self._others

    def _other(self: Self) -> Self:
        other = copy.copy(self)
        other.__dict__["_others"] = ()
        for place in ("_buffers", "method_state"):
            tensors = self.__dict__[place].items()
            other.__dict__[place] = {n: None if t is None else t.clone() for n, t in tensors}
        return other

    def state_keys(self) -> list[str]:
        """The names in a checkpoint of what the method remembers, in all memories and in a step."""
        starts = ("", *(f"{_PREFIX}{at}." for at in range(1, self.memories)))
        within = () if self.step is None else (f"{STEP}{name}" for name in self.step.tensors)
        return [*within, *(start + name for start in starts for name in self.method_state)]

    @property
    def further_memories(self: Self) -> tuple[Self, ...]:
        """The layers of the memories beyond the first, as far as there are any yet."""
        return self._others

    def reset_memory(self) -> None:
        self._others = ()
        super().reset_memory()

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for other in self._others:
            other.__dict__["_parameters"] = {}  # they have moved already
            other._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for at, other in enumerate(self._follow(), 1):
            for name, tensor in other.moved():
                kept = tensor if keep_vars else tensor.detach()
                destination[f"{prefix}{_PREFIX}{at}.{name}"] = kept

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        start, names = prefix + _PREFIX, {name for name, _ in self.moved()}
        kept = {
            key: value
            for key, value in state_dict.items()
            if key.startswith(start) and key.rpartition(".")[2] in names
        }
        own = {key: value for key, value in state_dict.items() if key not in kept}
        about_it = kept or any(prefix + name in own for name in names)
        super()._load_from_state_dict(own, prefix, *rest)
        if not about_it:
            return
        others = [self._other() for _ in range(self.memories - 1)]
        pairs = [
            (kept.get(f"{start}{at}.{name}"), tensor)
            for at, other in enumerate(others, 1)
            for name, tensor in other.moved()
        ]
        fits = len(pairs) == len(kept) and all(
            value is not None and value.shape == tensor.shape for value, tensor in pairs
        )
        if kept and not fits:
            warnings.warn(
                f"{prefix[:-1] or type(self).__name__}: the checkpoint holds other memories than "
                f"memories={self.memories} takes; all start from the first",
                stacklevel=2,
            )
        for value, tensor in pairs if fits else ():
            assert value is not None
            tensor.copy_(value)
        self._others = tuple(others) if fits else ()

    def moved(self) -> list[tuple[str, Tensor]]:
        """The tensors that a forward updates, by name."""
        tensors = {**self._buffers, **self.method_state}
        return [(n, t) for n, t in tensors.items() if t is not None and n not in self.set_state]
