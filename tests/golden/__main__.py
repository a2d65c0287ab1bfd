"""``python -m tests.golden``: check against the golden record, from the repository's root."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests.parent / "src")]

    from golden.record import main

    sys.exit(main())
