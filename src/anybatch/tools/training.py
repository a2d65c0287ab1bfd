"""One training run, from its configuration to its numbers.

A plain loop: at batch 2 on digits a step takes half a millisecond, which a
trainer's bookkeeping would double.
"""

import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from anybatch.conversion import GammaDecay, convert, param_groups
from anybatch.conversion.observe import restored, seed
from anybatch.core.files import write_json, write_whole
from anybatch.core.nested import mapped
from anybatch.core.norm_layer import NormLayer
from anybatch.evaluation.dataset_statistics import dataset_statistics
from anybatch.layers import VirtualDataset, accumulate
from anybatch.registry import get_method
from anybatch.schedule import NormScheduler
from anybatch.tools.data import Dataset, load, steps_per_epoch
from anybatch.tools.examples import Examples
from anybatch.tools.images import ImageFiles, read_ahead
from anybatch.tools.network_factory import build
from anybatch.tools.networks import set_channels_last
from anybatch.tools.objective import objective
from anybatch.tools.run import Run, is_own

Row = dict[str, Any]
_READ = 500  # examples at a time
OnEpoch = Callable[[int, Row], None]


class Observer(Protocol):
    """Records a training, and keeps its place in the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""

    def series(self) -> Any:
        """Return the record, as plain data; it is kept in the result."""


Observe = Callable[[Run, nn.Module, int], Observer]


class Training(NamedTuple):
    """The network, optimizer, schedules and loss of a run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: torch.optim.lr_scheduler.LRScheduler
    progress: NormScheduler | None
    scaler: torch.amp.GradScaler
    loss: Callable[[Tensor, Any], Tensor]


