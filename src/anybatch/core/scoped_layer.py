"""The elements that contribute to a layer's statistics: masks, and several processes' batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybatch.core.masks import FittedMask, fit_mask
from anybatch.core.module_state import NormState
from anybatch.core.reduction_scope import (
    WORLD,
    HeldGroup,
    ReductionScope,
    active_group,
    check_group,
    check_same,
    sum_processes,
)


class ScopedLayer(NormState):
    """A layer that may take a mask, and join the batches of several processes.

    Attributes:
        mask: Valid positions of the next batches; None for all.
    """

    mask: Tensor | None
    _group: Any
    _compared: bool

    @property
    def group_size(self) -> int | None:
        """Examples that share statistics within a normalization batch; None is all."""
        return None

    def own_arguments(self) -> Mapping[str, Any]:
        """The method's own arguments: in the layer's repr, and compared between processes."""
        return {}

    @property
    def process_group(self) -> Any:
        """Processes whose batches are one in training: a process group, "world" or None."""
        return self._group.group if isinstance(self._group, HeldGroup) else self._group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        check_group(process_group)
        named = process_group is None or process_group == WORLD
        self._group = process_group if named else HeldGroup(process_group)

    def _source(self, x: Tensor, mask: Tensor | None, training: bool) -> ReductionScope | None:
        """The elements that contribute to the statistics; None for all of the current batch."""
        valid, counted = (None, None) if mask is None else self._fit(mask, x)
        joins = training and self.group_size is None
        group = active_group(self.process_group) if joins else None
        if group is not None and not self._compared and not torch.compiler.is_compiling():
            check_same(group, self._described(), self._device())
            self._compared = True
        if valid is None and group is None:
            return None
        name = f"{type(self).__name__}({self.num_features})"
        return ReductionScope(valid, group, name, counted)

    def _described(self) -> str:
        """The settings that processes which synchronize must agree on."""
        own = ", ".join(f"{name}={value}" for name, value in self.own_arguments().items())
        return f"{type(self).__name__}({self.num_features}, eps={self.eps}, {own})"

    def _fit(self, mask: Tensor, x: Tensor) -> FittedMask:
        return fit_mask(mask, x, type(self).__name__)

    def examples_of_all(self, examples: int) -> int:
        """Examples in a batch of all processes; where there are several, reading it waits."""
        group = active_group(self.process_group)
        if group is None:
            return examples
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__} reads the batch size of all processes from the first "
                "batch, which a compiled graph cannot: give batch_size=, the examples of all "
                "processes' batches, or run a step before torch.compile"
            )
        (total,) = sum_processes(group, torch.tensor([float(examples)], device=self._device()))
        assert total is not None
        return round(float(total))
