"""Experiments: what the command line trains, compares and reports.

The library never imports this package.
"""
