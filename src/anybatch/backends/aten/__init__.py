"""Passes by torch's own operators: every device, type and format."""
