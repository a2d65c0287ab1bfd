"""Experiments: what the command line trains, compares and reports. Never imported by the library."""
