"""Measurements of what cross-iteration batch normalization rests on (section 4.4 of its paper).

Run ``python -m papers.studies.cross_iteration --help``.
"""
