"""Torch's own cases of its batch norms, and the checks that torch runs on every module.

The cases come from the installed torch (`torch.testing._internal.common_modules`); the checks are
those of its `test/test_modules.py`, which no wheel of torch has.
"""

import copy
import io
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.registry import METHODS
from method_cases import NAMES, QUICK

pytestmark = pytest.mark.filterwarnings("ignore")
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
VIRTUAL = [name for name in NAMES if METHODS[name].wraps]
# Whose gradient is not the derivative of their output: parts of their statistics are constants.
AVERAGED = ["mbn", "mabn"]
DIMS = (1, 2, 3)


class Case(NamedTuple):
    """What torch builds a batch norm with, and what it gives it."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    x: Tensor
    name: str


def cases_module() -> Any:
    """Torch's module, which wants `expecttest` for a class of its own and forbids global flags."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:
            stub = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
            sys.modules["expecttest"] = stub
    from torch.testing._internal import common_modules

    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    return common_modules


def cases(dims: int, training: bool = True, dtype: torch.dtype = torch.float64) -> Iterator[Case]:
    """Torch's cases of ``BatchNorm1d`` to ``3d``."""
    common = cases_module()
    kind = getattr(nn, f"BatchNorm{dims}d")
    (info,) = (info for info in common.module_db if info.module_cls is kind)
    torch.manual_seed(0)
    for one in info.module_inputs_func(info, "cpu", dtype, False, training):
        given, (x,) = one.constructor_input, one.forward_input.args
        yield Case(given.args, given.kwargs, x, one.desc)


def build(name: str, dims: int, case: Case, **options: Any) -> nn.Module | None:
    """A method's layer with torch's arguments; None where the method has to track statistics."""
    kind = METHODS[name].layer(dims)
    options = {"dtype": torch.float64, **case.options, **options}
    own = {**METHODS[name].fixed, **QUICK.get(name, {})}
    tracks = len(case.arguments) < 5 or case.arguments[4]
    if not tracks and getattr(kind, "needs_running_stats", False):
        with pytest.raises(ValueError, match="track_running_stats=False: .*leave it True"):
            kind(*case.arguments, **own, **options)
        return None
    return kind(*case.arguments, **own, **options)


def layers(name: str, dims: int, training: bool = True) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layers of all cases, and their inputs."""
    for case in cases(dims, training):
        layer = build(name, dims, case)
        if layer is not None and not (name in VIRTUAL and case.x.shape[0] == 0):
            yield layer.train(training), case.x


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    assert x.grad is not None
    return y.detach(), x.grad


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


modes = pytest.mark.parametrize("training", [True, False])
every_dims = pytest.mark.parametrize("dims", DIMS)
every_name = pytest.mark.parametrize("name", NAMES)


@pytest.mark.few(3)
@modes
@every_dims
@pytest.mark.parametrize("name", ["bn", "sync"])
def test_batch_norm_gives_what_torchs_gives(name: str, dims: int, training: bool) -> None:
    for case in cases(dims, training):
        layer = build(name, dims, case)
        assert layer is not None
        norm = getattr(nn, f"BatchNorm{dims}d")(*case.arguments, **case.options).double()
        for _ in range(3):
            same(run(layer.train(training), case.x), run(norm.train(training), case.x))
        assert layer.state_dict().keys() == norm.state_dict().keys()
        if case.x.numel() == 0 and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_(norm.num_batches_tracked)  # nothing counts no batch
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)


@modes
@every_dims
@every_name
def test_a_layer_runs_and_has_a_repr(name: str, dims: int, training: bool) -> None:
    for layer, x in layers(name, dims, training):
        y, dx = run(layer, x)
        assert y.shape == dx.shape == x.shape
        assert bool(y.isfinite().all())
        assert type(layer).__name__ in str(layer)


@every_dims
@every_name
def test_parameters_and_buffers_are_of_the_type_and_device_asked_for(name: str, dims: int) -> None:
    for case in cases(dims):
        for device in ("cpu", "meta"):
            layer = build(name, dims, case, device=device)
            if layer is None:
                continue
            tensors = [*layer.parameters(), *layer.buffers()]
            assert all(t.device.type == device for t in tensors)
            assert all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())


@pytest.mark.few(8)
@modes
@every_dims
@every_name
def test_a_loaded_or_copied_layer_gives_the_same(name: str, dims: int, training: bool) -> None:
    for layer, x in layers(name, dims, training):
        run(layer, x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded, copied = torch.load(file, weights_only=False), copy.deepcopy(layer)
        expected = run(layer, x)
        same(run(loaded, x), expected)
        same(run(copied, x), expected)


@pytest.mark.few(8)
@modes
@every_dims
@every_name
def test_memory_formats_and_gaps_change_nothing(name: str, dims: int, training: bool) -> None:
    for layer, x in layers(name, dims, training):
        expected = run(copy.deepcopy(layer), x)
        spaced = x.repeat_interleave(2, dim=-1)[..., ::2]
        assert x.numel() == 0 or not spaced.is_contiguous()
        same(run(copy.deepcopy(layer), spaced), expected)
        if x.dim() in LAST:
            last = x.contiguous(memory_format=LAST[x.dim()])
            found = run(copy.deepcopy(layer).to(memory_format=LAST[x.dim()]), last)
            same(found, expected)
            assert found[0].is_contiguous(memory_format=LAST[x.dim()])


@pytest.mark.few(8)
@modes
@every_dims
@pytest.mark.parametrize("name", [name for name in NAMES if name not in AVERAGED])
def test_gradients_are_derivatives(name: str, dims: int, training: bool) -> None:
    for layer, x in layers(name, dims, training):
        if x.numel() == 0 or (name == "range" and training):  # a finite difference moves extremes
            continue
        with anybatch.no_update():
            x = x.detach().requires_grad_()
            assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
            assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True, atol=1e-4)


@every_dims
@pytest.mark.parametrize("name", [name for name in NAMES if name not in VIRTUAL])
def test_training_and_evaluation_differ(name: str, dims: int) -> None:
    for layer, x in layers(name, dims):
        if x.numel() and layer.track_running_stats:
            with anybatch.no_update():
                y = layer(x)
            assert not torch.allclose(y, layer.eval()(x))


@every_dims
@every_name
def test_a_layer_moves_between_types_and_devices(name: str, dims: int) -> None:
    for layer, x in layers(name, dims):
        before = copy.deepcopy(layer.state_dict())
        for target in (torch.float32, torch.float64):
            layer.to(target)
            run(layer, x.to(target))
        empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
        empty.load_state_dict(before)
        for key, value in empty.state_dict().items():
            torch.testing.assert_close(value, before[key])


@every_dims
@every_name
def test_torchs_wrong_arguments_are_refused(name: str, dims: int) -> None:
    common = cases_module()
    kind = getattr(nn, f"BatchNorm{dims}d")
    (info,) = (info for info in common.module_db if info.module_cls is kind)
    own = {**METHODS[name].fixed, **QUICK.get(name, {})}
    wrong = info.module_error_inputs_func
    for one in wrong(info, "cpu", torch.float64, False, True) if wrong else ():
        given = one.module_error_input.constructor_input
        with pytest.raises(one.error_type):
            METHODS[name].layer(dims)(*given.args, **own, **given.kwargs)
