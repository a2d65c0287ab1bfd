"""Whole layers as operators of torch: ``anybatch::normalize`` and ``anybatch::normalize_backward``.

The kernels of a CPU and of a GPU write memory that torch does not see them write. What traces a
call (a compiler, an export) must not run them, and has to know what they give and what they change.
So they are operators of ``torch.library`` too, whose schemas name what is written, and which answer
for tensors without data. Arguments are those of `MethodSpec` and `NormCall`, one by one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.backends import choice
from anybatch.backends.layout import dense, is_channels_last
from anybatch.backends.numba import backend as numba
from anybatch.backends.protocol import Kernels, MethodSpec, NormCall, Rows, RuleState, Statistics
from anybatch.backends.rule import COUNTERS, NUMBERS, ROWS, RULE_SETS, WINDOWS
from anybatch.backends.triton import backend as triton
from anybatch.backends.triton.backend import spec_obstacle

_CUT = (
    "int[] sizes, int[] groups, int[] batches, int num_statistics, float update_weight, float eps, "
    "bool update"
)
# The name of a method's rules, whether there is a mean, options of the layer, and which of these
# are no numbers.
_METHOD = "str method, bool centered, float[] options, int[] flags"
_KEPT = [f"row{i}" for i in range(ROWS)] + [f"window{i}" for i in range(WINDOWS)]
_KEPT += [f"counter{i}" for i in range(COUNTERS)]
_WRITTEN = ", ".join(f"Tensor({chr(ord('d') + i)}!)? {name}" for i, name in enumerate(_KEPT))
_NUMBERS = ", ".join(f"Tensor? number{i}" for i in range(NUMBERS))
_SCHEMAS = (
    "normalize(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    f"Tensor(b!) running_var, Tensor(c!) num_batches_tracked, {_WRITTEN}, {_NUMBERS}, "
    f"{_METHOD}, {_CUT}) -> (Tensor, Tensor)",
    "normalize_backward(Tensor dy, Tensor x, Tensor weight, Tensor used, Tensor "
    "num_batches_tracked, Tensor(a!)? row, Tensor(b!)? window, Tensor(c!)? counter, "
    f"{_METHOD}, {_CUT}, bool wanted) -> (Tensor, Tensor)",
)
_FORWARD = len(_KEPT) + NUMBERS  # tensors of a rule's state, forward
_library = torch.library.Library("anybatch", "DEF")
for _schema in _SCHEMAS:
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    _library.define(_schema, tags=tags)


class TorchLibraryBackend:
    """The kernels as operators, under a compiler."""

    name = "torch_library"
    takes_relu: frozenset[str] = frozenset()
    takes_scopes: frozenset[str] = frozenset()

    def supports(self, call: NormCall, x: Tensor, rows: Rows) -> str | None:
        return self.memory_obstacle(x, rows) or spec_obstacle(call, x)

    def memory_obstacle(self, x: Tensor, rows: Rows) -> str | None:
        if not torch.compiler.is_compiling():
            return "no compiler traces the call"
        if choice.selected != "always":
            return f"use_fused({choice.selected!r}): compilers see torch's operators; 'always' asks"
        if not (x.is_contiguous() or is_channels_last(x)):
            return "an input with gaps in memory"
        if _is_launched(x):
            dtype = triton.TYPES.get(x.dtype)
        else:
            dtype = x.dtype if x.dtype in numba.TYPES else None
        for row in rows:
            if row is None:
                return "no weight and bias, or no running statistics"
            if row.dtype != dtype or row.device != x.device or not row.is_contiguous():
                return "an input, parameters or running statistics that kernels do not take"
        return None if _is_there(x.device.type) else f"no kernels for {x.device.type}"

    def kernels(self, call: NormCall, x: Tensor) -> Kernels | None:
        return None

    def prepare(self, call: NormCall, x: Tensor) -> NormCall:
        return call

    def forward(
        self,
        call: NormCall,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        state: tuple[Any, ...],
        relu: bool,
    ) -> tuple[Tensor, tuple[Tensor | None, ...], Any]:
        ahead, behind = state[: 3 + _FORWARD], state[3 + _FORWARD :]
        method = method_arguments(call.spec, call.spec.kept)
        y, used = torch.ops.anybatch.normalize(x, weight, bias, *ahead, *method, *_how(call))
        return y, (used, state[2], *behind), None

    def backward(
        self,
        call: NormCall,
        context: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        method = method_arguments(call.spec, call.spec.averages)
        dx, slopes = torch.ops.anybatch.normalize_backward(
            dy, x, weight, *saved, *method, *_how(call), needs[0]
        )
        db, dw = slopes.unbind()
        dx_or_none = dx if needs[0] else None
        return dx_or_none, dw if needs[1] else None, db if needs[2] else None, None

    def statistics(self, call: NormCall, context: Any, like: Tensor) -> list[Statistics]:
        raise NotImplementedError("a compiled graph's gradient is its own")


def state_of(spec: MethodSpec) -> tuple[Tensor | None, ...]:
    """A method's state, which a compiler has to see as arguments of the function."""
    rows, windows, counters, numbers, _ = spec.kept
    kept = (*_filled(rows, ROWS), *_filled(windows, WINDOWS), *_filled(counters, COUNTERS))
    averages = (_filled(some, 1)[0] for some in spec.averages[:3])
    return (*kept, *_filled(numbers, NUMBERS), *averages)


def _filled(tensors: tuple[Tensor, ...], number: int) -> tuple[Tensor | None, ...]:
    return (*tensors, *(None,) * (number - len(tensors)))


def method_arguments(spec: MethodSpec, kept: RuleState) -> tuple[Any, ...]:
    """A method as arguments of an operator."""
    flags = [i for i, option in enumerate(kept.options) if isinstance(option, bool)]
    return spec.method.name, spec.centered, [float(option) for option in kept.options], flags


