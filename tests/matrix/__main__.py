"""Write the page of the documentation that shows the matrix."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matrix.outcomes import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
