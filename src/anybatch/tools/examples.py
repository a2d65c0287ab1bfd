"""Examples of a dataset that are read when they are needed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Collate = Callable[[list[Any]], Any]


class Examples:
    """Examples of a dataset; none is read before it is asked for.

    Args:
        source: Dataset with a length whose items are numbered from 0.
        numbers: Which of its items.
        collate: Makes a batch of a list of items.
    """

    def __init__(self, source: Any, numbers: Sequence[int], collate: Collate) -> None:
        self.source, self.numbers, self.collate = source, numbers, collate

    @property
    def shape(self) -> torch.Size:
        """Shape of a tensor of all inputs; that of one is taken from the first example."""
        return torch.Size((len(self), *self[:1].batch()[0].shape[1:]))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: slice | Tensor) -> "Examples":
        """Some of them, still unread."""
        if isinstance(index, slice):
            return Examples(self.source, self.numbers[index], self.collate)
        return Examples(self.source, [self.numbers[k] for k in index.tolist()], self.collate)

    def batch(self) -> tuple[Tensor, Any]:
        """Read all of them: inputs and targets.

        Raises:
            TypeError: If the dataset's items do not collate to a pair that begins with a tensor.
        """
        made = self.collate([self.source[number] for number in self.numbers])
        if not (isinstance(made, (tuple, list)) and len(made) == 2 and torch.is_tensor(made[0])):
            raise TypeError(
                f"data: a batch of {type(self.source).__name__} is {type(made).__name__}; give "
                "items of an input and a target, or a DataLoader with a collate_fn that makes "
                "(inputs, targets) of a list of items"
            )
        return made[0], made[1]

    def split(self, size: int) -> Iterator[Tensor]:
        """All inputs, so many at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size].batch()[0]
