"""Time of this checkout relative to another one: layers alone, and small training steps.

    git worktree add ../base COMMIT
    python benchmarks/paired.py ../base [--only "step*"] [--rounds 21] [--block 0.05]
        [--threads 1] [--wall] [--first] [--limit 1.02]

Each checkout runs in a process of its own. Rounds alternate: a block of calls in one process, the
same block in the other, in the other order in the next round. So load on the machine meets both
alike. The ratio of a case is the median of the ratios by round, with its quartiles; below 1 this
checkout is faster. Times are CPU times of the process, which other work disturbs least; ``--wall``
takes the clock. ``--first`` measures the first batch of a method with an empty cache of compiled
kernels instead. The exit status is 1 if a ratio is above the limit.

Cases use public names only, so that they run on any checkout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

METHODS = ("bn", "mbn", "mabn", "brn", "ghost", "bgn", "ns", "bs", "fs", "points", "l1", "range")
SHAPES = ("2x64x56x56", "32x64x56x56", "2x16x8x8")
FORMATS = ("contiguous", "channels_last")
STEP_METHODS = ("bn", "mbn", "mabn", "brn", "ghost", "cbn")
BACKENDS = ("auto", "never")
FIRST = ("bn", "mabn", "brn", "cbn", "bs", "l1")


def case_names() -> list[str]:
    """All cases: ``layer mabn 2x64x56x56 channels_last auto`` or ``step bn 8 auto``."""
    layers = [
        f"layer {method} {shape} {form} auto"
        for method in METHODS
        for shape in SHAPES
        for form in FORMATS
    ]
    operators = [f"layer {method} 2x16x8x8 contiguous never" for method in METHODS]
    steps = [
        f"step {method} {depth} {choice}"
        for method in STEP_METHODS
        for depth in (8, 20)
        for choice in BACKENDS
    ]
    return [*steps, *layers, *operators]


# --- in a worker: only what any checkout of the package has ---------------------------------------


def _network(depth: int) -> Any:
    """A residual network for images of 32 x 32 pixels."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(after)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(after)
            self.relu = nn.ReLU()
            self.shortcut: nn.Module = nn.Identity()
            if before != after:
                conv = nn.Conv2d(before, after, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))

        def forward(self, x: Any) -> Any:
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for stage, after in enumerate((16, 32, 64)):
        for number in range((depth - 2) // 6):
            layers.append(Block(width, after, 2 if stage and not number else 1))
            width = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _layer_call(method: str, shape: str, form: str) -> Callable[[], None]:
    import torch

    import anybatch

    sizes = [int(size) for size in shape.split("x")]
    options: dict[str, Any] = {
        "mbn": {"batch_size": sizes[0], "ideal_batch_size": 4 * sizes[0]},
        "mabn": {"warmup_steps": 0, "renorm_warmup_steps": 0},
        "brn": {"warmup_steps": 0},
        "ghost": {"ghost_size": max(sizes[0] // 16, 1)},
        "bgn": {"num_groups": 16},
    }.get(method, {})
    if "seed" in anybatch.METHODS[method].options:
        options["seed"] = 0
    layer = anybatch.METHODS[method].build(sizes[1], 2, **options)
    layer.set_progress(2, 3)
    last = torch.channels_last if form == "channels_last" else torch.contiguous_format
    x, dy = (torch.randn(sizes).contiguous(memory_format=last) for _ in range(2))
    x.requires_grad_()

    def call() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    return call


def _step_call(method: str, depth: str) -> Callable[[], None]:
    import torch

    import anybatch

    network = anybatch.convert(_network(int(depth)), method, batch_size=2)
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, momentum=0.9)
    x, target = torch.randn(2, 3, 32, 32), torch.randint(10, (2,))

    def call() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), target).backward()
        optimizer.step()

    return call


def _make(case: str) -> Callable[[], None]:
    import torch

    from anybatch.backends import use_fused

    torch.manual_seed(0)
    kind, *told, choice = case.split()
    use_fused(choice)
    call = _layer_call(*told) if kind == "layer" else _step_call(*told)

    def chosen() -> None:
        use_fused(choice)
        call()

    return chosen


def work(threads: int, wall: bool) -> None:
    """Answer requests on standard input: a case and a number of calls; the seconds they took."""
    import torch

    torch.set_num_threads(threads)
    clock = time.perf_counter if wall else time.process_time
    calls: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        case, number = json.loads(line)
        try:
            if case not in calls:
                calls[case] = _make(case)
                for _ in range(3):
                    calls[case]()
            call = calls[case]
            start = clock()
            for _ in range(number):
                call()
            answer: Any = clock() - start
        except Exception as error:  # a method that one of the checkouts lacks
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


