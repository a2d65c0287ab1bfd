"""The compiled loops under a mask, in accumulated steps and with a limit for outliers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.backends import use_fused
from anybatch.core.dispatch import choices_made
from method_cases import make
from tolerances import tolerance

pytest.importorskip("numba")

STEPS = 9
SCOPES = ("mask", "steps", "limit", "mask, steps, limit")


@contextmanager
def by_torch() -> Iterator[None]:
    """A context in which torch's operators serve every batch."""
    use_fused("never")
    try:
        yield
    finally:
        use_fused("auto")


def check_close(one: Tensor, other: Tensor, what: str) -> None:
    """Fail where two results differ by more than rounding."""
    apart = float((one.double() - other.double()).abs().max())
    assert apart <= tolerance(torch.float32, other), what


def batch(step: int, scope: str, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A batch, the gradient of its output, and a mask, beyond which the batch is not finite."""
    torch.manual_seed(step)
    x, dy = torch.randn(5, 6, 4, 7) * (1 + 0.1 * step) + 0.3, torch.randn(5, 6, 4, 7)
    mask = torch.rand(5, 1, 4, 7) < 0.7
    if "limit" in scope:
        x[:, 1] *= 40 if step % 3 == 2 else 1
        x[:, 0] += 30 if step > 5 else 0
    form = torch.channels_last if last else torch.contiguous_format
    return (x.contiguous(memory_format=form), dy.contiguous(memory_format=form), mask)


def trained(name: str, scope: str, last: bool) -> tuple[list[Tensor], dict[str, Tensor], set[str]]:
    """Outputs and gradients of some steps, the state behind them, and the backends that served."""
    torch.manual_seed(7)
    layer = make(name, 6)
    if "limit" in scope:
        layer.outlier_limit = 4.0
        layer.method_state["outliers"] = torch.zeros(6).long()
        layer.num_batches_tracked.fill_(18)
    if "steps" in scope:
        anybatch.accumulate(layer, 3)
    found: list[Tensor] = []
    with choices_made() as choices:
        for step in range(STEPS):
            x, dy, mask = batch(step, scope, last)
            x.requires_grad_()
            y = layer(x, mask) if "mask" in scope else layer(x)
            found += [y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)]
    return found, layer.state_dict(), {backend for backend, _ in choices}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost", "bgn"])
def test_loops_give_what_torch_operators_give_whatever_contributes(
    name: str, last: bool, scope: str
) -> None:
    ours, state, backends = trained(name, scope, last)
    grouped = name in ("ghost", "bgn") and "steps" in scope
    assert backends == {"aten" if grouped else "numba"}
    with by_torch():
        theirs, expected, backends = trained(name, scope, last)
    assert backends == {"aten"}
    for at, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        check_close(one, other, f"step {at // 4}, tensor {at % 4}")
    for key, value in expected.items():
        check_close(state[key], value, key)


def test_loops_never_read_what_a_mask_leaves_out() -> None:
    for last in (False, True):
        layer = make("bn", 6)
        x, _, mask = batch(0, "mask", last)
        layer(x.masked_fill(~mask, torch.nan), mask)
        expected = x.movedim(1, -1)[mask[:, 0]]
        torch.testing.assert_close(layer.running_mean, 0.1 * expected.mean(0))


def test_a_mask_of_one_value_leaves_a_batch_to_torch_operators() -> None:
    layer, mask = make("bn", 6), torch.zeros(5, 1, 4, 7, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    with choices_made() as choices:
        layer(batch(0, "mask", False)[0], mask)
    assert choices[-1][0] == "aten"
    assert "too few valid values" in choices[-1][1]["numba"]


def test_a_relu_in_the_pass_of_a_masked_norm_has_the_gradient_of_one_behind_it() -> None:
    x, dy, mask = batch(0, "mask", False)
    found = []
    for inside in (True, False):
        torch.manual_seed(7)
        layer, given = make("bn", 6), x.clone().requires_grad_()
        y = layer(given, mask, activation="relu") if inside else nn.ReLU()(layer(given, mask))
        found.append(torch.autograd.grad(y, given, dy)[0])
    torch.testing.assert_close(*found)
