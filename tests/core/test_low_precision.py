"""In bfloat16 and float16, a layer's error is at most twice that of torch's own layer.

Both errors are those against float64, of inputs and gradients that the low type holds exactly:
norm of the difference over norm of the value, over some steps. Parameters and statistics are
float32. What both keep in float32 is compared no closer than its own rounding.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.backends import use_fused
from method_cases import NAMES, batch, make

ROUNDING = 2.0**-22  # a few units in the last place of float32
STEPS = 4
LAST = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
Found = dict[str, list[Tensor]]


@pytest.fixture(autouse=True, params=["auto", "never"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """With kernels of the CPU, and with torch's operators."""
    use_fused(request.param)
    yield request.param
    use_fused("auto")


def run(layer: nn.Module, dtype: torch.dtype, given: list[tuple[Tensor, Tensor]]) -> Found:
    """Some steps on inputs of a type, then an evaluation."""
    found: Found = {}
    for x, dy in given:
        x = x.to(dtype).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy.to(dtype))
        assert y.dtype == x.grad.dtype == dtype
        step = {"output": y, "gradient of the input": x.grad}
        step |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
        step |= {name: row for name, row in layer.named_buffers() if row.is_floating_point()}
        for name, value in step.items():
            found.setdefault(name, []).append(value.detach().clone().double().flatten())
    y = layer.eval()(given[0][0].to(dtype))
    found["output in evaluation"] = [y.detach().double().flatten()]
    return found


def errors(layer: nn.Module, dtype: torch.dtype, last: torch.memory_format) -> dict[str, float]:
    """Relative errors of steps in a type, against those of a copy in float64."""
    torch.manual_seed(5)
    given = [
        tuple(
            t.to(dtype).contiguous(memory_format=last)
            for t in (batch(6, 6, 2) + 2, torch.randn(6, 6, 4, 3))
        )
        for _ in range(STEPS)
    ]
    exact = run(copy.deepcopy(layer).double(), torch.float64, given)
    low = run(layer, dtype, given)
    return {
        name: float((torch.cat(low[name]) - torch.cat(value)).norm() / torch.cat(value).norm())
        for name, value in exact.items()
        if torch.cat(value).any()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAST)
@pytest.mark.parametrize("name", [*NAMES, "RunningGroupNorm"])
def test_the_error_of_a_layer_is_at_most_twice_that_of_torch(
    name: str, layout: str, dtype: torch.dtype
) -> None:
    layer = anybatch.RunningGroupNorm(2, 6) if name == "RunningGroupNorm" else make(name)
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.weight.copy_(layer.weight)
        norm.bias.copy_(layer.bias)
    allowed = errors(norm, dtype, LAST[layout])
    found = errors(layer, dtype, LAST[layout])
    for what, error in found.items():
        assert error <= max(2 * allowed[what], ROUNDING), f"{what}: {error} beside {allowed[what]}"
