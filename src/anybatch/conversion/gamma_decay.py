"""Weight decay of scales towards 1, beside an optimizer that decays towards 0."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Optimizers of torch that subtract learning rate x decay x parameter from the parameter itself,
# and those that add decay x parameter to the gradient.
_DECOUPLED = {"AdamW", "Adafactor", "Muon"}
_COUPLED = {"ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"}

_DECAYING: weakref.WeakKeyDictionary[Any, GammaDecay] = weakref.WeakKeyDictionary()


class GammaDecay:
    """Weight decay towards another target than 0, for the groups that `param_groups` made.

    Before each step of the optimizer, for each parameter p with a gradient in a group that has a
    "gamma_target", with w its "gamma_decay"::

        coupled:    grad = grad + w * (p - target)
        decoupled:  p = p - learning_rate * w * (p - target)

    which is the decay of that optimizer with the target in the place of 0, with ``maximize`` too.
    The group's own weight decay stays 0. Learning rates are read at each step; gradients that a
    scaler or a clipping changed are taken as they are at the step, and are those again after it.

    Args:
        optimizer: an optimizer over such groups. It is not changed, but for hooks before and after
            its steps.
        decoupled: which of the two (default None: as this optimizer of torch does it; say it for
            one that is not torch's).

    Raises:
        ValueError: the optimizer has no such group, it has a GammaDecay already, it is not known
            how it decays, or it has no weight decay (LBFGS).
        TypeError: `optimizer` is none.

    Example:
        >>> import anybatch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4))
        >>> groups = anybatch.param_groups(net, 0.1, gamma_target=1.0)
        >>> optimizer = torch.optim.SGD(groups, lr=0.1)
        >>> decay = GammaDecay(optimizer)
        >>> _ = torch.nn.init.constant_(net[1].weight, 2.0)
        >>> (0 * net(torch.randn(8, 2))).sum().backward()
        >>> optimizer.step()
        >>> net[1].weight[0].item()  # 2 - 0.1 * 0.1 * (2 - 1)
        1.99...
    """

    def __init__(self, optimizer: Optimizer, decoupled: bool | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer={optimizer!r}: give a torch.optim.Optimizer")
        if not any("gamma_target" in group for group in optimizer.param_groups):
            raise ValueError(
                "optimizer: none of its groups has a gamma_target; make them with "
                "anybatch.param_groups(model, weight_decay, gamma_target=1.0)"
            )
        if optimizer in _DECAYING:
            raise ValueError("optimizer: it has a GammaDecay already; call remove() of that first")
        self.decoupled = _is_decoupled(optimizer) if decoupled is None else decoupled
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )
        _DECAYING[optimizer] = self

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        for optimizer, decay in list(_DECAYING.items()):
            if decay is self:
                del _DECAYING[optimizer]

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._gradients.clear()  # of a step that failed
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self.decoupled or closure is None:
            self._decay(optimizer)
            return None
        # A closure makes the gradients within the step.
        closing = partial(self._closing, optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": closing}
        return (args[0], closing, *args[2:]), kwargs

    def _closing(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._decay(optimizer)
        return loss

    def _after(self, *_: Any) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients.clear()

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            if "gamma_target" not in group:
                continue
            amount, target = group["gamma_decay"], group["gamma_target"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                excess = parameter - target
                if self.decoupled:
                    rate = group["lr"] * amount * _taken(optimizer)
                    parameter.sub_((excess * rate).to(parameter.dtype))
                else:
                    self._gradients.append((parameter, parameter.grad))
                    own = excess * (amount * _scale(optimizer))
                    parameter.grad = parameter.grad + (-own if group.get("maximize") else own)


def _is_decoupled(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    if kind.__module__.split(".")[0] == "torch":
        groups = optimizer.param_groups
        if kind.__name__ in _DECOUPLED or any(g.get("decoupled_weight_decay") for g in groups):
            return True
        if kind.__name__ in _COUPLED:
            return False
        raise ValueError(f"optimizer: {kind.__name__} has no weight decay to go with")
    raise ValueError(
        f"decoupled=None: it is not known how {kind.__name__} decays; give True if it takes "
        "decay off the parameter itself, as AdamW does, False if it adds decay to the gradient"
    )


def _scale(optimizer: Optimizer) -> float | Tensor:
    """The factor of a gradient scaler in the gradients, if the optimizer step removes it."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


def _taken(optimizer: Optimizer) -> float | Tensor:
    """0 if a gradient scaler makes the optimizer skip this step, else 1."""
    found = getattr(optimizer, "found_inf", None)
    return 1.0 if found is None else 1 - found
