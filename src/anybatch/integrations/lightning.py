"""A callback for Lightning's `Trainer`: conversion, schedule and accumulation in one line."""

from __future__ import annotations

from typing import Any

from anybatch.conversion.convert import convert
from anybatch.integrations.course import Course
from anybatch.registry import get_method

try:
    import lightning.pytorch as framework
except ImportError:
    try:
        import pytorch_lightning as framework  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError(
            "anybatch.integrations.lightning needs Lightning: pip install lightning"
        ) from error


class NormCallback(framework.Callback):
    """Convert a LightningModule's norms and take them through training.

    - Before anything else of a ``fit``, ``validate``, ``test`` or ``predict``, before optimizers
      are made and checkpoints are read, the module is converted (`anybatch.convert`). Parameters
      stay the same objects.
    - Each epoch, the layers are told where training is (`anybatch.NormScheduler`).
    - With ``accumulate_grad_batches``, the batches of an optimizer step are joined
      (`anybatch.accumulate`), a shorter last step of an epoch included.

    Whatever the layers remember is in the module's ``state_dict`` and so in Lightning's
    checkpoints; a resumed run goes on where it was. Build the Trainer that reads such a checkpoint
    with the same callback.

    Args:
        method: Short name of a method, as `anybatch.convert` takes it; None where the module has
            been converted already.
        total_epochs: Epochs of the whole training (default None: the Trainer's ``max_epochs``).
            Needed by methods with a schedule where the Trainer is limited by steps or time alone.
        accumulate: Whether the batches of an optimizer step are joined (default True).
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
        **options: Any,
    ) -> None:
        super().__init__()
        if method is not None:
            get_method(method)
        elif options:
            raise ValueError(f"options {', '.join(options)} are of a method: give method=, too")
        self.method = method
        self.total_epochs = total_epochs
        self.accumulate = accumulate
        self.options = options
        self._converted: Any = None
        self._course: Course | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Convert the module, once."""
        if self.method is not None and self._converted is not pl_module:
            convert(pl_module, self.method, **self.options)
            self._converted = pl_module

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on, where the Trainer is."""
        most = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        self._course = Course(
            pl_module,
            self.total_epochs or most,
            trainer.current_epoch,
            trainer.accumulate_grad_batches if self.accumulate else 1,
        )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the layers the epoch."""
        assert self._course is not None
        self._course.go_to(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning steps after the last batch of an epoch, however few there were."""
        assert self._course is not None
        self._course.end_step()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the layers as a plain loop would have them."""
        if self._course is not None:
            self._course.end()
            self._course = None
