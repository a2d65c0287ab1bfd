"""Whether torch traces or transforms the current call."""

import torch
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether a compiler, tracer, transform or mode has to see each operator of a call.

    A tensor made in such a call may be fake, functional or a transform's: it must not be kept for
    another call.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
