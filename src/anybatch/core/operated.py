"""The autograd function around the kernels as operators, for what traces a call."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anybatch.backends.protocol import Recipe
from anybatch.core.grouping import Partition
from anybatch.core.launched import running_of

if TYPE_CHECKING:
    from anybatch.core.norm_layer import NormLayer


def operate(
    layer: "NormLayer",
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    recipe: Recipe,
    cut: Partition,
    update: bool,
) -> Tensor:
    """Normalize a batch by the operators.

    Args:
        layer: The layer.
        x: Its input, dense.
        weight: Scale.
        bias: Shift.
        recipe: Its method.
        cut: How the batch is cut.
        update: Whether state may change.

    Returns:
        The output.
    """
    how = (*map(list, cut), layer.columns, layer._number(), layer.eps, update)
    memory = (recipe.mean, recipe.var, recipe.window, recipe.counter, recipe.keep)
    forward = (recipe.kind, list(recipe.numbers), list(recipe.steps), recipe.smooth, *how)
    tensors = (*running_of(layer), *memory, recipe.psi, recipe.psi_counter)
    backward = (recipe.kind, recipe.averages, *how)
    y: Tensor = Operated.apply(x, weight, bias, *tensors, forward, backward)  # type: ignore[no-untyped-call]
    return y


class Operated(torch.autograd.Function):
    """One operator forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        tracked: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        window: Tensor | None,
        counter: Tensor | None,
        keep: Tensor | None,
        psi: Tensor | None,
        psi_counter: Tensor | None,
        how: tuple[Any, ...],
        back: tuple[Any, ...],
    ) -> Tensor:
        memory = (running_mean, running_var, tracked, mean, var, window, counter, keep)
        y: Tensor
        y, used = torch.ops.anybatch.normalize(x, weight, bias, *memory, *how)
        ctx.save_for_backward(x, weight, used, tracked, psi, psi_counter)
        ctx.back = back
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *state = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, slopes = torch.ops.anybatch.normalize_backward(dy, x, *state, *ctx.back, needs[0])
        db, dw = slopes.unbind()
        own = dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None
        return *own, *(None,) * 12