def first_batch(method: str) -> float:
    """CPU seconds of the first step with a layer, nothing compiled before."""
    import torch

    import anybatch

    torch.set_num_threads(1)
    options = {"seed": 0} if "seed" in anybatch.METHODS[method].options else {}
    if method == "cbn":
        conv = torch.nn.Conv2d(8, 8, 3)
        norm = anybatch.METHODS[method].build(8, 2)
        network = torch.nn.Sequential(conv, norm.bind(conv))
    else:
        network = torch.nn.Sequential(anybatch.METHODS[method].build(8, 2, **options))
    start = time.process_time()
    network(torch.randn(2, 8, 6, 6, requires_grad=True)).sum().backward()
    return time.process_time() - start


# --- the two of them ------------------------------------------------------------------------------


class Worker:
    """A process that runs cases on a checkout."""

    def __init__(self, checkout: Path, given: argparse.Namespace) -> None:
        told = ["--work", "--threads", str(given.threads), *(["--wall"] if given.wall else [])]
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(checkout), *told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(checkout, given.threads),
        )

    def ask(self, case: str, number: int) -> Any:
        """Seconds of so many calls, or why there are none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([case, number]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(checkout: Path, threads: int) -> dict[str, str]:
    """The variables of a process that uses a checkout."""
    source = str(checkout.resolve() / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": str(threads)}


def paired(base: Worker, ours: Worker, case: str, given: argparse.Namespace) -> list[float] | str:
    """The ratios of a case by round, or why there are none."""
    one = [worker.ask(case, 1) for worker in (base, ours)]
    for answer in one:
        if isinstance(answer, str):
            return answer
    number = max(int(given.block / max(one[0], 1e-6)), 1)
    ratios = []
    for turn in range(given.rounds):
        pair = [base, ours] if turn % 2 else [ours, base]
        times = {worker: worker.ask(case, number) for worker in pair}
        ratios.append(times[ours] / times[base])
    return ratios


def first(checkouts: Sequence[Path], given: argparse.Namespace) -> int:
    """Compare the first batch of methods, and print it."""
    worst = 0.0
    for method in FIRST:
        times = []
        for checkout in checkouts:
            with tempfile.TemporaryDirectory() as cache:
                answer = subprocess.run(
                    [sys.executable, __file__, str(checkout), "--first-of", method],
                    env={**environment(checkout, 1), "NUMBA_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                )
            times.append(float(answer.stdout))
        worst = max(worst, times[1] / times[0])
        print(
            f"first batch {method:8} {times[0]:7.1f} s {times[1]:7.1f} s {times[1] / times[0]:.3f}"
        )
    return int(worst > given.limit)


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print the ratios; whether one is above the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="the other checkout")
    parser.add_argument("--only", default="*", help="pattern of the cases")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--block", type=float, default=0.05, help="seconds of a block of calls")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="the clock in place of CPU time")
    parser.add_argument("--limit", type=float, default=1.02)
    parser.add_argument("--first", action="store_true", help="first batches, nothing compiled")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first-of", choices=FIRST, help=argparse.SUPPRESS)
    given = parser.parse_args(typed)
    if given.work:
        work(given.threads, given.wall)
        return 0
    if given.first_of:
        print(first_batch(given.first_of))
        return 0
    here = Path(__file__).resolve().parents[1]
    if given.first:
        return first((given.base, here), given)
    base, ours = Worker(given.base, given), Worker(here, given)
    above, medians = [], []
    for case in case_names():
        if not fnmatchcase(case, given.only):
            continue
        found = paired(base, ours, case, given)
        if isinstance(found, str):
            print(f"{case:48} {found}", flush=True)
            continue
        low, middle, high = statistics.quantiles(found, n=4)
        medians.append(middle)
        # Noise alone passes no limit: half of the rounds must be above it with the quartile at 1.
        over = middle > given.limit and low > 1
        above += [case] * over
        print(f"{case:48} {middle:.3f}  ({low:.3f} to {high:.3f}){'  ABOVE' * over}", flush=True)
    base.close()
    ours.close()
    if medians:
        mean = statistics.geometric_mean(medians)
        print(f"{len(medians)} cases, geometric mean {mean:.3f}, {len(above)} above {given.limit}")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
