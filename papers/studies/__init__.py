"""Analyses behind the papers' claims that are no tables of trainings."""
