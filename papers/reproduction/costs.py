"""A measurement of costs, from its settings to a row's numbers."""

import time
from datetime import datetime, timezone
from typing import Any

from anybatch.tools.bench import Bench, Variant, costs
from anybatch.tools.network_factory import factory
from anybatch.tools.run import BASELINE
from anybatch.tools.training import OnEpoch
from papers.reproduction.runs import CostRun


def measure_costs(run: CostRun, on_question: OnEpoch | None = None) -> dict[str, Any]:
    """Measure what methods cost, in turn in this process.

    Args:
        run: The network, the methods and the questions.
        on_question: Called with the questions that are answered.

    Returns:
        A `anybatch.tools.measurements.Measurement` a question and method as plain data, the
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
