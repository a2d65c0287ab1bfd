"""Time of a layer in its other modes, forward and backward, relative to the plain layer.

A mask, micro-batches of one step, statistics without outliers, halves of a batch, a ReLU in the
same pass: each against the same method without. The modes of one method and shape in turn in one
process, in another order each round; medians of the times, and of the ratios by round.

    python benchmarks/modes.py [--shapes 2x16x8x8 2x64x56x56 ...] [--format contiguous]
        [--precision float32] [--methods bn mabn brn] [--rounds 15] [--threads 2] [--csv modes.csv]

A process group takes processes, and is measured by `synchronized.py`; 16 bits relative to torch's
layer by `layers.py --precision`.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from harness import DTYPES, FORMATS, arguments, finish, reason, start
from torch import Tensor, nn

import anybatch
from anybatch.registry import METHODS
from anybatch.tools.measurements import Measurement, Setting, timed
from anybatch.tools.timing import interleaved
from layers import call_of, data, method_layer

SHAPES = ("2x16x8x8", "2x64x56x56", "32x64x56x56")
MICRO_BATCHES = 4
PLAIN = "plain"
Forward = Callable[[Tensor], Tensor]


def modes(method: str, x: Tensor) -> dict[str, tuple[nn.Module, Forward]]:
    """A layer of the method for each mode, and its forward; the plain one first."""
    batch, channels, *positions = x.shape
    valid = torch.rand(batch, *positions, device=x.device) < 0.75

    def layer(**options: object) -> nn.Module:
        return method_layer(method, batch, channels, **options).to(x.device)

    plain, masked, accumulated, relu = (layer() for _ in range(4))
    anybatch.accumulate(accumulated, MICRO_BATCHES)
    limited, halved = layer(outlier_limit=1e6), layer(norm_batch_size=batch // 2)
    return {
        PLAIN: (plain, plain),
        "a mask": (masked, lambda x: masked(x, valid)),
        f"{MICRO_BATCHES} micro-batches": (accumulated, accumulated),
        "outlier_limit": (limited, limited),
        "two halves": (halved, halved),
        "with a ReLU": (relu, lambda x: relu(x, activation="relu")),
    }


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where asked to."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--format", nargs="+", default=["contiguous"], choices=FORMATS)
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--methods", nargs="+", default=["bn", "mabn", "brn"], choices=METHODS)
    parser.add_argument("--block", type=float, default=0.005, help="seconds of a block")
    given = parser.parse_args(typed)
    budget, device = start(given), torch.device(given.device)
    rows: list[Measurement] = []
    failed: dict[str, str] = {}
    for precision in given.precision:
        for form in given.format:
            for shape in given.shapes:
                x, dy = data(shape, form, precision, device)
                for method in given.methods:
                    setting = Setting("way", f"{method} {shape}", form, precision)
                    where = f"{setting.case}, {form}, {precision}"
                    if budget.over(where):
                        continue
                    try:
                        calls = {
                            name: call_of(layer.train(), forward, x, dy)
                            for name, (layer, forward) in modes(method, x).items()
                        }
                        times = interleaved(
                            calls, given.rounds, device=device, block_seconds=given.block
                        )
                    except Exception as error:  # one that cannot run must not stop the others
                        failed[where] = reason(error)
                        continue
                    rows += timed(setting, times, PLAIN)
    return finish(rows, failed, given)


if __name__ == "__main__":
    sys.exit(main())
