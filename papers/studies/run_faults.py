"""How many steps each layer remembers a fault, as docs/internals/reliability.md has it.

python -m papers.studies.run_faults [--outlier-limit 100]
"""

import argparse
import warnings

import torch
from rich.progress import track

from papers.studies.faults import DOMAIN, FAULTS, GRADIENT, REMEMBERING, recovery


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outlier-limit", type=float)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    methods = ["torch", *REMEMBERING]
    print(f"| fault | {' | '.join(methods)} |")
    print("|---|" + "---|" * len(methods))
    for fault in track([*FAULTS, GRADIENT, DOMAIN]):
        cells = []
        for method in methods:
            limit = None if method == "torch" else given.outlier_limit
            found = [
                recovery(fault, method, seed, outlier_limit=limit) for seed in range(given.seeds)
            ]
            train, evaluate = (
                [getattr(one, m) for one in found] for m in ("training", "evaluation")
            )
            worst = ["never" if None in steps else str(max(steps)) for steps in (train, evaluate)]
            cells.append(" / ".join(worst))
        print(f"| {fault} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
