"""Make what the papers report: train what is missing, and keep a row of each in a store."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from anybatch.tools.data import Dataset, load
from anybatch.tools.machine import machine
from anybatch.tools.objective import objective
from anybatch.tools.processes import OnProgress, in_processes
from anybatch.tools.training import OnEpoch, train
from papers.paper_run import PaperRun
from papers.reproduction.costs import measure_costs
from papers.reproduction.recording import record
from papers.reproduction.runs import CostRun, Job, job_of
from papers.reproduction.spec import Task, reproductions, shipped_weights, start_of, starts
from papers.reproduction.store import SCHEMA, Row, Store
from papers.studies.example_weight import tuned_on_halves

if TYPE_CHECKING:
    from torch import Tensor

ROWS = "results.jsonl"
# Operations per second that networks of this kind reach in one process, and the time of a step
# besides: orders of magnitude, for estimates of what nothing like it was measured of.
_RATE = {"cpu": 150e9, "cuda": 15e12}
_STEP = {"cpu": 5e-3, "cuda": 15e-3}
_PART = {"cpu": 0.0, "cuda": 2e-3}  # of each further normalization batch, for its launches


class Made(NamedTuple):
    """The outcome of some tasks.

    Attributes:
        rows: Rows of the store, by identity.
        added: How many are new.
        elsewhere: How many another process is at work on.
    """

    rows: dict[str, Row]
    added: int
    elsewhere: int


def missing(tasks: list[Task], rows: Mapping[str, Row]) -> list[Task]:
    """Tasks that no row answers."""
    return [task for task in tasks if not _answers(rows.get(task.run.identity), task)]


def to_train(tasks: list[Task], rows: Mapping[str, Row], folder: Path) -> list[Task]:
    """Tasks that no row answers, and those that others start from and whose weights are gone.

    Args:
        tasks: Trainings, with root and device.
        rows: Of the store.
        folder: Of the store.

    Returns:
        The tasks.
    """
    waiting = missing(tasks, rows)
    begun = {start.key for task in waiting if (start := start_of(task.run)) is not None}
    again = [task for task in tasks if task.run.key in begun and task not in waiting]
    return [task for task in again if not _trained(folder, task.run).is_file()] + waiting


def _weights_file(folder: Path, run: Job) -> Path:
    return folder / "runs" / f"{run.key}.pt"


def _trained(folder: Path, run: Job) -> Path:
    """The weights that a run left in a store, else those that come with the papers."""
    own = _weights_file(folder, run)
    return own if own.is_file() else shipped_weights(run)


def _answers(row: Row | None, task: Task) -> bool:
    return row is not None and (not task.weighed or "weighing" in row["result"])


def placed(task: Task, root: Path | None, device: str) -> Task:
    """A task with its data and device.

    Args:
        task: The task.
        root: Folder of all data, or of these; None where there are none to be read.
        device: Where to train.

    Returns:
        The task.

    Raises:
        ValueError: If its data are not there.
    """
    run = task.run.but(device=device)
    if isinstance(run, CostRun) or run.data == "digits":
        return replace(task, run=run)
    if root is None:
        raise ValueError(
            f"root=None: {task.name} is trained on {run.data}, read from files; give their folder, "
            "or the folder that it is in, with --root"
        )
    sizes = reproductions()[task.name].sizes.values()
    folders = [size.folder for size in sizes if size.folder and _holds(size.cells, task.run)]
    if folders and not (root / "train").is_dir():
        root = _inside(root, folders[0], run)
    return replace(task, run=run.but(root=str(root)))


def _inside(root: Path, folder: str, run: PaperRun) -> Path:
    """A folder of that name, or for data with boxes also a zip file, where the root is not it."""
    boxes = run.detects
    if boxes and (root.is_file() or (root / "train.json").is_file()):
        return root
    looked = [root / folder, *([root / f"{folder}.zip"] if boxes else [])]
    found = next((path for path in looked if path.exists()), None)
    if found is None:
        held = (
            "train.json, test.json and their images, or COCO as it comes"
            if boxes
            else "the folders train and val and a folder per class in each"
        )
        more = " nor a zip file" if boxes else ""
        raise ValueError(
            f"root={str(root)!r}: there is no folder {folder!r}{more} in it, with {held}"
        )
    return found


def _holds(cells: Any, run: Job) -> bool:
    return any(cell.run.but(seed=run.seed) == run for cell in cells)


def make(
    tasks: list[Task], folder: Path, workers: int, on_progress: OnProgress, options: str
) -> Made:
    """Train what is missing, and put a row for each into the store as it is finished.

    Several processes may work on one store; each training is made by one of them. Costs are
    measured before, with no other process of this command at work.

    Args:
        tasks: Trainings, with root and device.
        folder: Of the store; checkpoints are kept in it, and a training that was stopped goes on.
        workers: Processes.
        on_progress: Called with a run's key, the epochs done, and its result at the end.
        options: What stands behind the name in the command that makes these rows.

    Returns:
        All rows, and how many are new.

    Raises:
        KeyboardInterrupt: After Ctrl-C; the processes are stopped first.
        ValueError: If data are missing or wrong.
        OSError: If the store cannot be written.
    """
    store = Store(folder / ROWS)
    waiting = to_train(tasks, store.rows(), folder)
    trained = [task.run for task in waiting if isinstance(task.run, PaperRun)]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for run in {(run.data, run.root): run for run in trained}.values():
        load(run)  # wrong data are found before anything is trained
    by_key = {task.run.key: task for task in waiting}
    begun = frozenset(run.key for run in trained if run.identity in starts())
    made_with = machine()
    counts = {"added": 0, "elsewhere": 0}

    def keep(key: str, epochs: int, result: Row | None) -> None:
        if result is not None and "elsewhere" in result:
            counts["elsewhere"] += 1
        elif result is not None:
            task = by_key[key]
            row = as_row(task, result, f"python -m papers {task.name}{options}", made_with)
            counts["added"] += store.append(row)
            if key not in begun:
                _weights_file(folder, task.run).unlink(missing_ok=True)
        on_progress(key, epochs, result)

    measured = [task.run for task in waiting if isinstance(task.run, CostRun)]
    if measured:
        in_processes(measured, folder, 1, keep, _measure)
    weighed = frozenset(key for key, task in by_key.items() if task.weighed)
    for first in (True, False):  # the others start from what these have trained
        runs = [run for run in trained if (run.key in begun) is first]
        if runs:
            in_processes(runs, folder, workers, keep, partial(_work, weighed, begun))
    return Made(store.rows(), **counts)


def as_row(task: Task, result: Row, command: str, made_with: Mapping[str, Any]) -> Row:
    """A row of the store.

    Args:
        task: What was trained.
        result: What `anybatch.tools.training.train` gave, and its weighing.
        command: What makes it again.
        made_with: Versions and machine.

    Returns:
        The row; where data and files lie on this machine is no part of it.
    """
    settings = {k: v for k, v in task.run.as_dict().items() if k not in ("root", "device")}
    return {
        "schema": SCHEMA,
        "id": task.run.identity,
        "settings": settings,
        "seed": task.run.seed,
        "command": command,
        "made_with": {**made_with, "device": result["device"]},
        "seconds": round(result["seconds"], 2),
        "finished": result["finished"],
        "result": _numbers(task.run, result),
    }


def _numbers(run: Job, result: Row) -> Row:
    """Return what the store keeps of a training or of a measurement of costs."""
    if isinstance(run, CostRun):
        return {name: result[name] for name in ("costs", "failed")}
    learned = objective(run)
    kept = {
        **{name: result[name] for name in learned.numbers},
        "test_loss": result["test_loss"],
        learned.curve: [round(row[learned.metric], 6) for row in result["epochs"]],
        "train_losses": [_short(row["train_loss"]) for row in result["epochs"]],
    }
    for name in ("weighing", "series"):
        if name in result:
            kept[name] = result[name]
    return kept


def _short(loss: float | None) -> float | None:
    return None if loss is None else float(f"{loss:.4g}")


_loaded: tuple[tuple[Any, ...], Dataset] | None = None


def _data(run: PaperRun) -> Dataset:
    """A run's data; those of the last run are still at hand."""
    global _loaded
    names = ("data", "root", "image_size", "train_size", "validation_size", "test_size")
    key = tuple(getattr(run, name) for name in names)
    if _loaded is None or _loaded[0] != key:
        _loaded = None  # not two of them at a time
        _loaded = (key, load(run))
    return _loaded[1]


