"""Random methods, shapes, formats and histories: the reference's numbers, and invariances."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from anybatch.backends import use_fused
from reference_cases import CASES, CHANNELS, LAST, check, flat, pair

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
THOUSANDS = settings(QUICK, max_examples=3000, derandomize=True)
# Rules that treat the examples of a batch alike, and channels apart.
ALIKE = [
    name
    for name, (method, _, options) in CASES.items()
    if method in ("bn", "mbn", "brn", "mabn", "l1", "range") and "norm_batch_size" not in options
]


@st.composite
def histories(draw: st.DrawFn, cases: list[str]) -> dict[str, Any]:
    """A case, a number of steps, and what comes in them."""
    dims = draw(st.integers(0, 3))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=dims, max_size=dims)))
    return {
        "case": draw(st.sampled_from(cases)),
        "shape": shape,
        "batches": draw(st.lists(st.integers(1, 7), min_size=1, max_size=24)),
        "seed": draw(st.integers(0, 2**31)),
        "scale": 10.0 ** draw(st.integers(-3, 3)),
        "offset": draw(st.sampled_from([0.0, 1.0, 30.0])),
        "last": draw(st.booleans()),
        "fused": draw(st.booleans()),
    }


def inputs(history: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(history["seed"])
    found = []
    for size in history["batches"]:
        shape = (size, CHANNELS, *history["shape"])
        x, dy = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
        x = history["scale"] * (x + history["offset"])
        if history["last"] and len(shape) in LAST:
            x = x.contiguous(memory_format=LAST[len(shape)])
        found.append((x, dy))
    return found


def compare_with_the_reference(history: dict[str, Any]) -> None:
    torch.manual_seed(history["seed"])
    shape = history["shape"]
    # A normalization of two nearly equal values magnifies rounding without a bound; eps is one.
    eps = 1e-2 * history["scale"] ** 2
    layer, truth = pair(history["case"], max(len(shape), 1), torch.float64, eps)
    if isinstance(truth, reference.SampledBatchNorm):
        truth.spatial = shape
    use_fused("auto" if history["fused"] else "never")
    try:
        for step, (x, dy) in enumerate(inputs(history)):
            if isinstance(truth, reference.MomentumBatchNorm):
                for one in (layer, truth):
                    one.set_progress(min(step // 5 + 1, 5), 5)
            x.requires_grad_()
            layer.zero_grad()
            y = layer(x)
            y.backward(dy)
            expected, backward = truth.forward(flat(x))
            dx, dw, db = backward(flat(dy))
            unit = torch.float64
            check(y, expected.reshape(x.shape), unit, f"output, step {step}")
            scaled = history["scale"] * x.grad, history["scale"] * dx.reshape(x.shape)
            check(*scaled, unit, f"input gradient, step {step}")
            check(layer.weight.grad, dw, unit, f"weight gradient, step {step}")
            check(layer.bias.grad, db, unit, f"bias gradient, step {step}")
        for name, value in truth.state().items():
            check(layer.state_dict()[name], value, unit, name)
    finally:
        use_fused("auto")


@given(histories(list(CASES)))
@QUICK
def test_any_history_is_the_reference_s(history: dict[str, Any]) -> None:
    compare_with_the_reference(history)


@pytest.mark.slow
@given(histories(list(CASES)))
@THOUSANDS
def test_thousands_of_histories_are_the_reference_s(history: dict[str, Any]) -> None:
    compare_with_the_reference(history)


# --- invariances -------------------------------------------------------------------------


def after(history: dict[str, Any]) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A layer with a history, and the batch that comes next."""
    torch.manual_seed(history["seed"])
    eps = 1e-2 * history["scale"] ** 2
    layer, _ = pair(history["case"], max(len(history["shape"]), 1), torch.float64, eps)
    *past, (x, dy) = inputs(history)
    for before, above in past:
        layer(before.requires_grad_()).backward(above)
    layer.zero_grad()
    return layer, x, dy


