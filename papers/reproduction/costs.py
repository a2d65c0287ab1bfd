"""A measurement of costs, from its settings to a row's numbers.

Importing this module adds questions to `anybatch.tools.bench.QUESTIONS`: all memory of a training,
operations, and inference with folded norms.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.conversion import NoEffectWarning, fold
from anybatch.layers import VirtualDataset
from anybatch.tools.bench import QUESTIONS, Bench, Question, Subject, Variant, compiled, costs
from anybatch.tools.memory import tensors_of
from anybatch.tools.network_factory import factory
from anybatch.tools.run import BASELINE
from anybatch.tools.timing import Call
from anybatch.tools.training import OnEpoch
from papers.reproduction.operations import count_flops
from papers.reproduction.runs import CostRun


def measure_costs(run: CostRun, on_question: OnEpoch | None = None) -> dict[str, Any]:
    """Measure what methods cost, in turn in this process.

    Args:
        run: The network, the methods and the questions.
        on_question: Called with the questions that are answered.

    Returns:
        A `anybatch.tools.measurements.Measurement` per question and method as plain data, the
        reasons of the methods that failed, seconds and date.

    Raises:
        ValueError: If there is no such network, or it cannot be trained as it is.
    """
    start = time.perf_counter()
    bench = Bench(
        run.model,
        factory(run.model, run.example),
        ((run.batch_size, *run.example),),
        device=run.device,
        precision=run.precision,
        mode=run.mode,
        rounds=run.rounds,
        block_seconds=run.block_seconds,
        questions=run.questions,
    )
    under_way: list[str] = []

    def show(what: str, done: int, total: int) -> None:
        if on_question is not None and done == total and what not in under_way:
            under_way.append(what)
            on_question(max(len(under_way) - 1, 0), {})  # the first steps answer none

    base = run.methods[0][0]
    variants = {label: Variant(name, options) for label, name, options in run.methods[1:]}
    found = costs(bench, variants, show)
    return {
        "costs": [
            row._replace(name=base if row.name == BASELINE else row.name)._asdict()
            for row in found.rows
        ],
        "failed": found.failed,
        "epochs": list(run.questions),  # what a bar counts
        "seconds": time.perf_counter() - start,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _training_bytes(subject: Subject) -> int | None:
    """Return the most bytes of a training step, parameters, state and optimizer included."""
    peak = subject.peak_bytes()
    if peak is None:
        return None
    states = (t for s in subject.optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    return peak + held_bytes((*tensors_of(subject.model), *states))


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors, each storage once.

    Args:
        tensors: Parameters, buffers, the state of an optimizer.

    Example:
        >>> x = torch.ones(10)
        >>> held_bytes([x, x[2:], torch.ones(1)])
        44
    """
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def _training_operations(subject: Subject) -> int:
    subject.model.train()
    return count_flops(lambda: subject.loss().backward())


def _folded(subject: Subject) -> Callable[..., Any]:
    """Return a copy for inference, with its norms folded into the layers before them."""
    subject.model.eval()
    model = copy.deepcopy(subject.model)
    inside = model.model if isinstance(model, VirtualDataset) else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # some norms cannot be folded
        fold(inside, tuple(x[:1] for x in subject.inputs))
    return compiled(inside) if subject.bench.mode == "compiled" else inside


def _timed_folded(subject: Subject) -> Call:
    return subject.warm(partial(subject.infer, _folded(subject)))


def _folded_operations(subject: Subject) -> int:
    return count_flops(partial(subject.infer, _folded(subject)))


QUESTIONS.update(
    {
        "memory": Question("memory of training", "MB", _training_bytes),
        "flops": Question("operations", "MFLOP", _training_operations),
        "folded": Question("inference, folded", "ms", _timed_folded),
        "folded flops": Question("operations of inference", "MFLOP", _folded_operations),
    }
)
