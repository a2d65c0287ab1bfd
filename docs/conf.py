"""Sphinx configuration. `make docs` builds the pages; every warning is an error."""

import anybatch

project = "anybatch"
author = "The anybatch authors"
copyright = "2026, The anybatch authors"
version = release = anybatch.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

default_role = "py:obj"

html_theme = "furo"
html_title = f"anybatch {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