def _work(
    weighed: frozenset[str], begun: frozenset[str], run: PaperRun, folder: Path, on_epoch: OnEpoch
) -> Row:
    """Train a run in a process, and tune its example weight where that is asked for.

    Args:
        weighed: Keys of the runs whose example weight is tuned.
        begun: Keys of those that others start from, whose weights are kept.
        run: The run.
        folder: Of the store.
        on_epoch: As `train` takes it.

    Returns:
        The result.
    """
    try:
        with FileLock(folder / "runs" / f".{run.key}.lock", timeout=0):
            data = _data(run)
            tunes = run.key in weighed
            keeps = tunes or run.key in begun
            initial = None if run.start_run is None else _weights(folder, run.start_run)
            result = train(run, folder, on_epoch, keeps, data, record(run), initial)
            weighing = {"weighing": _weighing(run, folder, data)} if tunes else {}
            return {**result, **weighing, "device": _device(run.device)}
    except Timeout:
        return {"elsewhere": True, "epochs": []}


def _weights(folder: Path, run: PaperRun) -> "Mapping[str, Tensor]":
    """Load the weights that a run has left."""
    import torch

    kept = torch.load(_trained(folder, run), map_location="cpu", weights_only=True)
    weights: Mapping[str, Tensor] = kept["model"]
    return weights


