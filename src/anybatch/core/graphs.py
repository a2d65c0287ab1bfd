"""Layers in ``torch.fx.symbolic_trace``, ``torch.jit.trace`` and ``torch.jit.script``."""

from typing import Any, NoReturn

from torch import nn


def as_leaf(module: nn.Module, input: Any, *args: Any, **options: Any) -> Any:
    """Call a module as one node of the graph that ``torch.fx.symbolic_trace`` records.

    Args:
        module: The module.
        input: The tracer's value.
        *args: Other arguments of its forward.
        **options: Keyword arguments of its forward; None for those that are not given.

    Raises:
        TypeError: If the input is neither a tensor nor such a value.
    """
    from torch.fx import Proxy

    if not isinstance(input, Proxy):
        raise TypeError(
            f"input of type {type(input).__name__}: {type(module).__name__} takes a tensor"
        )
    given = {name: value for name, value in options.items() if value is not None}
    target = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return input.tracer.create_proxy("call_module", target, (input, *args), given)


def refuse_script(module: nn.Module) -> NoReturn:
    """Raise for ``torch.jit.script``, before it changes anything."""
    raise RuntimeError(
        f"torch.jit.script: {type(module).__name__} is Python that TorchScript cannot compile; "
        "script anybatch.to_batchnorm(copy.deepcopy(model)) or anybatch.fold(...), or use "
        "torch.jit.trace in evaluation mode"
    )


def refuse_trace(module: nn.Module) -> NoReturn:
    """Raise for ``torch.jit.trace`` of a layer in training."""
    raise RuntimeError(
        f"torch.jit.trace: {type(module).__name__} changes its state in training, which a trace "
        "cannot hold; call model.eval() first, or trace "
        "anybatch.to_batchnorm(copy.deepcopy(model))"
    )
