"""Layers take subclasses of Tensor and return what torch's batch norm returns for them."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.evaluation.evalnorm import eval_norm
from method_cases import NAMES, batch, make, same, state


class Image(Tensor):
    """A subclass with metadata, which torch's functions hand on."""

    note: str

    @staticmethod
    def of(x: Tensor, note: str = "") -> "Image":
        made = x.as_subclass(Image)
        made.note = note
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            first = next((a for a in args if isinstance(a, cls)), None)
            result.note = getattr(first, "note", "")
        return result


class Box(Tensor):
    """A subclass that functions unwrap, as torchvision's tv_tensors do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _both(name: str) -> tuple[Any, Any]:
    layer = make(name)
    return layer, copy.deepcopy(layer)


def _step(layer: Any, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """A training step with an in-place activation after the norm."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf if type(x) is type(leaf) else leaf.as_subclass(type(x)), **options)
    F.relu(y, inplace=True)
    y.pow(2).sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("kind", [Image, Box])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_trains_on_a_subclass_as_on_the_plain_tensor(name: str, kind: Any) -> None:
    plain, layer = _both(name)
    torch_norm = nn.BatchNorm2d(6)
    for _ in range(4):
        x = batch(4)
        wanted, slope = _step(plain, x)
        y, got = _step(layer, x.as_subclass(kind))
        assert type(y) is type(torch_norm(x.as_subclass(kind)))
        assert torch.equal(y.as_subclass(Tensor), wanted)
        assert torch.equal(got.as_subclass(Tensor), slope)
    assert same(state(layer), state(plain))
    plain.eval(), layer.eval()
    z = layer(x.as_subclass(kind))
    assert type(z) is type(torch_norm.eval()(x.as_subclass(kind)))
    assert torch.equal(z.as_subclass(Tensor), plain(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_metadata_reach_the_output(name: str, training: bool) -> None:
    y = make(name).train(training)(Image.of(batch(4), "scan 7"))
    assert type(y) is Image
    assert y.note == "scan 7"


@pytest.mark.parametrize("name", NAMES)
def test_mask_and_residual_may_be_subclasses(name: str) -> None:
    x, residual, mask = batch(4), batch(4), torch.tensor([True, True, True, False])
    plain, layer = _both(name)
    wanted = plain(x, mask, residual=residual, activation="relu")
    one = layer(
        Image.of(x, "a"), Image.of(mask), residual=Image.of(residual, "b"), activation="relu"
    )
    assert type(one) is Image
    assert one.note == "a"
    assert torch.equal(one.as_subclass(Tensor), wanted)
    alone = layer(x, Image.of(mask))
    assert type(alone) is Tensor  # a mask says nothing about the output's type
    added = layer(x, residual=Image.of(residual, "b"), activation="relu")
    assert type(added) is Image  # as x + residual is
    with anybatch.masked(layer, Image.of(mask)):
        assert type(layer(x)) is Tensor


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_as_input_gets_its_gradient(name: str) -> None:
    plain, layer = _both(name)
    x = batch(4)
    wanted, slope = _step(plain, x)
    given = nn.Parameter(x)
    y = layer(given)
    assert type(y) is Tensor
    F.relu(y, inplace=True)
    y.pow(2).sum().backward()
    torch.testing.assert_close(y.detach(), wanted)
    torch.testing.assert_close(given.grad, slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_without_torch_functions_are_tensors(name: str) -> None:
    plain, layer = _both(name)
    x = batch(4)
    with torch._C.DisableTorchFunctionSubclass():
        y = layer(Image.of(x))
    assert torch.allclose(y.as_subclass(Tensor), plain(x), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_a_subclass_do_not_change_the_output(name: str) -> None:
    plain, layer = _both(name)
    layer.weight = nn.Parameter(Image.of(layer.weight.detach(), "scale"))
    x = batch(4)
    y = layer(x)
    F.relu_(y)
    assert type(y) is Tensor
    torch.testing.assert_close(y, F.relu(plain(x)))


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("name", ["bn", "mabn"])
def test_a_compiled_layer_takes_a_subclass(name: str) -> None:
    plain, layer = _both(name)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU(inplace=True)), backend="eager")
    x = batch(4)
    y = compiled(Image.of(x))
    assert type(y) is Image
    torch.testing.assert_close(y.as_subclass(Tensor), F.relu(plain(x)))
    y.sum().backward()


@pytest.mark.parametrize("name", ["mabn", "cbn"])
def test_every_probe_takes_a_subclass(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    net = anybatch.convert(net, name)
    data = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    images = [Image.of(x, "scan") for x in data]
    head = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    target = torch.zeros(4, dtype=torch.long)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1])

    found = anybatch.diagnose(head, [(x, target) for x in images], loss=loss)
    plain = anybatch.diagnose(head, [(x, target) for x in data], loss=loss)
    assert found.layers == plain.layers
    pair = copy.deepcopy(head), head
    anybatch.recalibrate(pair[0], data)
    anybatch.recalibrate(pair[1], images)
    assert same(state(pair[0]), state(pair[1]))


def test_evalnorm_takes_a_subclass() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    data = [torch.randn(4, 3, 4, 4) for _ in range(3)]
    found = eval_norm(net, [Image.of(x) for x in data], batch_size=2)
    assert found == eval_norm(net, data, batch_size=2)


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # of torch 2.6, on a CPU
@pytest.mark.parametrize("name", NAMES)
def test_dtensors_are_normalized_where_torchs_layer_takes_them(name: str, gloo_alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    plain, layer = _both(name)
    layer = distribute_module(layer, mesh)
    x = batch(4)
    given = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
    y = layer(given)
    assert isinstance(y, DTensor)
    y.relu_()
    torch.testing.assert_close(y.to_local(), F.relu(plain(x)))
    y.pow(2).sum().backward()
    assert isinstance(given.grad, DTensor)


@pytest.fixture
def gloo_alone(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