def method_options(run: Run, steps: int) -> dict[str, Any]:
    """Options of a run's method: its own, and defaults that suit a short run."""
    usual: dict[str, Any] = {}
    if run.method == "brn" and not run.pretrained:  # its default warm-up is longer than a short run
        usual = {"warmup_steps": max(run.epochs * steps // 4, 1), "smooth": True}
    if run.method == "gn" and run.model != "mlp":
        usual = {"num_groups": 8}
    if run.method == "cbn" and (run.model == "mlp" or run.accumulate > 1):
        usual = {"burn_in": 0.0}  # the batch norm of a burn-in learns nothing from two values
    virtual = 0
    if run.converted and get_method(run.method).wraps:  # one row is no variance to (N, C)
        virtual = dict(run.options).get("num_virtual") or (2 if run.model == "mlp" else 1)
        usual["num_virtual"] = virtual
    if run.method not in ("gn", "ln", "in") and run.norm_batch_size is not None:
        usual["norm_batch_size"] = run.norm_batch_size + virtual
        if run.at_papers_settings:
            layer = inspect.signature(get_method(run.method).layer(2)).parameters
            usual |= {name: layer[name].default for name in get_method(run.method).when_cut}
    if run.centralize:
        usual["centralize"] = True
    if run.converted and "seed" in get_method(run.method).options:
        usual["seed"] = run.seed
    return usual | dict(run.options)


def _wrap(run: Run, model: nn.Module, data: Dataset, num_virtual: int) -> nn.Module:
    """Put virtual examples in front of a network's batches."""
    # Images in files or of bytes are standardized by what is known of such images.
    if isinstance(data.train_x, Examples):
        mean, std = dataset_statistics(data.train_x.split(_READ), progress=False)
    elif not isinstance(data.train_x, Tensor) or data.train_x.dtype == torch.uint8:
        mean, std = torch.zeros(data.shape[0]), torch.ones(data.shape[0])
    else:
        mean, std = dataset_statistics([data.train_x], progress=False)
    noisy = (std.square() + run.input_noise**2).sqrt()
    return VirtualDataset(model, mean, noisy, num_virtual, seed=run.seed)


def prepare(run: Run, data: Dataset, initial: Mapping[str, Tensor] | None = None) -> Training:
    """Build the network, convert it, and make its optimizer and schedules.

    `initial` is the state of a trained network that the run starts from, before conversion; a last
    layer for other classes stays fresh.
    """
    steps = steps_per_epoch(run, data)
    _seed(run.seed)
    model = build(run.model, data)
    _initialize(run, data, model)
    if initial is not None:
        _load_initial(model, initial)
    progress = None
    where = objective(run).prepare_norms(run, model)
    if run.converted:
        options = method_options(run, steps)
        num_virtual = options.pop("num_virtual", 0)
        model = convert(model, run.method, batch_size=run.statistics_size, where=where, **options)
        model = _wrap(run, model, data, num_virtual) if num_virtual else model
        if run.accumulate > 1 and any(isinstance(m, NormLayer) for m in model.modules()):
            accumulate(model, run.accumulate)
        if any(isinstance(m, NormLayer) for m in model.modules()):
            progress = NormScheduler(model, run.norm_epochs or run.epochs)
    model = model.to(run.device)
    if run.channels_last:
        set_channels_last(model)
    optimizer = _optimizer(run, model, data)
    learning_rate = _learning_rate(run, optimizer, steps)
    scaler = torch.amp.GradScaler(run.device, enabled=run.precision == "float16")
    loss = partial(objective(run).loss, run, data, model)
    if is_own(run.model):
        _check_fit(run, data, model, loss)
    return Training(model, optimizer, learning_rate, progress, scaler, loss)


def _seed(number: int) -> None:
    torch.manual_seed(number)
    seed(number)  # Python's and NumPy's numbers as well


@torch.no_grad()
def _initialize(run: Run, data: Dataset, model: nn.Module) -> None:
    """Let the lazy layers of a user's network see a batch."""
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        x, _ = next(objective(run).batches(run.but(device="cpu"), data, 1))
        model.eval()(x)
        model.train()


def _check_fit(
    run: Run, data: Dataset, model: nn.Module, loss: Callable[[Tensor, Any], Tensor]
) -> None:
    """Refuse a user's network that does not take the data, or gives what the loss does not take."""
    x, y = next(objective(run).batches(run, data, 1))
    try:
        with restored(model), torch.no_grad():
            model.eval()
            loss(*_micro_batches(run, x, y)[0])
    except Exception as error:  # anything can go wrong in there
        given = f"model={run.model!r}" if data.network is None else "model"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{given}: it does not fit the examples, of shape {tuple(x.shape[1:])} and with their "
            f"targets ({reason}); give data that it takes (on the command line --data mine.py:data)"
        ) from error


def _load_initial(model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    """Load a trained network's state, but for a last layer of another size."""
    own = model.state_dict()
    if own.keys() != initial.keys():
        differ = ", ".join(sorted(own.keys() ^ initial.keys()))
        raise ValueError(f"initial: it is not of this network, they differ in {differ}")
    other = [name for name in own if own[name].shape != initial[name].shape]
    if {name.rpartition(".")[0] for name in other} - {list(own)[-1].rpartition(".")[0]}:
        raise ValueError(f"initial: other shapes than this network's in {', '.join(other)}")
    kept = {name: value for name, value in initial.items() if name not in other}
    model.load_state_dict(kept, strict=False)


def _optimizer(run: Run, model: nn.Module, data: Dataset) -> torch.optim.Optimizer:
    parameters: Any = model.parameters()
    if run.norm_decay is not True or run.gamma_target:
        example = torch.zeros(2, *data.shape, device=run.device)
        parameters = param_groups(
            model, run.weight_decay, run.norm_decay, run.gamma_target, example_inputs=example
        )
    optimizer = torch.optim.SGD(
        parameters,
        lr=run.lr * run.batch_size / 64,
        momentum=run.momentum,
        weight_decay=run.weight_decay,
    )
    if any("gamma_target" in group for group in optimizer.param_groups):
        GammaDecay(optimizer)
    return optimizer


def _learning_rate(
    run: Run, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that is stepped with the optimizer."""
    if run.milestones:
        ends = [epoch * steps for epoch in run.milestones]
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.1 ** sum(step >= end for end in ends)
        )
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs * steps)


def step(run: Run, training: Training, x: Tensor, y: Any) -> Tensor:
    """One step of training, in as many micro-batches as the run has.

    Args:
        run: The run.
        training: What it trains with.
        x: Examples.
        y: Their targets.
    """
    training.optimizer.zero_grad()
    losses = []
    for some, targets in _micro_batches(run, x, y):
        loss = training.loss(some, targets) / run.accumulate
        training.scaler.scale(loss).backward()
        losses.append(loss.detach())
    training.scaler.step(training.optimizer)
    training.scaler.update()
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _micro_batches(run: Run, x: Tensor, y: Any) -> list[tuple[Tensor, Any]]:
    """The micro-batches of a step, with their targets."""
    size, parts = run.micro_batch_size, x.split(run.micro_batch_size)
    if len(parts) == 1:
        return [(x, y)]
    if hasattr(y, "split"):
        return list(zip(parts, y.split(size), strict=True))
    starts = range(0, len(x), size)
    targets = (mapped(itemgetter(slice(start, start + size)), y) for start in starts)
    return list(zip(parts, targets, strict=True))


def train(
    run: Run,
    folder: Path,
    on_epoch: OnEpoch | None = None,
    keep_weights: bool = False,
    data: Dataset | None = None,
    observe: Observe | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Row:
    """Train a run, or go on where it stopped, or give its result if it is finished.

    Args:
        run: The run.
        folder: Its result and its checkpoint are kept in ``folder / "runs"``.
        on_epoch: Called with the epochs done so far and the row of the last one.
        keep_weights: Leave run and trained weights beside the result, in a ``.pt``
            file; a finished run without one is trained again.
        data: Its data, where they are loaded already.
        observe: Makes an observer of the training from the run, its network and the steps in an
            epoch.
        initial: State that the network starts from, as `prepare` takes it.

    Returns:
        The result: the run, a row an epoch, final loss and numbers of the objective, seconds.
    """
    result = folder / "runs" / f"{run.key}.json"
    checkpoint, weights = result.with_suffix(".ckpt"), result.with_suffix(".pt")
    stored = stored_result(result, run)
    if stored is not None and (weights.is_file() or not keep_weights):
        return stored
    result.parent.mkdir(parents=True, exist_ok=True)
    data = load(run) if data is None else data
    if not len(data.test_y):
        raise ValueError(f"data={run.data!r}: there are no held-out examples; give some as well")
    training = prepare(run, data, initial)
    data = data.to(run.device)
    observer = None
    if observe is not None:
        observer = observe(run, training.model, steps_per_epoch(run, data))
    parts = _parts(training, observer)
    rows = _resume(run, parts, checkpoint)
    while len(rows) < run.epochs:
        rows.append(train_epoch(run, training, data, len(rows) + 1))
        if len(rows) < run.epochs:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"run": run.as_dict(), "epochs": rows}
            write_whole(checkpoint, partial(torch.save, state))
        if on_epoch is not None:
            on_epoch(len(rows), rows[-1])
    row = {
        "run": run.as_dict(),
        "key": run.key,
        "epochs": rows,
        **{name: rows[-1][name] for name in objective(run).numbers},
        "test_loss": rows[-1]["test_loss"],
        "seconds": sum(row["seconds"] for row in rows),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if observer is not None:
        row["series"] = observer.series()
    if keep_weights:
        trained = {"run": run.as_dict(), "model": training.model.state_dict()}
        write_whole(weights, partial(torch.save, trained))
    write_json(result, row)
    checkpoint.unlink(missing_ok=True)
    for half in result.parent.glob(f".{run.key}.*"):  # of a process that was killed as it wrote
        half.unlink(missing_ok=True)
    return row


def stored_result(path: Path, run: Run) -> Row | None:
    """The result of a finished run, None if there is none or it is another's."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        same = type(run).from_dict(row["run"]) == run and len(row["epochs"]) == run.epochs
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return row if same else None


def train_epoch(run: Run, training: Training, data: Dataset, epoch: int) -> Row:
    """Train for one epoch, from 1 on; its row.

    Each epoch has random numbers of its own, so that a training that goes on is the same.
    """
    _seed((run.seed << 20) + epoch)
    training.model.train()
    if run.small_epochs is not None and epoch > run.small_epochs:
        run = _with_whole_batches(run, training.model)
    start, total = time.perf_counter(), torch.zeros((), device=run.device)
    steps = objective(run).batches(run, data, epoch)
    if isinstance(data.train_x, ImageFiles):
        steps = read_ahead(steps)
    for x, y in steps:
        total += step(run, training, x, y)
        training.learning_rate.step()
    if training.progress is not None:
        training.progress.step()
    seconds = time.perf_counter() - start
    test_loss, numbers = objective(run).evaluate(run, training.model, data)
    train_loss = float(total) / steps_per_epoch(run, data)
    return {
        "epoch": epoch,
        "train_loss": train_loss if math.isfinite(train_loss) else None,
        "test_loss": None if test_loss is None or not math.isfinite(test_loss) else test_loss,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "seconds": seconds,
    }


def _with_whole_batches(run: Run, model: nn.Module) -> Run:
    """End `small_epochs`: each batch is one forward, with the statistics of all of it."""
    layers = [module for module in model.modules() if isinstance(module, NormLayer)]
    for layer in layers:
        layer.memories, layer.norm_batch_size = 1, None
    if layers and run.accumulate > 1:
        accumulate(model, 1)
    return run.but(norm_batch_size=None, accumulate=1, small_epochs=None)


def _parts(training: Training, observer: Observer | None) -> dict[str, Any]:
    """All that has a state, in the order in which it is loaded."""
    parts = {
        "progress": training.progress,
        "model": training.model,
        "optimizer": training.optimizer,
        "learning_rate": training.learning_rate,
        "scaler": training.scaler,
        "observer": observer,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _resume(run: Run, parts: Mapping[str, Any], checkpoint: Path) -> list[Row]:
    """Load the checkpoint of a run that was stopped; the rows of its epochs."""
    if not checkpoint.is_file():
        return []
    try:
        state = torch.load(checkpoint, map_location=run.device, weights_only=True)
        if type(run).from_dict(state["run"]) != run:
            raise ValueError("it belongs to another run")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as error:
        raise ValueError(
            f"{checkpoint}: cannot go on from it ({error}); delete it to start the run again"
        ) from error
    rows: list[Row] = state["epochs"]
    return rows