def _measure(run: CostRun, folder: Path, on_question: OnEpoch) -> Row:
    """Measure costs in a process of their own."""
    try:
        with FileLock(folder / "runs" / f".{run.key}.lock", timeout=0):
            return {**measure_costs(run, on_question), "device": _device(run.device)}
    except Timeout:
        return {"elsewhere": True, "epochs": []}


def _weighing(run: PaperRun, folder: Path, data: Dataset) -> Row:
    """Accuracy and loss over the example weight, on each half of the held-out examples."""
    pair = tuned_on_halves(run, _weights_file(folder, run), data, "top1")
    halves = [
        {
            "examples": one.examples,
            "best": one.best,
            "top1": [round(value, 6) for value in one.curves["top1"]],
            "loss": [round(value, 5) for value in one.curves["loss"]],
        }
        for one in pair
    ]
    return {"plain": pair[0].plain, "alphas": list(pair[0].alphas), "halves": halves}


def _device(name: str) -> str:
    import torch

    if torch.device(name).type != "cuda":
        return name
    return f"cuda, {torch.cuda.get_device_name(name)}"


def estimate(task: Task, rows: Mapping[str, Row], device: str) -> float:
    """About how many seconds a task takes in one process.

    Args:
        task: The task.
        rows: Of the store; runs of the same network at the same batch size are measured by them.
        device: Where it would be trained.

    Returns:
        Seconds.
    """
    kind = device.partition(":")[0]
    run = task.run
    alike: list[float] = [
        row["seconds"] / job_of(row["settings"]).epochs
        for row in rows.values()
        if row["made_with"]["device"].partition(",")[0] == kind and _alike(row["settings"], run)
    ]
    if alike:
        return run.epochs * sum(alike) / len(alike)
    kind = kind if kind in _RATE else "cpu"
    norm_batch_size: int | None = getattr(run, "norm_batch_size", None)
    parts = 1 if norm_batch_size is None else -(-run.batch_size // norm_batch_size)
    step = _STEP[kind] + (parts - 1) * _PART[kind]
    return task.flops / _RATE[kind] + task.steps * step


def _alike(settings: Mapping[str, Any], run: Job) -> bool:
    sizes = ("batch_size", "image_size", "train_size", "test_size", "validation_size")
    names: tuple[str, ...] = ("data", "model", *sizes)
    if isinstance(run, CostRun):
        names = ("model", "batch_size", "example", "methods", "questions", "rounds")
    own = run.as_dict()
    return all(name in settings and settings[name] == own[name] for name in names)
