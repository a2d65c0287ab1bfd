"""Reading batches from any loader, moving them to a device and passing them to a network."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.conversion.observe import tensors_in
from anybatch.core.arguments import check_count, shown

Forward = Callable[[nn.Module, Any], Any]
Shown = bool | Callable[[int, int | None], None] | None  # how progress is shown, see `reading`

_TARGETS = ("labels", "label", "targets", "target")


@contextmanager
def reading(
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    progress: Shown = None,
    title: str = "batches",
) -> Iterator[Iterator[Any]]:
    """A context that gives the batches of a loader, moved to a device, with a progress bar.

    Args:
        loader: Anything that iterates over batches: a ``DataLoader``, a list, a generator.
        device: Where tensors are moved to; None leaves them where they are.
        max_batches: Stop after so many (default None: all).
        progress: Show a bar on standard error (default None: where that is a
            terminal; without ``rich`` there is none), or a function that is called with
            the batches done and their number, None where that is not known.
        title: What the bar is called.

    Yields:
        The iterator over the batches.

    Raises:
        TypeError: If the loader does not iterate.
        ValueError: If it gives no batch, when the iterator is asked for the first.

    Example:
        >>> with reading([torch.zeros(2), torch.ones(2)], max_batches=1) as batches:
        ...     print(*batches)
        tensor([0., 0.])
    """
    if max_batches is not None:
        check_count("max_batches", max_batches)
    check_loader(loader)
    with progress_bar(_length(loader, max_batches), progress, title) as advance:
        yield _batches(loader, device, max_batches, advance)


def check_loader(loader: object) -> None:
    """Raise for what does not iterate over batches: also for a single batch, or a network."""
    if isinstance(loader, (Tensor, Mapping)):
        raise TypeError(
            f"loader: {shown(loader)} is one batch; give batches, such as [batch] or a "
            "torch.utils.data.DataLoader"
        )
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes, nn.Module)):
        raise TypeError(
            f"loader={shown(loader)}: give something that iterates over batches, such as a "
            "torch.utils.data.DataLoader or a list of tensors"
        )


def check_repeatable(loader: Iterable[Any], passes: str) -> None:
    """Raise for a loader that can be read once only, where it is read several times."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"loader={shown(loader)}: it can be read once, and {passes}; give a DataLoader, or "
            "list(loader) where memory allows"
        )


