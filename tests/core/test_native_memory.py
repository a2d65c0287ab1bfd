"""Compiled kernels get addresses of dense memory of the right size and type, or nothing."""

import pytest
import torch
from torch import Tensor, nn

from anybatch.backends.native_memory import address_of, check_device_memory
from method_cases import batch, make


def _freed() -> Tensor:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    return tensor


def _shrunk() -> Tensor:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(16)
    return tensor


BAD = {
    "meta": lambda: torch.ones(8, device="meta"),
    "empty": lambda: torch.empty(0),
    "too small": lambda: torch.ones(7),
    "of another type": lambda: torch.ones(8, dtype=torch.float64),
    "freed": _freed,
    "shrunk": _shrunk,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_tensor_without_such_memory_is_refused(kind: str) -> None:
    with pytest.raises(RuntimeError, match="a kernel needs 8 values of torch.float32"):
        address_of(BAD[kind](), torch.float32, 8)


@pytest.mark.parametrize("kind", ["freed", "shrunk", "meta"])
def test_device_kernels_are_given_memory_of_the_device(kind: str) -> None:
    check_device_memory(torch.device("cpu"), torch.ones(2), None)
    with pytest.raises(RuntimeError, match="in cpu memory"):
        check_device_memory(torch.device("cpu"), BAD[kind]())


def _state_of(layer: nn.Module) -> dict[str, Tensor]:
    found = dict(layer.named_buffers())
    return {**dict(layer.named_parameters()), **found, **layer.method_state}  # type: ignore[dict-item]


STATE = [
    (name, key)
    for name in ("bn", "mbn", "mabn", "brn", "bs", "l1")
    for key in _state_of(make(name))
    if key not in ("seed", "draw", "index", "batch_size", "average_weight")
]


@pytest.mark.parametrize(("name", "key"), STATE)
def test_no_layer_writes_into_state_that_was_freed(name: str, key: str) -> None:
    pytest.importorskip("numba")
    if name == "l1" and torch.__version__ < "2.7":
        pytest.skip("torch's own operators read memory that was freed")
    layer, x = make(name), batch(4).requires_grad_()
    layer(x).sum().backward()
    layer(x).sum().backward()
    freed = _state_of(layer)[key]
    size = freed.untyped_storage().nbytes()
    y = layer(x)
    freed.untyped_storage().resize_(0)
    if not key.startswith("backward") and key != "bias":
        with pytest.raises(RuntimeError):
            layer(x)
    if key.startswith("backward") or key == "weight":
        with pytest.raises(RuntimeError):
            y.sum().backward()
    freed.untyped_storage().resize_(size)


@pytest.mark.parametrize("which", ["x", "dy"])
@pytest.mark.parametrize("name", ["bn", "mabn", "bs", "range"])
def test_no_layer_reads_a_batch_that_was_freed(name: str, which: str) -> None:
    pytest.importorskip("numba")
    layer, x = make(name), batch(4)
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    y, dy = layer(given), torch.ones_like(x)
    (given if which == "x" else dy).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        y.backward(dy)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        layer(x)
