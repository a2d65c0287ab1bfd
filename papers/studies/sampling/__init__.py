"""Measurements of what batch normalization sampling estimates and costs (bn-sampling).

Run ``python -m papers.studies.sampling --help``.
"""
