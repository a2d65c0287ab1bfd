"""The user's choice of backends."""

import os

selected = os.environ.get("ANYBATCH_FUSED", "auto")


def use_fused(choice: str) -> None:
    """Choose whether batches take compiled kernels, Numba's on a CPU and Triton's on a GPU.

    Args:
        choice: "auto" where they are installed and nothing traces the call; "always" also in what
            ``torch.compile`` and ``torch.export`` make of a network in training mode, as operators;
            "never". The environment variable ``ANYBATCH_FUSED`` gives the choice at the start.

    Raises:
        ValueError: For another choice.
    """
    global selected
    if choice not in ("auto", "never", "always"):
        raise ValueError(f"choice={choice!r}: give 'auto', 'always' or 'never'")
    selected = choice
