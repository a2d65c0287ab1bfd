"""The norms of a detector that its method converts, and what becomes of the others."""

from pathlib import Path

import torch
from torch import nn

from anybatch.conversion import convert
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.tools.objective import Where
from anybatch.tools.run import Run
from papers.paper_run import FROZEN, PaperRun

_GROUPS = 8  # of the group norms of a fresh body whose heads alone have the run's method


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose statistics, scale and shift stay what they are, in training too.

    Fresh, with means of 0 and variances of 1, it does all but nothing.
    """

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in evaluation mode."""
        super().train(False)
        return self


def freeze(model: nn.Module, where: Where) -> None:
    """Freeze the batch norms of a network, in place.

    Args:
        model: The network.
        where: Which of them, by name and module.
    """
    for name, module in model.named_modules():
        if is_batch_norm(module) and where(name, module):
            module.__class__ = FrozenBatchNorm2d
            module.requires_grad_(False)
            module.train(False)


def freeze_pretrained(run: Run, model: nn.Module) -> None:
    """Freeze all norms of a pretrained network if the run's method says so."""
    if run.method == FROZEN:
        freeze(model, lambda name, module: True)


def prepare_norms(run: Run, model: nn.Module) -> Where:
    """Load a detector's weights and settle the norms that are not its method's.

    Args:
        run: Its norms, weights, root and method are used.
        model: A fresh detector; it is changed in place.

    Returns:
        Which norms are the method's.

    Raises:
        ValueError: If the weights are not there or do not fit.
    """
    assert isinstance(run, PaperRun)
    if run.weights is not None:
        _load(run, model)
    of_method = {"all": _every, "heads": _heads, "body": _body}[run.norms]
    early = tuple(model.early) if run.weights is not None else ()  # type: ignore[arg-type]

    def where(name: str, module: nn.Module) -> bool:
        return of_method(name) and not name.startswith(early)

    def others(name: str, module: nn.Module) -> bool:
        return not where(name, module)

    if early:  # as the papers' fine-tuning has it: neither norms nor kernels learn there
        for name, parameter in model.named_parameters():
            if name.startswith(early):
                parameter.requires_grad_(False)
    if run.norms == "heads" and run.weights is None:
        convert(model, "gn", where=others, num_groups=_GROUPS)
    else:
        freeze(model, others)
    if run.method == FROZEN:
        freeze(model, where)
    return where


def _every(name: str) -> bool:
    return True


def _heads(name: str) -> bool:
    return name.startswith(("heads.", "detector.roi_heads."))


def _body(name: str) -> bool:
    return not _heads(name)


def _load(run: PaperRun, model: nn.Module) -> None:
    """Load the weights of a detector's ResNet, as torchvision keeps them."""
    assert run.weights is not None
    root = Path(str(run.root))
    file = (root if root.is_dir() else root.parent) / run.weights
    source = "torchvision's ResNet of the same depth, trained on ImageNet: its state_dict"
    if not file.is_file():
        raise ValueError(f"weights={run.weights!r}: there is no {file}; it is to hold {source}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        kept = {name: value for name, value in state.items() if not name.startswith("fc.")}
        model.resnet.load_state_dict(kept)  # type: ignore[union-attr]
    except Exception as error:
        raise ValueError(
            f"weights={run.weights!r}: {file} does not fit ({error}); it is to hold {source}"
        ) from error