def step(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients and state of a copy of the layer."""
    layer = copy.deepcopy(layer)
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    state = [t for name, t in sorted(layer.state_dict().items()) if t.is_floating_point()]
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *state]


def agree(found: list[Tensor], expected: list[Tensor], *, rows: Callable[[Tensor], Tensor]) -> None:
    """Outputs and input gradients agree after `rows`, all else as it is."""
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        b = rows(b) if number < 2 else b
        scale = float(b.abs().max().clamp_min(1e-300))
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-7, atol=1e-9)


@pytest.mark.exhaustive
@given(histories(ALIKE))
@QUICK
def test_the_order_of_examples_does_not_matter_in_any_setting(history: dict[str, Any]) -> None:
    layer, x, dy = after(history)
    order = torch.randperm(len(x))
    expected = step(layer, x, dy)
    agree(step(layer, x[order], dy[order]), expected, rows=lambda t: t[order])


@pytest.mark.exhaustive
@given(histories(["ghost 2", "bgn 3"]))
@QUICK
def test_the_order_of_groups_does_not_matter(history: dict[str, Any]) -> None:
    """Groups of two examples change places; so do the examples within one."""
    layer, x, dy = after(history)
    assume(len(x) % 2 == 0)
    order = torch.randperm(len(x) // 2).repeat_interleave(2) * 2
    order += torch.stack([torch.randperm(2) for _ in range(len(x) // 2)]).reshape(-1)
    expected = step(layer, x, dy)
    agree(step(layer, x[order], dy[order]), expected, rows=lambda t: t[order])


@pytest.mark.exhaustive
@given(histories([name for name in ALIKE if "mbn" not in name and "cumulative" not in name]))
@QUICK
def test_a_channel_does_not_see_the_others(history: dict[str, Any]) -> None:
    layer, x, dy = after(history)
    assume(x.numel() > x.shape[1])
    changed = x.clone()
    changed[:, 1:] = torch.randn_like(changed[:, 1:]) * 3 * history["scale"]
    one, other = step(layer, x, dy), step(layer, changed, dy)
    for a, b in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(a[:, 0], b[:, 0])


@pytest.mark.exhaustive
@given(histories(["bn", "ghost 2", "bgn 3"]), st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
@QUICK
def test_scale_and_shift_of_the_input_do_not_matter(
    history: dict[str, Any], scale: float, shift: float
) -> None:
    """With eps in the same proportion."""
    layer, x, _ = after(history)
    assume(x.numel() // x.shape[1] > 2)
    moved = copy.deepcopy(layer)
    moved.eps = layer.eps * scale**2
    # A group of one value falls back on running statistics, which are of another scale.
    assume(x[0, 0].numel() > 1)
    y, other = layer(x), moved(x * scale + shift * history["scale"])
    torch.testing.assert_close(y, other, rtol=1e-6, atol=1e-6)


@pytest.mark.exhaustive
@given(histories(["bn", "bn cumulative", "brn", "brn smooth"]), st.integers(1, 4))
@QUICK
def test_a_cut_batch_is_successive_batches(history: dict[str, Any], size: int) -> None:
    """norm_batch_size=k is k examples at a time, in outputs, gradients and state."""
    layer, x, dy = after(history)
    cut = copy.deepcopy(layer)
    cut.norm_batch_size = size
    x = x.detach()
    whole = x.clone().requires_grad_()
    y = cut(whole)
    y.backward(dy)
    pieces, grads = [], []
    for part, above in zip(x.split(size), dy.split(size), strict=True):
        part = part.clone().requires_grad_()
        pieces.append(layer(part))
        pieces[-1].backward(above)
        grads.append(part.grad)
    torch.testing.assert_close(y.detach(), torch.cat(pieces).detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(whole.grad, torch.cat(grads), rtol=1e-7, atol=1e-7)
    for name, one in cut.state_dict().items():
        torch.testing.assert_close(one, layer.state_dict()[name], msg=name)
