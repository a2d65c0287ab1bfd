"""Specs of the papers' tables and figures, their trainings, results and pages."""
