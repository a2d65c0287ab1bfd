"""Ways of calling a layer: each gives a step's results, to be compared with a plain call's.

A way gets a layer with some state, an input and a gradient of the output. It takes one step by
its own means and gives named tensors. `plain` takes the same step as one call and one backward.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import anybatch

Results = dict[str, Tensor]
Way = Callable[[nn.Module, Tensor, Tensor], Results]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def gather(layer: nn.Module, y: Tensor, x: Tensor | None = None) -> Results:
    """Output, gradients and state after a step."""
    found = {"output": y.detach()}
    if x is not None:
        assert x.grad is not None
        found["gradient of the input"] = x.grad
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
    return {**found, **state(layer)}


def state(layer: nn.Module) -> Results:
    """What a checkpoint holds beside parameters."""
    parameters = dict(layer.named_parameters())
    return {k: v.detach().clone() for k, v in layer.state_dict().items() if k not in parameters}


def plain(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """One call and one backward."""
    return through(layer, layer, x, dy)


def through(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """A step of a layer by something that calls it."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(x)
    y.backward(dy)
    return gather(layer, y, x)


def forward_alone(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """A call without backward, whose averages then stay."""
    return gather(layer, layer(x))


def no_grad(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    with torch.no_grad():
        return gather(layer, layer(x))


def inference_mode(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    with torch.inference_mode():
        y = layer(x)
    return gather(layer, y.clone())


def compiled(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    return through(run, layer, x, dy)


def exported(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    program = torch.export.export(layer, (x,), strict=False)
    return {"output": program.module()(x).detach()}


def traced(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """A graph; tracing is a call, which must not be a step too."""
    with anybatch.no_update():
        return {"output": make_fx(layer)(x)(x).detach()}


def fake(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    before = state(layer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, anybatch.no_update():
        given = mode.from_tensor(x).requires_grad_()
        y = layer(given)
        y.sum().backward()
        assert y.shape == dy.shape
        assert y.dtype == x.dtype
        assert given.grad is not None
        assert given.grad.shape == x.shape
    layer.zero_grad()
    assert all(torch.equal(value, before[key]) for key, value in state(layer).items())
    return plain(layer, x, dy)


def meta(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    kept = copy.deepcopy(layer.state_dict())
    empty = copy.deepcopy(layer).to("meta")
    given = x.to("meta").requires_grad_()
    y = empty(given)
    y.sum().backward()
    assert y.shape == dy.shape
    assert given.grad is not None
    assert given.grad.device.type == "meta"
    empty.zero_grad()
    empty.to_empty(device="cpu").load_state_dict(kept)
    return plain(empty, x, dy)


def functional(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return through(lambda x: functional_call(layer, tensors, (x,)), layer, x, dy)


def ensemble(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """One of three copies of the layer under `vmap`, each with its own tensors."""
    parameters, buffers = stack_module_state([layer] * 3)  # type: ignore[list-item]

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(layer, (parameters, buffers), (x,))  # type: ignore[no-any-return]

    y = vmap(call, (0, 0, None))(parameters, buffers, x)
    return {"output": y[1].detach(), **{name: rows[1].detach() for name, rows in buffers.items()}}


def forward_mode(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """A product with the Jacobian, paired with the gradient of the output."""
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    with anybatch.no_update():
        y, slope = jvp(layer, (x,), (direction,))
    return {"output": y.detach(), "a directional derivative": (slope * dy).sum().detach()}


def plain_forward_mode(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    found = plain(layer, x, dy)
    slope = (found["gradient of the input"] * direction).sum()
    return {"output": found["output"], "a directional derivative": slope}


def jacobian(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    with anybatch.no_update():
        table = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    slope = (table * dy.view(*dy.shape, *(1,) * x.dim())).flatten(0, x.dim() - 1).sum(0)
    return {"gradient of the input": slope}


def checkpointed(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    return through(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x, dy)


def checkpointed_reentrant(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    return through(lambda x: checkpoint(layer, x, use_reentrant=True), layer, x, dy)


def saved_elsewhere(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    with saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        return plain(layer, x, dy)


def autocast(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(layer.float(), x.float(), dy.float())


def channels_last(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    if x.dim() in LAST:
        last = x.contiguous(memory_format=LAST[x.dim()])
        found = plain(layer, last, dy)
        if isinstance(layer, _NormBase):  # a convolution of torch decides for itself
            assert found["output"].is_contiguous(memory_format=LAST[x.dim()])
        return found
    last = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not last.is_contiguous()
    return plain(layer, last, dy)


def deepcopied(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    return plain(copy.deepcopy(layer), x, dy)


def pickled(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    plain(torch.load(file, weights_only=False), x, dy)
    return plain(pickle.loads(pickle.dumps(layer)), x, dy)


def data_parallel(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    return through(nn.DataParallel(layer), layer, x, dy)


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    with TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def distributed(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    with one_process():
        return through(nn.parallel.DistributedDataParallel(layer), layer, x, dy)


def sharded(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    if torch.__version__ < "2.7":
        pytest.skip("it does not shard on a CPU")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    with one_process():
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        found = through(layer, layer, x, dy)
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}
    return whole


def two_forwards(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """Two calls, and one backward through both."""
    xs = [one.detach().clone().requires_grad_() for one in (x, x.flip(0) + 1)]
    ys = [layer(one) for one in xs]
    torch.autograd.backward(ys, [dy, 2 * dy])
    found = gather(layer, ys[0], xs[0])
    return {**found, "the second gradient": xs[1].grad, "the second output": ys[1].detach()}


def plain_two_forwards(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """The same by two calls of backward, the latest first as autograd goes."""
    xs = [one.detach().clone().requires_grad_() for one in (x, x.flip(0) + 1)]
    ys = [layer(one) for one in xs]
    ys[1].backward(2 * dy)
    ys[0].backward(dy)
    found = gather(layer, ys[0], xs[0])
    return {**found, "the second gradient": xs[1].grad, "the second output": ys[1].detach()}


def backward_twice(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy, retain_graph=True)
    first = x.grad.clone()
    y.backward(dy)
    return {**gather(layer, y, x), "the first gradient": first}


def plain_backward_twice(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    found = plain(layer, x, dy)
    first = found["gradient of the input"].clone()
    for name in found:
        if name.startswith("gradient"):
            found[name] = found[name] * 2
    return {**found, "the first gradient": first}


def hooked(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("before backward"))
    layer.register_full_backward_hook(lambda *_: calls.append("after backward"))
    found = plain(layer, x, dy)
    assert calls == ["before", "after", "before backward", "after backward"]
    return found


class Halved(nn.Module):
    """A parametrization: half of the parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


def without_parameters(found: Results) -> Results:
    """Results but for gradients of parameters, which a parametrization has under other names."""
    kept = {"output", "gradient of the input"}
    return {k: v for k, v in found.items() if k in kept or k.startswith("running")}


def parametrized(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    parametrize.register_parametrization(layer, "weight", Halved())
    found = without_parameters(plain(layer, x, dy))
    parametrize.remove_parametrizations(layer, "weight")
    return found


def pruned(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    prune.custom_from_mask(layer, "weight", pruning_mask(layer))
    return without_parameters(plain(layer, x, dy))


def plain_pruned(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    with torch.no_grad():
        layer.weight.mul_(pruning_mask(layer))  # type: ignore[operator, arg-type]
    return without_parameters(plain(layer, x, dy))


def pruning_mask(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (torch.arange(weight.numel()) % 3 > 0).view(weight.shape)


def spectral(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    torch.manual_seed(1)
    parametrizations.spectral_norm(layer)
    layer.parametrizations.weight.eval()  # type: ignore[union-attr]
    return without_parameters(plain(layer, x, dy))


def plain_spectral(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    torch.manual_seed(1)
    other = copy.deepcopy(layer)
    parametrizations.spectral_norm(other)
    other.parametrizations.weight.eval()  # type: ignore[union-attr]
    with torch.no_grad():
        layer.weight.copy_(other.weight)  # type: ignore[operator]
    return without_parameters(plain(layer, x, dy))


WAYS: dict[str, tuple[Way, Way]] = {  # and the plain way that gives the same
    "eager": (plain, plain),
    "`torch.no_grad`": (no_grad, forward_alone),
    "`torch.inference_mode`": (inference_mode, forward_alone),
    "`torch.compile`": (compiled, plain),
    "`torch.export`": (exported, plain),
    "`make_fx`": (traced, plain),
    "`FakeTensorMode`": (fake, plain),
    "the meta device": (meta, plain),
    "`functional_call`": (functional, plain),
    "`vmap` of an ensemble": (ensemble, plain),
    "`jvp`": (forward_mode, plain_forward_mode),
    "`jacobian`": (jacobian, plain),
    "`checkpoint`": (checkpointed, plain),
    "`checkpoint`, reentrant": (checkpointed_reentrant, plain),
    "hooks on saved tensors": (saved_elsewhere, plain),
    "`torch.autocast`": (autocast, plain),
    "channels last": (channels_last, plain),
    "`deepcopy`": (deepcopied, plain),
    "`pickle`": (pickled, plain),
    "`DataParallel` on a CPU": (data_parallel, plain),
    "`DistributedDataParallel`": (distributed, plain),
    "`fully_shard` (FSDP2)": (sharded, plain),
    "two forwards, one backward": (two_forwards, plain_two_forwards),
    "backward twice": (backward_twice, plain_backward_twice),
    "hooks on modules": (hooked, plain),
    "parametrizations": (parametrized, lambda *args: without_parameters(plain(*args))),
    "pruning": (pruned, plain_pruned),
    "spectral norm": (spectral, plain_spectral),
}
