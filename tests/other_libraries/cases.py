"""What other libraries' layers compute, where they are right, as vectors to be compared with.

`vectors.pt` has, for each case, the input of each step, the gradient of its output, and what the
other library's own code gave: outputs, gradients and running statistics. It was made by

    python -m tests.other_libraries FOLDER

where FOLDER has the packages as `pip install --no-deps --target FOLDER` of these versions leaves
them: torchrl 0.14.1, sb3-contrib 2.9.2, fvcore 0.1.5.post20221221, torch-geometric 2.8.1, mosaicml
0.32.1. Only the one file that has the layer is loaded; what else it imports, and the layer does not
use, is replaced by empty names. Nothing of this library takes part. All is float64, seed 0.

A case is compared where the other library does what it says:

- torchrl, batch renormalization: inputs (N, C), whose variance it corrects by N alone, and fewer
  steps than twice the warm-up, after which it scales r and d by 2 and more.
- sb3-contrib, batch renormalization: running statistics and evaluation. In training it normalizes
  by the unbiased variance.
- fvcore, precise batch norm: the mean, and the variance but for Bessel's correction.
- torch-geometric, batch norm: outputs, gradients, running statistics, a single row too.
- composer, ghost batch norm: outputs and gradients. It moves running statistics once a chunk.
"""

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VECTORS = Path(__file__).resolve().parent / "vectors.pt"
FILES = {
    "torchrl": "torchrl/modules/models/batchrenorm.py",
    "sb3_contrib": "sb3_contrib/common/torch_layers.py",
    "fvcore": "fvcore/nn/precise_bn.py",
    "torch_geometric": "torch_geometric/nn/norm/batch_norm.py",
    "composer": "composer/algorithms/ghost_batchnorm/ghost_batchnorm.py",
}
UNUSED = {  # names that a file imports and its layer does not use
    "torch_geometric.nn.aggr.fused": ("FusedAggregation",),
    "composer.core": ("Algorithm", "Event", "State"),
    "composer.loggers": ("Logger",),
    "composer.utils": ("module_surgery",),
    "tqdm": (),
}
Vectors = dict[str, Tensor]


def load(folder: Path, package: str) -> types.ModuleType:
    """The file of a package that has the layer."""
    replaced = {name: sys.modules.get(name) for name in UNUSED}
    for name, unused in UNUSED.items():
        stub = types.ModuleType(name)
        for one in unused:
            setattr(stub, one, type(one, (), {}))
        stub.tqdm = lambda batches, **_: batches  # type: ignore[attr-defined]
        sys.modules[name] = stub
    try:
        spec = importlib.util.spec_from_file_location(f"peer_{package}", folder / FILES[package])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, before in replaced.items():
            sys.modules.pop(name)
            if before is not None:
                sys.modules[name] = before
    return module


def batches(steps: int, *shape: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs that drift, and gradients of the outputs."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        channel = torch.arange(shape[1]).view(1, -1, *(1,) * (len(shape) - 2))
        dy = torch.randn(shape, dtype=torch.float64, generator=generator)
        yield x * (1 + 0.3 * channel + 0.2 * step) + 0.5 * channel - 0.1 * step, dy


def steps_of(layer: nn.Module, given: Iterator[tuple[Tensor, Tensor]]) -> Vectors:
    """Input, output and gradients of each step of training."""
    found: Vectors = {}
    for number, (x, dy) in enumerate(given):
        x = x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None
        step = {"x": x, "dy": dy, "y": y, "dx": x.grad}
        found |= {f"{number} {key}": value.detach().clone() for key, value in step.items()}
    return found


def evaluated(layer: nn.Module, x: Tensor) -> Tensor:
    """The output in evaluation mode."""
    y: Tensor = layer.eval()(x)
    return y.detach()


def torchrl(peer: Any) -> Vectors:
    layer = peer.BatchRenorm1d(4, momentum=0.1, warmup_steps=4, max_r=1.2, max_d=0.3).double()
    found = steps_of(layer, batches(7, 5, 4))
    rows = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return {**found, **rows, "evaluated": evaluated(layer, found["0 x"])}


def sb3_contrib(peer: Any) -> Vectors:
    layer = peer.BatchRenorm1d(4, momentum=0.1, eps=1e-3, warmup_steps=2).double()
    found = {key: value for key, value in steps_of(layer, batches(5, 6, 4)).items() if "x" in key}
    found = {key: value for key, value in found.items() if "dx" not in key}
    rows = {"running_mean": layer.ra_mean, "running_var": layer.ra_var}
    return {**found, **rows, "evaluated": evaluated(layer, found["0 x"])}


def fvcore(peer: Any) -> Vectors:
    network = precise_network()
    data = [x for x, _ in batches(4, 5, 3, 6, 6)]
    peer.update_bn_stats(network, data, num_iters=4)
    found = {f"{number} x": x for number, x in enumerate(data)}
    rows = {key: value for key, value in network.state_dict().items() if "running" in key}
    return {**found, **rows}


def precise_network() -> nn.Module:
    """Two batch norms, with weights that no random number decides."""
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU()
    ).double()
    weight: Tensor = network[1].weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight).sin())
    return network


def torch_geometric(peer: Any) -> Vectors:
    layer = peer.BatchNorm(4, allow_single_element=True).double()

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for number, (x, dy) in enumerate(batches(5, 6, 4)):
            yield (x[:1], dy[:1]) if number == 3 else (x, dy)

    found = steps_of(layer, rows())
    module = layer.module
    kept = {"running_mean": module.running_mean, "running_var": module.running_var}
    return {**found, **kept, "evaluated": evaluated(layer, found["0 x"])}


def composer(peer: Any) -> Vectors:
    norm = nn.BatchNorm2d(4).double()
    return steps_of(peer.GhostBatchNorm2d(norm, ghost_batch_size=3), batches(3, 9, 4, 2, 3))


CASES: dict[str, Callable[[Any], Vectors]] = {
    "torchrl": torchrl,
    "sb3_contrib": sb3_contrib,
    "fvcore": fvcore,
    "torch_geometric": torch_geometric,
    "composer": composer,
}
