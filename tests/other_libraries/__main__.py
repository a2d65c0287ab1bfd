"""Make the vectors anew from the packages in a folder; see `cases`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from other_libraries.cases import CASES, VECTORS, load

folder = Path(sys.argv[1])
torch.save({name: run(load(folder, name)) for name, run in CASES.items()}, VECTORS)
