"""Time of inference relative to the network with torch.nn.BatchNorm.

A network with each method, the same after `to_batchnorm` and after `fold`, and the network without
any norm at all; in turn in one process, medians of the ratios by round.

    python benchmarks/inference.py [--network resnet20] [--inputs 3x32x32] [--batch-sizes 1 32]
        [--methods bn mabn ...] [--rounds 15] [--device cpu] [--threads 2] [--csv inference.csv]
"""

import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from harness import arguments, finish, reason, sizes, start
from torch import Tensor, nn

import anybatch
from anybatch.tools.measurements import Measurement, Setting, timed
from anybatch.tools.network_factory import Factory, example_shape, factory
from anybatch.tools.timing import interleaved

BASELINE = "nn.BatchNorm"
METHOD_NAMES = ("bn", "mbn", "mabn", "brn", "cbn", "fs", "gn", "bgn")
BLOCK = 0.02  # seconds
# What has no per-channel affine map at inference stays as it is.
CANNOT = ("gn", "bgn")


def trained(make: Factory, method: str | None, x: Tensor) -> nn.Module:
    """A network after one batch, in evaluation mode."""
    torch.manual_seed(0)
    model = make()
    if method is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = anybatch.convert(model, method, batch_size=len(x), example_inputs=x)
    model.train()(torch.cat([x, x]))  # batch norm of one value has no variance
    return model.eval()


def without_norms(make: Factory) -> nn.Module:
    """The network without its norms."""
    model = make().eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._NormBase):
                setattr(module, name, nn.Identity())
    return model


def networks(
    make: Factory, methods: Sequence[str], x: Tensor
) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network to time, by name; the baseline first."""
    found: dict[str, Callable[[], nn.Module]] = {BASELINE: lambda: trained(make, None, x)}
    for method in methods:
        found[method] = lambda method=method: trained(make, method, x)
        if method not in CANNOT:
            name = f"{method}, to_batchnorm"
            found[name] = lambda method=method: anybatch.to_batchnorm(trained(make, method, x))
            name = f"{method}, fold"
            found[name] = lambda method=method: anybatch.fold(trained(make, method, x), x)
    found[f"{BASELINE}, fold"] = lambda: anybatch.fold(trained(make, None, x), x)
    found["no norm"] = lambda: without_norms(make)
    return found


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--inputs", help="shape of an example, as in 3x224x224")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--methods", nargs="+", default=METHOD_NAMES)
    given = parser.parse_args(typed)
    example = sizes(given.inputs) if given.inputs else example_shape(given.network)
    if example is None:
        parser.error(f"inputs=None: say what {given.network!r} takes, as in --inputs 3x224x224")
    budget, make = start(given), factory(given.network, example)
    rows: list[Measurement] = []
    failed: dict[str, str] = {}
    for size in given.batch_sizes:
        if budget.over(f"batch {size}"):
            continue
        x, calls = torch.randn(size, *example), {}
        for name, build in networks(make, given.methods, x).items():
            try:
                calls[name] = call_of(build().to(given.device), x.to(given.device))
            except Exception as error:  # one that cannot run must not stop the others
                failed[f"{name}, batch {size}"] = reason(error)
        times = interleaved(calls, given.rounds, device=given.device, block_seconds=BLOCK)
        rows += timed(Setting("inference", f"{given.network}, batch {size}"), times, BASELINE)
    return finish(rows, failed, given)


def call_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward without gradients."""

    def call() -> None:
        with torch.no_grad():
            model(x)

    call()
    return call


if __name__ == "__main__":
    sys.exit(main())
