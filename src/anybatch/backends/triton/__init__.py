"""Whole layers in one launch on a GPU (Triton, which comes with torch's CUDA builds).

A rule of thirty operators is thirty launches, each of which takes longer than the arithmetic of a
thousand channels. So moments, rule, affine pass and state are one launch forward, and sums, rule
and gradient one launch backward, where a group's columns are within a program's reach; elsewhere
three, with the rule in the second.

Triton is imported when the first batch that qualifies arrives. Where it is not installed, or a
batch does not qualify, torch's operators serve.
"""