def _spec(method: str, centered: bool, forward: RuleState, backward: RuleState) -> MethodSpec:
    """The reverse of `_method`."""
    found = RULE_SETS.get(method)
    if found is None:
        raise RuntimeError(
            f"method {method!r}: this graph was made with a layer's rules that this process does "
            "not have; import the module of the layer, in its version then, before running it"
        )
    return MethodSpec(found, forward, backward, centered)


def _options(options: list[float], flags: list[int]) -> tuple[float, ...]:
    return tuple(bool(one) if i in flags else one for i, one in enumerate(options))


def _given(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(one for one in tensors if one is not None)


def _how(call: NormCall) -> tuple[Any, ...]:
    sizes, groups, batches = call.cut
    cut = list(sizes), list(groups), list(batches)
    return (*cut, call.num_statistics, call.update_weight, call.eps, call.update)


def _is_there(device: str) -> bool:
    """Whether there are kernels for a kind of device."""
    if triton.kernels_on(torch.device(device)) is not None:
        return True
    return device == "cpu" and numba.steps_of("rule") is not None


# What `torch.compiler.assume_constant_result` does, but for loading the compiler.
vars(_is_there)["_dynamo_marked_constant"] = True


def _normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    state, (method, centered, options, flags, *how) = rest[:_FORWARD], rest[_FORWARD:]
    rows, windows = state[:ROWS], state[ROWS : ROWS + WINDOWS]
    counters, numbers = state[ROWS + WINDOWS : -NUMBERS], state[-NUMBERS:]
    kept = RuleState(
        _given(rows), _given(windows), _given(counters), _given(numbers), _options(options, flags)
    )
    spec = _spec(method, centered, kept, RuleState())
    x, last = _dense(x)
    call = _call(spec, how, last)
    running = running_mean, running_var, num_batches_tracked
    if _is_launched(x):
        from anybatch.backends.triton import steps as kernels

        launched: tuple[Tensor, Tensor] = kernels.forward(x, weight, bias, running, call)
        return launched
    from anybatch.backends.numba import rule_steps

    loops = rule_steps.prepare(call, x)
    y, _, (batches, _) = loops.forward(call, x, weight, bias, None, running, False)
    return y, rule_steps.to_table(batches)


def _normalize_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    used: Tensor,
    num_batches_tracked: Tensor,
    row: Tensor | None,
    window: Tensor | None,
    counter: Tensor | None,
    method: str,
    centered: bool,
    options: list[float],
    flags: list[int],
    *how: Any,
) -> tuple[Tensor, Tensor]:
    *cut, wanted = how
    x, last = _dense(x)
    dy = dense(dy, last, x.dtype)
    kept = _given((row,)), _given((window,)), _given((counter,))
    averages = RuleState(*kept, options=_options(options, flags))
    spec = _spec(method, centered, RuleState(), averages)
    call = _call(spec, cut, last)
    if _is_launched(x):
        from anybatch.backends.triton import steps as kernels

        tensors = (dy, x, weight, used, num_batches_tracked)
        launched: tuple[Tensor, Tensor] = kernels.backward(*tensors, call, wanted)
        return launched
    from anybatch.backends.numba import rule_steps

    loops = rule_steps.prepare(call, x)
    batches = rule_steps.from_table(spec, used, loops.runs)
    needs = (wanted, True, True, False)
    context = (batches, num_batches_tracked)
    dx, dw, db, _ = loops.backward(call, context, dy, x, weight, (), needs)
    assert dw is not None and db is not None
    return x.new_empty(0) if dx is None else dx, torch.stack([db, dw])


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """A batch without gaps in memory, and whether it is to be read with its channels last."""
    if x.shape[2:].numel() == 1 or x.is_contiguous():
        return x.contiguous(), x.shape[2:].numel() == 1
    return (x, True) if is_channels_last(x) else (x.contiguous(), False)


def _call(spec: MethodSpec, how: Any, last: bool) -> NormCall:
    sizes, groups, batches, num_statistics, update_weight, eps, update = how
    cut = tuple(sizes), tuple(groups), tuple(batches)
    return NormCall(cut, num_statistics, eps, update, spec, last, update_weight)


def _is_launched(x: Tensor) -> bool:
    return x.device.type in triton.DEVICES


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    method, _, _, _, sizes, _, _, num_statistics, *_ = rest[4 + _FORWARD :]
    dtype = weight.dtype if _is_launched(x) else torch.float64
    rows = MethodSpec(RULE_SETS[method]).rows
    return torch.empty_like(_dense(x)[0]), x.new_empty(
        rows, len(sizes), num_statistics, dtype=dtype
    )


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(_dense(x)[0]) if rest[-1] else x.new_empty(0)
    return dx, weight.new_empty(2, *weight.shape)


torch.library.register_fake("anybatch::normalize", _fake, lib=_library)
torch.library.register_fake("anybatch::normalize_backward", _fake_backward, lib=_library)
for _device in ("CPU", "CUDA"):
    _library.impl("normalize", _normalize, _device)
    _library.impl("normalize_backward", _normalize_backward, _device)


def _fake_moments(x: Tensor, mean: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = x.new_empty(x.shape[1]) if mean is None else torch.empty_like(mean)
    return rows, torch.empty_like(rows)


# torch has none, without which a graph of symbolic shapes cannot have its operator.
_moments = "aten::batch_norm_update_stats"
_torch_library = torch.library.Library("aten", "IMPL", "Meta")
if not torch._C._dispatch_has_kernel_for_dispatch_key(_moments, "Meta"):
    _torch_library.impl(_moments, _fake_moments)
