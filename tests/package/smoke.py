"""What an installed package must do, with torch and nothing else beside it.

Run by `make package` in a new environment, outside the source tree.
"""

import subprocess
import sys
from importlib import metadata, resources, util
from pathlib import Path

import torch
from torch import nn

import anybatch


def main() -> None:
    place = Path(anybatch.__file__).resolve()
    assert "site-packages" in place.parts, place
    assert metadata.version("anybatch") == anybatch.__version__
    assert resources.files("anybatch").joinpath("py.typed").is_file()
    assert not list(place.parent.rglob("test_*"))
    assert util.find_spec("papers") is None
    for folder in ("tools", "evaluation"):
        assert list(place.parent.joinpath(folder, "templates").glob("*.j2")), folder
    for extra in ("numba", "rich", "matplotlib", "typer", "sklearn", "lightning", "transformers"):
        assert util.find_spec(extra) is None, f"{extra} is installed: this tests a bare package"

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    for method in ("mabn", "cbn", "fs"):
        net = anybatch.convert(nn.Sequential(*model, nn.Linear(8 * 16, 2)), method)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for _ in range(3):
            loss = net(torch.randn(2, 3, 6, 6)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.isfinite(loss)
        model = nn.Sequential(*anybatch.to_batchnorm(net)[:4])
        assert type(model[1]) is nn.BatchNorm2d

    command = [sys.executable, "-m", "anybatch", "methods"]
    bare = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bare.returncode == 2, bare
    assert "anybatch[tools]" in bare.stderr, bare
    print(f"anybatch {anybatch.__version__}, torch {torch.__version__}: the package works")


if __name__ == "__main__":
    main()
