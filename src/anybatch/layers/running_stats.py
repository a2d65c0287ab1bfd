"""Running statistics that processes have in common."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from anybatch.core.arguments import check_from
from anybatch.core.reduction_scope import WORLD, active_group, check_group, sum_processes
from anybatch.layers.control import end_steps


@torch.no_grad()
def average_running_stats(
    model: nn.Module, *, weight: float = 1.0, process_group: Any = WORLD
) -> nn.Module:
    """Give all processes the running statistics of all, where each has followed its own data.

    With each process's share ``w`` of the weights::

        mean = sum of w * mean_r
        var  = sum of w * (var_r + (mean_r - mean)^2)

    which is the variance of the union: the mean of the variances alone misses what lies between the
    processes. One collective carries those of all layers. Before evaluation, or before saving.

    Args:
        model: A network with batch norms, torch's or of this library.
        weight: How much this process counts, as the number of examples it has seen (default 1.0).
        process_group: Whose (default "world": of all processes). A single process is left as it is.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no running statistics, or a weight is below 0.
        TypeError: For what is no process group.

    Example:
        >>> import anybatch
        >>> net = nn.Sequential(nn.BatchNorm1d(3))
        >>> anybatch.average_running_stats(net)[0].running_mean  # of one process: its own
        tensor([0., 0., 0.])
    """
    check_group(process_group)
    check_from("weight", weight, 0)
    pairs: list[tuple[Tensor, Tensor]] = []
    for layer in model.modules():
        if isinstance(layer, _NormBase):
            mean, var = layer.running_mean, layer.running_var
            if mean is not None and var is not None and not any(mean is one for one, _ in pairs):
                pairs.append((mean, var))
    if not pairs:
        raise ValueError(f"model: {type(model).__name__} has no batch norm with running statistics")
    group = active_group(process_group)
    if group is None:
        return model
    device = pairs[0][0].device
    means, variances = (
        torch.cat([tensor.to(device, torch.float64).view(-1) for tensor in column])
        for column in zip(*pairs, strict=True)
    )
    share = torch.tensor([weight], dtype=torch.float64, device=device)
    first, second, total = sum_processes(
        group, means * share, (variances + means.square()) * share, share
    )
    assert first is not None and second is not None and total is not None
    if not float(total):
        raise ValueError("weight: it is 0 on every process, give one of them more")
    means = first / total
    variances = (second / total - means.square()).clamp_(min=0)
    sizes = [mean.numel() for mean, _ in pairs]
    parts = zip(pairs, means.split(sizes), variances.split(sizes), strict=True)
    for (mean, var), new_mean, new_var in parts:
        mean.copy_(new_mean.view(mean.shape))
        var.copy_(new_var.view(var.shape))
    end_steps(model)  # else the next micro-batch goes back to where its step began
    return model
