"""What `import anybatch` adds to `import torch`: median over fresh processes.

Prints it and ends with status 1 when the median is over the budget of 0.3 seconds.

    python benchmarks/import_time.py [--rounds 9] [--csv import.csv]
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measurement_files import write_csv

from anybatch.tools.measurements import Setting, timed

BUDGET = 0.3  # seconds

CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import anybatch
print(middle - start, time.perf_counter() - middle)
"""


def seconds_to_import() -> tuple[float, float]:
    """Import torch, then anybatch, in a fresh process; the time of each."""
    answer = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    first, second = answer.stdout.split()
    return float(first), float(second)


def main(typed: Sequence[str] | None = None) -> int:
    """Measure, print, and compare with the budget."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="number of fresh processes")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args(typed)
    seconds_to_import()  # fills the file cache
    first, times = zip(*(seconds_to_import() for _ in range(given.rounds)), strict=True)
    median = statistics.median(times)
    print(
        f"import anybatch after torch: median {median:.3f} s, "
        f"{min(times):.3f} to {max(times):.3f} s over {given.rounds} processes, budget {BUDGET} s"
    )
    if given.csv is not None:
        both = {"torch": first, "anybatch": times}
        write_csv(given.csv, timed(Setting("import", "after torch"), both, "torch"))
    return int(median > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
