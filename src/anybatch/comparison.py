"""Train a network with each method and compare the results, from Python."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from anybatch.core.arguments import check_count
from anybatch.evaluation.batches import Shown, progress_bar

if TYPE_CHECKING:
    from anybatch.tools.compare_report import FinishedComparison


def compare(
    model: nn.Module | Callable[[], nn.Module],
    train: Any,
    test: Any,
    methods: Iterable[str] | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 2,
    norm_batch_size: int | None = None,
    accumulate: int = 1,
    target_batch_size: int = 32,
    epochs: int = 12,
    seeds: int | Iterable[int] = 3,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    score: Callable[[Tensor, Any], float | Tensor] | None = None,
    device: str = "cpu",
    precision: str = "float32",
    timing: bool = True,
    progress: Shown = None,
) -> FinishedComparison:
    """Train a network with each method on your data, and compare what they reach.

    Each method trains with SGD, a learning rate of ``lr * batch_size / 64`` that falls to 0 along a
    cosine, and the same seeds. Two rows are for comparison: batch norm at `target_batch_size`, and
    at the small batch. With m the mean score of a row over the seeds::

        recovered = (m - m(small batch norm)) / (m(large batch norm) - m(small batch norm))

    `anybatch compare --model mine.py:network --data mine.py:data` does the same in several
    processes, and goes on where it was stopped.

    Args:
        model: A function that builds the network, or a network with torch's batch norms, which is
            copied for every run.
        train: Training examples: a dataset with a length whose items are an input and a target, or
            a DataLoader, of which the dataset and collate_fn are used.
        test: Held-out examples, of the same form.
        methods: Short names (default None: those for small batches).
        options: Options of methods, as in ``{"mabn": {"window": 64}}`` (default None: none).
        batch_size: Examples in a step (default 2).
        norm_batch_size: Examples that share statistics (default None: those of a forward).
        accumulate: Forwards per optimizer step, which share its examples (default 1).
        target_batch_size: Batch size of the large batch norm (default 32).
        epochs: Passes over the training examples (default 12).
        seeds: How many runs per method, or their seeds (default 3).
        lr: Learning rate for 64 examples (default 0.1).
        momentum: Momentum of SGD (default 0.9).
        weight_decay: Weight decay of SGD (default 1e-4).
        loss: Mean loss of outputs and targets (default None: cross-entropy).
        score: Mean score of outputs and targets, from 0 to 1, higher is better (default None:
            accuracy).
        device: Where to train (default "cpu").
        precision: "float32", or "bfloat16" or "float16" by autocast (default "float32").
        timing: Measure the time of a step as well (default True).
        progress: Show a bar (default None: where standard error is a terminal), or a function
            called with the epochs done and their number.

    Returns:
        The comparison: print it for the table, `report(folder)` writes a page with plots, JSON and
        CSV, `to_dict()` gives the numbers.

    Raises:
        ValueError: For an argument out of range, an unknown method or option, or data without
            examples.
        TypeError: For data or functions of another kind.
        ImportError: Without ``pip install 'anybatch[tools]'``, for the report.

    Example:
        >>> import torch, anybatch
        >>> from torch import nn
        >>> def network():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> found = anybatch.compare(network, data, data, ["mabn"], epochs=1, seeds=1, timing=False)
        >>> [line.row for line in found.lines]
        ['target', 'baseline', 'mabn']
    """
    from anybatch.conversion.observe import random_states_restored
    from anybatch.tools.compare import DEFAULT_METHODS, Comparison, check_data, table
    from anybatch.tools.compare_report import FinishedComparison
    from anybatch.tools.own_data import own_data
    from anybatch.tools.run import Run
    from anybatch.tools.timing import time_steps
    from anybatch.tools.training import train as train_run

    start = time.perf_counter()
    if isinstance(seeds, int):
        check_count("seeds", seeds)
        seeds = range(seeds)
    network = _factory(model)
    data = own_data(train, test, loss, score, network)
    comparison = Comparison(
        base=Run(
            data="yours:data",
            model="yours:network",
            batch_size=batch_size,
            norm_batch_size=norm_batch_size,
            accumulate=accumulate,
            epochs=epochs,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            device=device,
            precision=precision,
        ),
        methods=DEFAULT_METHODS if methods is None else _names(methods),
        seeds=tuple(seeds),
        target_batch_size=target_batch_size,
        options=tuple((name.lower(), tuple(own.items())) for name, own in (options or {}).items()),
    )
    check_data(comparison, data)
    runs = comparison.runs()
    results, total = {}, sum(run.epochs for run in runs)
    with random_states_restored():
        with (
            tempfile.TemporaryDirectory() as folder,
            progress_bar(total, progress, "comparing") as advance,
        ):
            for run in runs:
                done = train_run(run, Path(folder), lambda *_: advance(), data=data)
                results[run.key] = done
        times = time_steps(comparison.timed(), data) if timing else {}
    lines = table(comparison, results)
    seconds = time.perf_counter() - start
    return FinishedComparison(comparison, lines, results, times, "anybatch.compare(...)", seconds)


def _names(methods: Iterable[str]) -> tuple[str, ...]:
    """Short names of methods, in lower case."""
    if isinstance(methods, str):
        raise TypeError(f"methods={methods!r}: give a list of names, as in [{methods!r}]")
    return tuple(name.lower() for name in methods)


def _factory(model: nn.Module | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A function that gives a fresh network."""
    if isinstance(model, nn.Module):
        return lambda: copy.deepcopy(model)
    if not callable(model):
        raise TypeError(f"model={model!r}: give a function that builds a network, or a network")

    from anybatch.tools.network_factory import check_network

    return lambda: check_network("model", model())
