"""A user's own data: a function that gives training and held-out examples."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from anybatch.conversion.observe import random_states_restored, seed
from anybatch.core.nested import mapped
from anybatch.tools.data import LOADERS, Dataset, shuffled
from anybatch.tools.examples import Collate, Examples
from anybatch.tools.network_factory import call, find
from anybatch.tools.precision import forward
from anybatch.tools.run import Run

Loss = Callable[[Tensor, Any], Tensor]
Score = Callable[[Tensor, Any], float | Tensor]
_GIVEN = ("train", "test", "loss", "score")
_WANTED = (
    "give (train, test), or a dict of train, test, loss and score; train and test are datasets "
    "with a length, or DataLoaders of such"
)
_EVALUATED = 64  # examples at a time


@dataclass(frozen=True)
class OwnData(Dataset):
    """A user's data; `train_y` and `test_y` only count, as targets come with the examples.

    Attributes:
        loss: Takes outputs and targets, returns the mean loss.
        score: Takes outputs and targets, returns the mean of what is the better the higher.
    """

    loss: Loss | None = None
    score: Score | None = None


def own_data(
    train: Any,
    test: Any = None,
    loss: Loss | None = None,
    score: Score | None = None,
    network: Callable[[], nn.Module] | None = None,
    name: str = "data",
) -> OwnData:
    """Take a user's datasets.

    Args:
        train: A dataset with a length, or a DataLoader, of which dataset and collate_fn are used.
        test: Held-out examples (default None: there are none).
        loss: Mean loss of outputs and targets (default None: cross-entropy).
        score: Mean score of outputs and targets (default None: accuracy).
        network: Builds the network (default None: as the run says).
        name: Of the data.

    Raises:
        TypeError: For anything else.

    Example:
        >>> pairs = [(torch.zeros(3), 0), (torch.ones(3), 1)]
        >>> own_data(pairs, pairs).shape
        (3,)
    """
    for function, given in (("loss", loss), ("score", score)):
        if given is not None and not callable(given):
            raise TypeError(f"{function}={given!r}: give a function of outputs and targets")
    examples = _examples("train", train)
    held_out = examples[:0] if test is None else _examples("test", test)
    if not len(examples):
        raise ValueError("train: it has no examples")
    counted = torch.arange(len(examples)), torch.arange(len(held_out))
    return OwnData(
        name, examples, counted[0], held_out, counted[1], 0, network, loss=loss, score=score
    )


def _examples(name: str, given: Any) -> Examples:
    collate: Collate = default_collate
    if isinstance(given, DataLoader):
        given, collate = given.dataset, given.collate_fn
    if isinstance(given, nn.Module) or not all(
        hasattr(given, part) for part in ("__len__", "__getitem__")
    ):
        raise TypeError(f"{name}: {type(given).__name__} has no length and items; {_WANTED}")
    return Examples(given, range(len(given)), collate)


def load_own(run: Run) -> OwnData:
    """Load the data that a function of the user gives, with the same random numbers each time.

    Raises:
        ValueError: If there is no such function, or it fails.
        TypeError: If it gives something else.
    """
    with random_states_restored():
        seed(0)
        made = call("data", run.data, find("data", run.data))
    if isinstance(made, tuple):
        names = ("train", "test") if len(made) == 2 else map(str, range(len(made)))
        given: Mapping[str, Any] = dict(zip(names, made, strict=True))
    elif isinstance(made, Mapping):
        given = made
    else:
        given = {"train": made}
    unknown = sorted(set(given) - set(_GIVEN))
    if "train" not in given or unknown:
        raise TypeError(f"data={run.data!r}: it gave {', '.join(given)}; {_WANTED}")
    try:
        return replace(own_data(**given), name=run.data_name)
    except (TypeError, ValueError) as error:
        raise type(error)(f"data={run.data!r}: {error}") from error


LOADERS["own"] = load_own

# --- the objective ------------------------------------------------------------------


def batches(run: Run, data: Dataset, epoch: int) -> Iterator[tuple[Tensor, Any]]:
    """The batches of an epoch; their order follows from seed and epoch alone."""
    assert isinstance(data.train_x, Examples)
    for index, _ in shuffled(run, data, epoch):
        yield batch(data.train_x[index], run.device)


def batch(examples: Examples, device: str) -> tuple[Tensor, Any]:
    """Inputs and targets of examples, which may be nested, on a device."""
    x, y = examples.batch()
    if isinstance(y, Tensor) and y.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"data: a batch has inputs {tuple(x.shape)} and targets {tuple(y.shape)}; let "
            "collate_fn give both with the examples in front"
        )
    return x.to(device), mapped(lambda t: t.to(device), y)


def loss(run: Run, data: Dataset, model: nn.Module, x: Tensor, y: Any) -> Tensor:
    """The loss of a batch, with a gradient."""
    own = data.loss if isinstance(data, OwnData) else None
    return (own or _cross_entropy)(forward(run, model, x), y)


def evaluate(run: Run, model: nn.Module, data: Dataset) -> tuple[float | None, dict[str, float]]:
    """Mean loss and score on the held-out examples; the network is left in evaluation mode.

    Without such examples the loss is None, and the score is nan.
    """
    assert isinstance(data, OwnData) and isinstance(data.test_x, Examples)
    model.eval()
    losses, scores, count = 0.0, 0.0, 0
    with torch.no_grad():
        for start in range(0, len(data.test_x), _EVALUATED):
            x, y = batch(data.test_x[start : start + _EVALUATED], run.device)
            outputs, count = forward(run, model, x), count + len(x)
            losses += len(x) * float((data.loss or _cross_entropy)(outputs, y))
            scores += len(x) * float((data.score or _accuracy)(outputs, y))
    if not count:
        return None, {"accuracy": math.nan}
    return losses / count, {"accuracy": scores / count}


def _cross_entropy(outputs: Tensor, targets: Any) -> Tensor:
    _check_classes("loss", outputs, targets)
    return F.cross_entropy(outputs, targets)


def _accuracy(outputs: Tensor, targets: Any) -> Tensor:
    _check_classes("score", outputs, targets)
    right: Tensor = outputs.argmax(1) == targets
    return right.float().mean()


def _check_classes(name: str, outputs: Any, targets: Any) -> None:
    """Check that outputs are scores of classes, and targets classes."""
    both = (outputs, targets)
    classes = all(torch.is_tensor(one) for one in both) and not targets.is_floating_point()
    if classes and outputs.shape[:1] + outputs.shape[2:] == targets.shape:
        return
    had = [tuple(one.shape) if torch.is_tensor(one) else type(one).__name__ for one in both]
    raise ValueError(
        f"{name}=None: outputs {had[0]} and targets {had[1]} are no scores (N, C, ...) and classes "
        f"(N, ...); give {name} as well, a function of both"
    )
