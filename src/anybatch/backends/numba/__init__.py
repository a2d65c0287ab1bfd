"""Whole layers in compiled calls on a CPU (Numba, an extra).

Where a batch is small, calls cost more than arithmetic: a rule of thirty operators on vectors of
a hundred channels takes longer than the data do. Where it is large, memory is the limit, and a
channel is read once for its statistics and its output. So moments, rule, affine pass and state
are one call forward, and sums, rule and gradient one call backward, on torch's threads.

Numba is imported when the first batch that qualifies arrives. Where it is not
installed, or a batch does not qualify, torch's operators serve.
"""
