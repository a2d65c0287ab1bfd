"""What cross-iteration batch normalization rests on, measured (cross-iteration-bn, section 4.4).

Run ``python -m papers.studies.cross_iteration --help``.
"""
