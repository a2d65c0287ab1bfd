"""Numbers that compiled kernels tell the methods apart by."""

PLAIN, RENORM, MOMENTUM, WINDOW = 0, 1, 2, 3  # how statistics are chosen
BATCH, SMA, EMA = 0, 1, 2  # which averages of Psi the backward pass takes
AVERAGES = {"batch": BATCH, "sma": SMA, "ema": EMA}