def recut(loader: Iterable[Any], size: int | None) -> Iterator[Any]:
    """Batches of another size from a loader's; a last one that is not whole is left out.

    The first dimension of each tensor counts examples. With `size` None they stay as they are.

    Raises:
        ValueError: If a batch holds no tensor, or all of them together fewer examples than `size`.

    Example:
        >>> [len(batch) for batch in recut([torch.zeros(3), torch.zeros(4)], 2)]
        [2, 2, 2]
    """
    check_loader(loader)
    if size is None:
        yield from loader
        return
    waiting: list[Any] = []
    have, short = 0, True
    for batch in loader:
        waiting.append(batch)
        have += _countable(batch)
        while have >= size:
            whole, short = _join(waiting, [_countable(one) for one in waiting]), False
            yield _part(whole, 0, size, have)
            waiting = [_part(whole, size, have, have)] if have > size else []
            have -= size
    if have and short:
        raise ValueError(
            f"batch_size={size}: the loader has {have} examples; give a number up to that, or a "
            "loader with more"
        )


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Give a batch to a network.

    A tensor is the argument. Of a tuple or list the first entry is the input and
    the rest are targets; a tuple in its place holds positional arguments. A mapping
    holds keyword arguments, of which those that the network's forward knows are given.
    Where both are lists, of tensors and of as many mappings, as torchvision's detectors
    take them, the network gets the first, and in training mode the second, too. A list
    of mappings with the same entries, one an example as detectron2 has them, is the argument.

    Args:
        model: The network.
        batch: What the loader gave.
        forward: Called as ``forward(model, batch)`` instead of all this.

    Returns:
        The network's output.

    Raises:
        TypeError: If the batch is none of these.
        ValueError: If the forward takes none of a mapping's entries.

    Example:
        >>> run(nn.Identity(), (torch.ones(2), "target"))
        tensor([1., 1.])
    """
    if forward is not None:
        return forward(model, batch)
    if _listed(batch):
        return model(list(batch[0]), *([list(batch[1])] if model.training else []))
    if _are_examples(batch):
        return model(batch)
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**_known(model, inputs))
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    raise TypeError(
        f"loader gave a batch of type {type(batch).__name__}: give tensors, (inputs, target) or "
        "mappings, or say how to use it with forward=lambda model, batch: ..."
    )


def target_of(batch: Any) -> Any:
    """The target in a batch: the second entry of a tuple or list, or a mapping's labels.

    Args:
        batch: What the loader gave.

    Returns:
        The target.

    Raises:
        ValueError: If there is none.

    Example:
        >>> target_of({"pixel_values": None, "labels": 3})
        3
    """
    pairs = isinstance(batch, (tuple, list)) and len(batch) > 1 and not _are_examples(batch)
    if pairs and batch[1] is not None:
        return batch[1]
    if isinstance(batch, Mapping):
        for name in _TARGETS:
            if batch.get(name) is not None:
                return batch[name]
    raise ValueError(
        f"loader gave {_describe(batch)}, which has no target: give (inputs, target), or a mapping "
        f"with one of {', '.join(_TARGETS)}"
    )


def logits_of(output: Any) -> Tensor:
    """The scores in a network's output: the tensor, its ``logits``, or the first entry.

    Raises:
        TypeError: If there is no tensor to be found.

    Example:
        >>> logits_of({"logits": torch.ones(1)})
        tensor([1.])
    """
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and len(output):
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the network gave {_describe(output)}: give forward=lambda model, batch: ... that "
            "returns the scores as one tensor"
        )
    return found


def examples_in(batch: Any) -> int:
    """The number of examples in a batch: the length of its first tensor, or 0 without tensors.

    Where a batch lists images and what is in them, as torchvision's detectors take it, or an
    example an entry, it is the length of the lists.

    Example:
        >>> examples_in({"mask": None, "x": torch.zeros(5, 2)})
        5
        >>> examples_in(([torch.zeros(3, 8, 9)], [{"boxes": torch.zeros(4, 4)}]))
        1
        >>> examples_in([{"image": torch.zeros(3, 8, 9), "name": "a"}] * 4)
        4
    """
    if _are_examples(batch):
        return len(batch)
    if _listed(batch):
        return len(batch[0])
    found = next(tensors_in(batch), None)
    return 0 if found is None else len(found) if found.dim() else 1


def device_of(model: nn.Module) -> torch.device | None:
    """The device of a network's first parameter or buffer; None without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def to_device(batch: Any, device: torch.device | str | None) -> Any:
    """A batch with its tensors on a device; everything else as it is.

    Example:
        >>> to_device({"x": [torch.zeros(1)], "name": "a"}, "cpu")
        {'x': [tensor([0.])], 'name': 'a'}
    """
    if device is None:
        return batch

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return value.to(device) if callable(getattr(value, "to", None)) else value

    return _mapped(batch, moved)


def _countable(batch: Any) -> int:
    found = examples_in(batch)
    if not found:
        raise ValueError(f"loader gave {_describe(batch)}, which holds no examples to count")
    return found


def _are_examples(batch: Any) -> bool:
    """True for a list, but no tuple, of mappings with the same entries: one an example."""
    return isinstance(batch, list) and bool(batch) and _share_entries(batch)


def _share_entries(values: Sequence[Any]) -> bool:
    return all(isinstance(one, Mapping) and one.keys() == values[0].keys() for one in values)


def _listed(batch: Any) -> bool:
    """True for a list of tensors and one of as many mappings, an entry of each per example."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return False
    inputs, targets = batch[:2]
    lists = all(isinstance(one, (tuple, list)) and len(one) for one in (inputs, targets))
    return (
        lists
        and len(inputs) == len(targets)
        and all(isinstance(one, Tensor) for one in inputs)
        and all(isinstance(one, Mapping) for one in targets)
    )


def _join(batches: list[Any], counts: list[int]) -> Any:
    """Batches of so many examples as one."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(batches)
    if all(_lists_examples(*pair) for pair in zip(batches, counts, strict=True)):
        return _chained(batches)
    if isinstance(first, Mapping):
        return {key: _join([batch[key] for batch in batches], counts) for key in first}
    if isinstance(first, (tuple, list)):
        entries = list(zip(*batches, strict=True))
        lists = 2 if all(map(_listed, batches)) else 0
        joined = [_join(list(parts), counts) for parts in entries[lists:]]
        return _alike(first, [*map(_chained, entries[:lists]), *joined])
    return first


