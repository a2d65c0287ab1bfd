"""Time of a training step with each method, relative to the network with torch.nn.BatchNorm.

Forward, backward and SGD with momentum, in turn in one process, medians of the ratios by round.
The networks are those of `anybatch bench`, with which this measures: a name of its own, or
module:factory. With ``--cbn``, the ways of cross-iteration batch norm. With
``--operators``, graphs of ``--mode compiled`` have our kernels as operators.

    python benchmarks/training_step.py [--networks resnet8 resnet20] [--batch-sizes 2 32]
        [--inputs 3x32x32] [--methods bn mabn ...] [--precision float32] [--mode eager graph]
        [--operators] [--channels-last] [--cbn] [--norm-batch-size 2] [--rounds 15]
        [--device cpu] [--threads 2] [--csv steps.csv]
"""

import sys
from collections.abc import Sequence

from harness import DTYPES, arguments, finish, sizes, start

from anybatch.backends import use_fused
from anybatch.tools.bench import MODES, Bench, Variant, costs
from anybatch.tools.compare import DEFAULT_METHODS
from anybatch.tools.network_factory import example_shape, factory

# What cross-iteration batch norm can leave out, from what `convert` sets to what its paper has.
WAYS = {
    "cbn": (),
    "cbn, all positions": (("gradient_sample", None),),
    "cbn, the paper's": (
        ("gradient_sample", None),
        ("backward_stats", "batch"),
        ("running_stats", "batch"),
    ),
    "cbn, naive": (("order", 0),),
}


def main(typed: Sequence[str] | None = None, questions: tuple[str, ...] = ("step",)) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--networks", nargs="+", default=["resnet8", "resnet20"])
    parser.add_argument("--inputs", help="shape of an example, as in 3x224x224")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 32])
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS)
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=MODES)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--norm-batch-size", type=int, help="cut each batch into parts of so many")
    parser.add_argument("--block", type=float, default=0.05, help="seconds of a block")
    parser.add_argument("--cbn", action="store_true")
    parser.add_argument("--operators", action="store_true")
    given = parser.parse_args(typed)
    if given.operators:
        use_fused("always")
    cut = () if given.norm_batch_size is None else (("norm_batch_size", given.norm_batch_size),)
    variants = {name: Variant(name, cut) for name in given.methods}
    if given.cbn:
        variants = {"bn": Variant("bn")}
        variants |= {name: Variant("cbn", options) for name, options in WAYS.items()}
    budget, rows, failed = start(given), [], {}
    for network in given.networks:
        example = sizes(given.inputs) if given.inputs else example_shape(network)
        if example is None:
            parser.error(f"inputs=None: say what {network!r} takes, as in --inputs 3x224x224")
        for size in given.batch_sizes:
            for precision in given.precision:
                for mode in given.mode:
                    bench = Bench(
                        network,
                        factory(network, example),
                        ((size, *example),),
                        device=given.device,
                        precision=precision,
                        channels_last=given.channels_last,
                        mode=mode,
                        rounds=given.rounds,
                        block_seconds=given.block,
                        questions=questions,
                    )
                    where = f"{network}, batch {size}, {precision}, {mode}"
                    if not budget.over(where):
                        found = costs(bench, variants)
                        rows += found.rows
                        failed |= {f"{n} in {where}": why for n, why in found.failed.items()}
    return finish(rows, failed, given)


if __name__ == "__main__":
    sys.exit(main())
