"""ReLUs, and additions before them, done by the norm they follow."""
