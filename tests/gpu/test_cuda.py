"""On a CUDA device: the equations, the formats, and steps that never wait for the device."""

import copy

import pytest
import torch

import anybatch
from method_cases import NAMES, batch, make, step
from reference_cases import CASES, SHAPES, check, drifting, flat, pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(), (3, 2)], ids=["(N, C)", "(N, C, H, W)"])
@pytest.mark.parametrize("last", [False, True])
def test_a_layer_on_a_device_is_the_papers_equations(
    case: str, shape: tuple[int, ...], last: bool
) -> None:
    layer, truth = pair(case, max(len(shape), 1), torch.float64)
    layer = layer.cuda()
    for number in range(24):
        if case.startswith("mbn") and number % 10 == 0:
            layer.set_progress(number // 10 + 1, 5)
            truth.set_progress(number // 10 + 1, 5)
        x = drifting(number, shape)
        dy = torch.randn_like(x)
        expected, backward = truth.forward(flat(x))
        dx, dw, _ = backward(flat(dy))
        inner = x.cuda()
        if last and shape:
            inner = inner.contiguous(memory_format=torch.channels_last)
        inner.requires_grad_()
        layer.zero_grad()
        y = layer(inner)
        y.backward(dy.cuda())
        check(y.cpu(), expected.reshape(x.shape), torch.float64, f"output, step {number}")
        check(inner.grad.cpu(), dx.reshape(x.shape), torch.float64, f"gradient, step {number}")
        check(layer.weight.grad.cpu(), dw, torch.float64, f"weight gradient, step {number}")
        state = layer.state_dict()
        for name, value in truth.state().items():
            check(state[name].cpu(), value, torch.float64, f"{name}, step {number}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_type_runs(name: str, dtype: torch.dtype, shape: str) -> None:
    layer = make(name, dims=max(len(SHAPES[shape]), 1)).cuda()
    for _ in range(8):
        x = torch.randn(4, 6, *SHAPES[shape]).cuda().to(dtype)
        y, grad = step(layer, x)
        assert y.dtype == grad.dtype == dtype
        assert y.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_a_step_never_waits_for_the_device(name: str, norm_batch_size: int | None) -> None:
    layer = make(name, norm_batch_size=norm_batch_size).cuda()
    x, dy = batch(5).cuda().requires_grad_(), torch.randn(5, 6, 4, 3).cuda()
    layer(x).backward(dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_moving_between_devices(name: str) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 3), make(name)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y = net(torch.randn(2, 6, 6, 5).cuda())
    assert y.dtype == torch.bfloat16
    other = copy.deepcopy(net).cpu()
    assert {tensor.device.type for tensor in other.state_dict().values()} == {"cpu"}
    anybatch.freeze(net)
    assert net(torch.randn(2, 6, 6, 5).cuda()).isfinite().all()
