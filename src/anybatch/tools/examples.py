"""Examples of a dataset that are read when they are needed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Collate = Callable[[list[Any]], Any]


_Some = TypeVar("_Some", bound="Unread")


class Unread:
    """Examples that are read when they are needed.

    Attributes:
        items: What each of them is read from.
    """

    items: Sequence[Any]

    @property
    def shape(self) -> torch.Size:
        """Shape of a tensor of all inputs."""
        raise NotImplementedError

    def read(self) -> Tensor:
        """Read all inputs."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self: _Some, index: slice | Tensor) -> _Some:
        """Some of them, still unread."""
        some = copy.copy(self)
        numbers = index.tolist() if isinstance(index, Tensor) else range(len(self))[index]
        some.items = [self.items[k] for k in numbers]
        return some

    def split(self, size: int) -> Iterator[Tensor]:
        """All inputs, so many at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size].read()


class Examples(Unread):
    """Examples of a dataset.

    Args:
        source: Dataset with a length whose items are numbered from 0.
        items: Numbers of the items.
        collate: Makes a batch of a list of items.
    """

    def __init__(self, source: Any, items: Sequence[int], collate: Collate) -> None:
        self.source, self.items, self.collate = source, items, collate

    @property
    def shape(self) -> torch.Size:
        """Shape of a tensor of all inputs; that of one is taken from the first example."""
        return torch.Size((len(self), *self[:1].read().shape[1:]))

    def batch(self) -> tuple[Tensor, Any]:
        """Read all of them: inputs and targets.

        Raises:
            TypeError: If the dataset's items do not collate to a pair that begins with a tensor.
        """
        made = self.collate([self.source[number] for number in self.items])
        if not (isinstance(made, (tuple, list)) and len(made) == 2 and torch.is_tensor(made[0])):
            parts = made if isinstance(made, (tuple, list)) else ()
            kinds = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
            raise TypeError(
                f"data: a batch of {type(self.source).__name__} is {type(made).__name__}{kinds}; "
                "give items of an input and a target, or a DataLoader with a collate_fn that makes "
                "(inputs, targets) of a list of items, the inputs one tensor; for others, such as "
                "lists of images, write the loop in Python: anybatch.diagnose and convert take them"
            )
        return made[0], made[1]

    def read(self) -> Tensor:
        return self.batch()[0]
