"""What batch normalization sampling estimates and what it costs, measured (bn-sampling).

Run ``python -m papers.studies.sampling --help``.
"""
