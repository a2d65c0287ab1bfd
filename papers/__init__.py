"""The tables and figures of the papers, made again with `anybatch`.

Run ``python -m papers --help`` from the root of the repository. Importing this package adds the
papers' networks, data sets and tasks to those of `anybatch.tools`.
"""

from papers import datasets, networks, tasks  # noqa: F401
