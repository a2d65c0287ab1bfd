"""Images and tables of what the other benchmarks measured.

    python benchmarks/draw.py runs/bench/*.csv

prints the tables of each CSV file and leaves a PNG of the same name beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from measurement_files import as_table, read_csv

from anybatch.core.files import write_bytes


def draw(path: Path) -> Path:
    """Draw the image of a CSV file; its path."""
    from anybatch.evaluation.figures import png
    from anybatch.tools.measurement_figures import ratios

    image = png(ratios(read_csv(path)))
    target = path.with_suffix(".png")
    write_bytes(target, image)
    return target


def main(typed: Sequence[str] | None = None) -> int:
    """Print and draw each file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args(typed).files:
        try:
            print(as_table(read_csv(path)))
        except ValueError as error:
            parser.error(str(error))
        try:
            print(draw(path))
        except ImportError as error:
            print(f"{path}: no image without {error.name}: pip install 'anybatch[tools]'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
