"""Time of batch normalization sampling, relative to torch.nn.BatchNorm in the same process.

The layer alone, forward and backward, in both memory formats; then whole training steps of
ResNet-20 and ResNet-56 on 32x32 images at batch 128, also with the ReLU in the norm's own pass
(``fuse=True``). In turn, in another order each round, medians of the ratios by round.

    python benchmarks/sampling.py [--ratio 0.03125] [--rounds 21] [--threads 2] [--only layer step]
        [--channels-last] [--csv sampling.csv]
"""

import sys
from collections.abc import Sequence

import torch
from harness import FORMATS, arguments, finish, sizes, start
from torch import nn

import anybatch
from anybatch.tools.bench import Bench, Variant, costs
from anybatch.tools.measurements import Measurement, Setting, timed
from anybatch.tools.network_factory import example_shape, factory
from anybatch.tools.timing import Call, interleaved

SAMPLES = ("naive", "batch", "feature", "points")
SHAPES = ("32x64x56x56", "128x16x32x32")
NETWORKS = ("resnet20", "resnet56")
METHODS = ("ns", "bs", "fs", "points", "vdn")
BASELINE = "nn.BatchNorm2d"


def layer_rows(shape: str, form: str, rounds: int, ratio: float) -> list[Measurement]:
    """The layer alone with each sample.

    Args:
        shape: Of the input.
        form: Its memory format.
        rounds: Steps a layer.
        ratio: Of the sample.

    Returns:
        A row per layer.
    """
    x, dy = (torch.randn(sizes(shape)).contiguous(memory_format=FORMATS[form]) for _ in range(2))
    x.requires_grad_()
    norms: dict[str, nn.Module] = {BASELINE: nn.BatchNorm2d(x.shape[1])}
    for sample in SAMPLES:
        norms[sample] = anybatch.SampledBatchNorm2d(x.shape[1], sample=sample, ratio=ratio, seed=0)

    def call_of(norm: nn.Module) -> Call:
        def call() -> None:
            x.grad = None
            norm(x).backward(dy)

        return call

    calls = {name: call_of(norm) for name, norm in norms.items()}
    return timed(Setting("layer", shape, form), interleaved(calls, rounds), BASELINE)


def variants(ratio: float) -> dict[str, Variant]:
    """What is put into the networks, by name."""
    found = {"bn": Variant("bn")}
    for method in METHODS:
        found[method] = Variant(method, () if method == "vdn" else (("ratio", ratio),))
    fused = {
        f"{name}, fused": Variant(way.method, (*way.options, ("fuse", True)))
        for name, way in found.items()
        if name != "vdn"
    }
    return found | fused


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "", rounds=21)
    parser.add_argument("--ratio", type=float, default=1 / 32)
    parser.add_argument("--only", nargs="+", default=["layer", "step"], choices=["layer", "step"])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--channels-last", action="store_true", help="networks in that format")
    given = parser.parse_args(typed)
    budget, rows, failed = start(given), [], {}
    if "layer" in given.only:
        for shape in SHAPES:
            for form in FORMATS:
                rows += layer_rows(shape, form, given.rounds, given.ratio)
    for network in given.networks if "step" in given.only else ():
        if budget.over(network):
            continue
        example = example_shape(network)
        assert example is not None
        bench = Bench(
            network,
            factory(network, example),
            ((128, *example),),
            channels_last=given.channels_last,
            rounds=given.rounds,
            questions=("step",),
        )
        found = costs(bench, variants(given.ratio))
        rows += found.rows
        failed |= {f"{name} in {network}": why for name, why in found.failed.items()}
    return finish(rows, failed, given)


if __name__ == "__main__":
    sys.exit(main())
