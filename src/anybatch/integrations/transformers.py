"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from typing import Any

from anybatch.integrations.course import Course, caller_is_running

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "anybatch.integrations.transformers needs transformers: pip install transformers"
    ) from error


class NormCallback(TrainerCallback):
    """Take a converted model's norms through a transformers training.

    Convert the model before the Trainer is made: ``anybatch.convert(model, "mabn")``. Each epoch,
    the layers are told where training is (`anybatch.NormScheduler`). With
    ``gradient_accumulation_steps``, the forwards of an optimizer step are joined
    (`anybatch.accumulate`), however many they are. After a training that an exception or Ctrl-C
    cut off, the model's next forward or ``state_dict()`` ends what was joined. The layers' state is
    in the model's ``state_dict``, and so in the Trainer's checkpoints.

    Args:
        total_epochs: Epochs of the whole training (default None: the Trainer's, rounded up).
        accumulate: Whether the batches of an optimizer step are joined (default True).

    Raises:
        ValueError: At the start of training, where the model has no layer of this library.
        ImportError: Without transformers.

    Example:
        >>> callbacks = [NormCallback()]  # Trainer(model, arguments, callbacks=callbacks, ...)
    """

    def __init__(self, *, total_epochs: int | None = None, accumulate: bool = True) -> None:
        self.total_epochs = total_epochs
        self.accumulate = accumulate
        self._course: Course | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Begin, or go on, where the Trainer is."""
        self._course = Course(
            model,
            self.total_epochs or state.num_train_epochs,
            int(state.epoch or 0),
            caller_is_running("transformers."),
        )
        if self.accumulate:
            self._course.begin_batch(args.gradient_accumulation_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the layers the epoch."""
        assert self._course is not None
        self._course.go_to(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An optimizer step is done, however few batches it had."""
        assert self._course is not None
        self._course.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the layers as a plain loop would have them."""
        assert self._course is not None
        self._course.end()