def _chained(lists: Sequence[Any]) -> Any:
    return _alike(lists[0], [one for entries in lists for one in entries])


def _lists_examples(value: Any, examples: int) -> bool:
    """True if a list holds an entry per example that is no tensor: its name, or a mapping."""
    if not isinstance(value, (tuple, list)) or hasattr(value, "_fields") or not value:
        return False
    numbers = any(isinstance(one, (int, float)) for one in value)  # such as a height and a width
    whole = _share_entries(value) or next(tensors_in(value), None) is None
    return len(value) == examples and not numbers and whole


def _part(batch: Any, start: int, stop: int, examples: int) -> Any:
    """Some examples of a batch of so many."""
    lists = [id(entry) for entry in batch[:2]] if _listed(batch) else []

    def per_example(value: Any) -> bool:
        known = isinstance(value, Tensor) or id(value) in lists
        return known or _lists_examples(value, examples)

    def cut(value: Any) -> Any:
        return value[start:stop] if per_example(value) else value

    return _mapped(batch, cut, per_example)


def _mapped(
    batch: Any, function: Callable[[Any], Any], is_leaf: Callable[[Any], bool] = lambda _: False
) -> Any:
    """A nest of mappings, tuples and lists with a function applied to all that is in it."""
    if is_leaf(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        made = {name: _mapped(value, function, is_leaf) for name, value in batch.items()}
        return made if type(batch) is dict else _like(batch, made)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "to"):
        return _alike(batch, [_mapped(value, function, is_leaf) for value in batch])
    return function(batch)


def _alike(given: Any, parts: list[Any]) -> Any:
    if hasattr(given, "_fields"):
        return type(given)(*parts)
    return tuple(parts) if isinstance(given, tuple) else parts


def _like(batch: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """A mapping of the batch's own kind where it knows how to move or be made, else a dict."""
    try:
        return type(batch)(moved)  # type: ignore[call-arg]
    except TypeError:
        return moved


def _batches(
    loader: Iterable[Any],
    device: torch.device | str | None,
    max_batches: int | None,
    advance: Callable[[], None],
) -> Iterator[Any]:
    empty = True
    for batch in islice(loader, max_batches):
        empty = False
        yield to_device(batch, device)
        advance()
    if empty:
        raise ValueError(
            f"loader={shown(loader)} gave no batch: give one with data (with drop_last=True a set "
            "smaller than the batch gives none; a generator that has been read gives no more)"
        )


def _known(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the network's forward takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    names = {p.name for p in parameters}
    known = {name: value for name, value in batch.items() if name in names}
    if not known:
        raise ValueError(
            f"loader gave a mapping of {', '.join(map(str, batch))}, and {type(model).__name__} "
            f"takes {', '.join(sorted(names))}: say how to use it with "
            "forward=lambda model, batch: ..."
        )
    return known


def _length(loader: Iterable[Any], max_batches: int | None) -> int | None:
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:  # no length, or a data set without one
        return max_batches
    return total if max_batches is None else min(total, max_batches)


@contextmanager
def progress_bar(total: int | None, progress: Shown, title: str) -> Iterator[Callable[[], None]]:
    """A context with a progress bar, or what a caller counts with.

    Args:
        total: How much there is to do; None if that is not known.
        progress: Whether a bar is shown (None: where standard error is a terminal), or a function
            called with how much is done and `total`.
        title: Of the bar.

    Yields:
        What to call each time one more is done.
    """
    if callable(progress):
        done, tell = count(1), progress
        yield lambda: tell(next(done), total)
        return
    wanted = sys.stderr.isatty() if progress is None else progress
    try:
        if not wanted:
            raise ImportError
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, Elapsed(), Remaining(), console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
