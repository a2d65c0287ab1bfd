"""Base class of the normalization layers and what it is built from."""
