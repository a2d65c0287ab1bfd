"""Mean and variance of all values that a layer ever gets, exact whatever the batches."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anybatch import backends
from anybatch.core.tensor_subclasses import as_plain


@dataclass
class Pool:
    """Count, mean and sum of squared deviations of each channel's values, in float64.

    Batches are joined as Chan, Golub and LeVeque (1979) do::

        d  = mean_b - mean
        mean <- mean + d * n_b / (n + n_b)
        m2   <- m2 + m2_b + d**2 * n * n_b / (n + n_b)

    so that each weighs by its values, and a large mean costs no precision.

    Attributes:
        count: Values per channel.
        mean: ``(C,)``.
        m2: ``(C,)``.
        calls: Batches.

    Example:
        >>> pool = Pool.empty(1)
        >>> pool.add(torch.tensor([[1.0], [2.0]])); pool.add(torch.tensor([[6.0]]))
        >>> pool.count, pool.mean.item(), round(pool.var().item(), 6)
        (3, 3.0, 7.0)
    """

    count: int
    mean: Tensor
    m2: Tensor
    calls: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device | None = None) -> "Pool":
        """A pool of no values; on the CPU for a device without float64."""
        place = None if device is not None and device.type == "mps" else device
        zeros = torch.zeros(channels, dtype=torch.float64, device=place)
        return cls(0, zeros, zeros.clone())

    def add(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Join the values of a batch ``(N, C, ...)``, of the valid positions ``(N, 1, ...)``."""
        self.calls += 1
        if x.numel() == 0:
            return
        x = as_plain(x.detach()).to(self.mean.device).double()
        if valid is None:
            mean, var = backends.moments(x, (x.shape[0],))
            n = x.numel() // x.shape[1]
        else:
            mean, var, counts = backends.masked_moments(x, (x.shape[0],), valid.to(x.device))
            n = int(counts)
        if n:
            self._join(n, mean.view(-1), var.view(-1) * n)

    def _join(self, n: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + n
        apart = mean - self.mean
        self.m2 = self.m2 + m2 + apart.square() * (self.count * n / total)
        self.mean = self.mean + apart * (n / total)
        self.count = total

    def var(self) -> Tensor:
        """Unbiased variance; 0 for a single value."""
        return self.m2 / max(self.count - 1, 1)

    def second_moment(self) -> Tensor:
        """Mean square."""
        return self.m2 / max(self.count, 1) + self.mean.square()


def pool_across(pool: Pool, group: Any) -> Pool:
    """The pool of all processes' values."""
    count = torch.tensor([pool.count, pool.calls], dtype=torch.float64, device=pool.mean.device)
    total = count.clone()
    dist.all_reduce(total, group=group)
    if not total[0]:
        return Pool(0, pool.mean, pool.m2, int(total[1]))
    mean = pool.mean * (count[0] / total[0])
    dist.all_reduce(mean, group=group)
    m2 = pool.m2 + (pool.mean - mean).square() * count[0]
    dist.all_reduce(m2, group=group)
    return Pool(int(total[0]), mean, m2, int(total[1]))


def group_of_processes(group: Any) -> Any:
    """The given process group, or all processes where there are several, or None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def raise_together(error: BaseException | None, group: Any, device: torch.device | None) -> None:
    """Raise on every process if one failed, so that none waits for it for ever.

    The caller should forget its own ``error`` at once (``finally: del error``): an error that is
    still the variable of a frame in its own traceback lives until the garbage collector comes, and
    the process group with it, whose threads may then abort an interpreter on its way out.
    """
    try:
        if group is not None:
            failed = torch.tensor([error is not None], dtype=torch.float32, device=device)
            dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
            if error is None and bool(failed):
                raise RuntimeError("another process failed: nothing was changed here")
        if error is not None:
            raise error
    finally:
        del error
