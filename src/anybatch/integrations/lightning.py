"""A callback for Lightning's `Trainer`: conversion, schedule and accumulation in one line."""

from __future__ import annotations

import warnings
from typing import Any

from anybatch.conversion.convert import convert
from anybatch.core.norm_layer import NormLayer
from anybatch.evaluation.recalibration import recalibrate
from anybatch.integrations.course import Course, check_method

try:
    import lightning.pytorch as framework
except ImportError:
    try:
        import pytorch_lightning as framework  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError(
            "anybatch.integrations.lightning needs Lightning: pip install lightning"
        ) from error

_ACCUMULATES = framework.callbacks.GradientAccumulationScheduler
_COPIES: tuple[type, ...] = ()  # of the module when a fit begins; Lightning 2.6 and later
if hasattr(framework.callbacks, "WeightAveraging"):
    _COPIES = (framework.callbacks.WeightAveraging,)
_SETTLED = 0.01  # a change of statistics, in standard deviations, that ends the recalibration


class NormCallback(framework.Callback):
    """Convert a LightningModule's norms and take them through training.

    - Before anything else of a ``fit``, ``validate``, ``test`` or ``predict``, before optimizers
      are made and checkpoints are read, the module is converted (`anybatch.convert`). Parameters
      stay the same objects.
    - Each epoch, the layers are told where training is (`anybatch.NormScheduler`).
    - With ``accumulate_grad_batches`` or Lightning's ``GradientAccumulationScheduler``, forwards of
      an optimizer step are joined (`anybatch.accumulate`). A step ends with the optimizer's, after
      any number of forwards; a fit that fails or is interrupted leaves nothing joined. With
      manual optimization, call `anybatch.accumulate` with the optimizer.
    - In float16, what methods average of gradients follows the scale of the loss
      (`anybatch.update_scaler`).
    - After ``StochasticWeightAveraging``, ``WeightAveraging`` or ``EMAWeightAveraging``, whose
      averaged weights do not match the running statistics, these are recalibrated
      (`anybatch.recalibrate`) at the end of the fit. Checkpoints and validation within the fit see
      the statistics as they were.
    - With ``BackboneFinetuning``, layers of the backbone are treated as its batch norms. List it
      before this callback.

    The layers' state is in the module's ``state_dict`` and so in Lightning's checkpoints; a resumed
    run goes on where it was. Build the Trainer that reads such a checkpoint with the same callback.

    Args:
        method: Short name of a method, as `anybatch.convert` takes it; None where the module has
            been converted already.
        total_epochs: Epochs of the whole training (default None: the Trainer's ``max_epochs``).
            Needed by methods with a schedule where the Trainer is limited by steps or time alone.
        accumulate: Whether the batches of an optimizer step are joined (default True).
        recalibrate_batches: Batches of the training data to recalibrate on after an averaging of
            weights (default 100; 0: a warning instead).
        **options: To `anybatch.convert`: ``batch_size``, ``where``, ``example_inputs`` and the
            method's own.

    Raises:
        ValueError: For an unknown method; at the start of a fit, where a method has a schedule and
            the number of epochs is not known.
        ImportError: Without Lightning.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[NormCallback("mabn")])  # doctest: +SKIP
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        total_epochs: int | None = None,
        accumulate: bool = True,
        recalibrate_batches: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        check_method(method, options)
        self.method = method
        self.total_epochs = total_epochs
        self.accumulate = accumulate
        self.recalibrate_batches = recalibrate_batches
        self.options = options
        self._converted: Any = None
        self._course: Course | None = None
        self._steps = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Convert the module, once, and treat the layers of a finetuned backbone as its norms."""
        if stage == "fit":
            self._check_order(trainer)
        if self.method is not None and self._converted is not pl_module:
            convert(pl_module, self.method, **self.options)
            self._converted = pl_module
        if stage == "fit":
            for layer in _backbone_layers(trainer, pl_module):
                layer.requires_grad_(not layer.affine_frozen)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on, where the Trainer is."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: Any, pl_module: Any) -> Course:
        if self.method is not None and self._converted is not pl_module:
            self.setup(trainer, pl_module, "fit")  # added to a fit that runs
        most = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        epochs = self.total_epochs or most
        self._course = course = Course(pl_module, epochs, trainer.current_epoch)
        schedules = [c for c in trainer.callbacks if isinstance(c, _ACCUMULATES)]
        course.follow(trainer.scaler)
        if self.accumulate and any(c.going_to_accumulate_grad_batches() for c in schedules):
            course.check_joinable()
        self._steps = trainer.global_step
        if not self.recalibrate_batches and _averages(trainer):
            self._warn(_averages(trainer)[0], "recalibrate_batches=0")
        return course

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the layers the epoch."""
        course = self._course or self._begin(trainer, pl_module)
        course.go_to(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Join the batches of an optimizer step, whose number may change with the epoch."""
        course = self._course or self._begin(trainer, pl_module)
        if trainer.global_step != self._steps:
            course.end_step()
            self._steps = trainer.global_step
        course.begin_batch(trainer.accumulate_grad_batches if self.accumulate else 1)
        for layer in _backbone_layers(trainer, pl_module, frozen=True):
            layer.requires_grad_(False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Follow the scale of the loss, before a checkpoint is written."""
        if self._course is not None:
            self._course.follow(trainer.scaler)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate after other callbacks have put averaged weights into the module."""
        averages = _averages(trainer)
        if not averages or not self.recalibrate_batches:
            return
        self._end()
        try:
            recalibrate(
                pl_module,
                trainer.train_dataloader,
                forward=None if _has_forward(pl_module) else _run_training_step,
                max_batches=self.recalibrate_batches,
                tolerance=_SETTLED,
            )
        except Exception as error:  # at the end of a long fit: the weights are not lost
            self._warn(averages[0], f"{type(error).__name__}: {error}")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the layers as a plain loop would have them, where a fit fails or is interrupted."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the layers as a plain loop would have them."""
        self._end()

    def _end(self) -> None:
        if self._course is not None:
            self._course.end()
            self._course = None

    def _check_order(self, trainer: Any) -> None:
        """Refuse an order of callbacks in which one would copy or freeze the wrong layers."""
        own = trainer.callbacks.index(self)
        for callback in trainer.callbacks[own + 1 :]:
            if isinstance(callback, framework.callbacks.BackboneFinetuning):
                raise ValueError(
                    "callbacks: BackboneFinetuning freezes the layers that NormCallback has made; "
                    "list BackboneFinetuning before NormCallback"
                )
        for callback in trainer.callbacks[:own] if self.method is not None else ():
            if isinstance(callback, _COPIES):
                name = type(callback).__name__
                raise ValueError(
                    f"callbacks: {name} copies the module before NormCallback converts it; list "
                    f"NormCallback before {name}"
                )

    def _warn(self, callback: Any, reason: str) -> None:
        warnings.warn(
            f"{type(callback).__name__} averages weights, which the running statistics do not "
            f"match, and NormCallback does not recalibrate them ({reason}); after the fit, call "
            "anybatch.recalibrate(module, loader)",
            stacklevel=3,
        )


def _averages(trainer: Any) -> list[Any]:
    """The callbacks that put averaged weights into the module."""
    kinds = (framework.callbacks.StochasticWeightAveraging, *_COPIES)
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]


def _backbone_layers(trainer: Any, pl_module: Any, frozen: bool = False) -> list[NormLayer]:
    """Layers of a backbone that `BackboneFinetuning` trains, or, if `frozen`, does not train."""
    for callback in trainer.callbacks:
        if isinstance(callback, framework.callbacks.BackboneFinetuning):
            late = trainer.current_epoch >= callback.unfreeze_backbone_at_epoch
            if frozen == (late and not callback.train_bn):
                return [m for m in pl_module.backbone.modules() if isinstance(m, NormLayer)]
    return []


def _has_forward(pl_module: Any) -> bool:
    return type(pl_module).forward is not framework.LightningModule.forward


def _run_training_step(pl_module: Any, batch: Any) -> None:
    """Run a training step for its forwards alone."""
    for name in ("log", "log_dict"):  # `recalibrate` puts attributes back
        pl_module.__dict__[name] = lambda *_, **__: None
    pl_module.training_step(batch, 0)
