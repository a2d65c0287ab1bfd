"""What `import anybatch` adds to `import torch`: median over fresh processes.

Prints one row and ends with status 1 when the median is over the budget of 0.3 seconds.

    python benchmarks/import_time.py [--repeats 9]
"""

import argparse
import statistics
import subprocess
import sys

BUDGET = 0.3  # seconds

CODE = """
import time, torch
start = time.perf_counter()
import anybatch
print(time.perf_counter() - start)
"""


def seconds_to_import() -> float:
    """Import torch, then anybatch, in a fresh process; the time of the second."""
    answer = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    return float(answer.stdout)


def main() -> int:
    """Measure, print, and compare with the budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="number of fresh processes")
    repeats = parser.parse_args().repeats
    seconds_to_import()  # fills the file cache
    times = [seconds_to_import() for _ in range(repeats)]
    median = statistics.median(times)
    print(
        f"import anybatch after torch: median {median:.3f} s, "
        f"{min(times):.3f} to {max(times):.3f} s over {repeats} processes, budget {BUDGET} s"
    )
    return int(median > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
