"""Classification: batches of examples, cross-entropy, accuracy."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.tools.data import Dataset, augment, noisy, shuffled
from anybatch.tools.images import ImageFiles, as_tensor
from anybatch.tools.precision import forward
from anybatch.tools.run import Run


def batches(run: Run, data: Dataset, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch; order, noise and augmentation follow from seed and epoch alone."""
    for index, generator in shuffled(run, data, epoch):
        x, y = data.train_x[index], data.train_y[index]
        if isinstance(x, ImageFiles):
            x = x.augmented(generator) if run.augments else x.read()
        elif isinstance(x, Tensor) and run.augments and x.dim() == 4:
            x = augment(x, generator)
        yield noisy(run, as_tensor(x), generator).to(run.device), y.to(run.device)


def loss(run: Run, data: Dataset, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of a network's scores."""
    return F.cross_entropy(forward(run, model, x), y)


def evaluate(run: Run, model: nn.Module, data: Dataset, size: int = 500) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out examples.

    The network is left in evaluation mode. Accuracy is from 0 to 1.
    """
    model.eval()
    loss = correct = 0.0
    with torch.no_grad():
        for x, y in zip(data.test_x.split(size), data.test_y.split(size), strict=True):
            scores, target = forward(run, model, x.to(run.device)), y.to(run.device)
            loss += float(F.cross_entropy(scores, target, reduction="sum"))
            correct += int((scores.argmax(1) == target).sum())
    return loss / len(data.test_y), correct / len(data.test_y)
