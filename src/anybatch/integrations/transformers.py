"""A callback for the Trainer of Hugging Face's transformers, and loading of what was saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anybatch.conversion.convert import convert
from anybatch.conversion.saving import RECORD
from anybatch.core.norm_layer import NormLayer
from anybatch.integrations.course import Course, caller_is_running, check_method
from anybatch.layers.uncentered_norm_layer import settle_centring
from anybatch.layers.weight_centralization import UNCENTRED, weight_centralization

try:
    from safetensors.torch import load_file
    from transformers import TrainerCallback
    from transformers.utils.hub import cached_file
except ImportError as error:
    raise ImportError(
        "anybatch.integrations.transformers needs transformers: pip install transformers"
    ) from error

_FILE = "model.safetensors"


class NormCallback(TrainerCallback):
    """Take a converted model's norms through a transformers training.

    With a method, the Trainer's model is converted when the Trainer is made (`anybatch.convert`);
    without one, convert it before. Each epoch, the layers are told where training is
    (`anybatch.NormScheduler`). With ``gradient_accumulation_steps``, the forwards of an optimizer
    step are joined (`anybatch.accumulate`), however many they are. In float16, what methods average
    of gradients follows the scale of the loss (`anybatch.update_scaler`). After a training that an
    exception or Ctrl-C cut off, the model's next forward or ``state_dict()`` ends what was joined.
    The layers' state is in the model's ``state_dict``, and so in the Trainer's checkpoints.

    Args:
        method: Short name of a method (default None: the model is converted already).
        total_epochs: Epochs of the whole training (default None: the Trainer's, rounded up).
        accumulate: Whether the batches of an optimizer step are joined (default True).
        **options: To `anybatch.convert`: ``batch_size``, ``where``, ``example_inputs`` and the
            method's own.

    Raises:
        ValueError: For an unknown method, or options without one; at the start of training, where
            the model has no layer of this library.
        ImportError: Without transformers.

    Example:
        >>> callbacks = [NormCallback("mabn")]  # Trainer(model, arguments, callbacks=callbacks)
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        total_epochs: int | None = None,
        accumulate: bool = True,
        **options: Any,
    ) -> None:
        check_method(method, options)
        self.method = method
        self.options = options
        self.total_epochs = total_epochs
        self.accumulate = accumulate
        self._course: Course | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Convert the model, before a checkpoint is read."""
        if self.method is not None and model is not None:
            convert(model, self.method, **self.options)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        """Begin, or go on, where the Trainer is."""
        self._begin(args, state, control, model).follow(_scaler(more))

    def _begin(self, args: Any, state: Any, control: Any, model: Any) -> Course:
        if not any(isinstance(module, NormLayer) for module in model.modules()):
            self.on_init_end(args, state, control, model)  # of a model_init, or added late
        self._course = course = Course(
            model,
            self.total_epochs or state.num_train_epochs,
            int(state.epoch or 0),
            caller_is_running("transformers."),
        )
        if self.accumulate:
            course.begin_batch(args.gradient_accumulation_steps)
        return course

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Tell the layers the epoch."""
        # The callback may have been added to a training that runs.
        course = self._course or self._begin(args, state, control, model)
        course.go_to(int(state.epoch or 0))

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        """An optimizer step is done, however few batches it had."""
        course = self._course or self._begin(args, state, control, model)
        course.end_step()
        course.follow(_scaler(more))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the layers as a plain loop would have them."""
        if self._course is not None:
            self._course.end()


def _scaler(given: Mapping[str, Any]) -> Any:
    """The scaler of the loss that Accelerate updates with the optimizer, if there is one."""
    return getattr(given.get("optimizer"), "scaler", None)


def from_pretrained(kind: Any, folder: Any, *, example_inputs: Any = None, **options: Any) -> Any:
    """Load a network that was saved after `anybatch.convert`, with its methods and their state.

    Args:
        kind: The class to load with, such as ``AutoModelForImageClassification``.
        folder: What its ``from_pretrained`` takes.
        example_inputs: As `anybatch.convert` takes it, for networks that cannot be traced.
        **options: To its ``from_pretrained``.

    Returns:
        The network, as it was saved.

    Raises:
        ValueError: If the network was not saved after a conversion.

    Example:
        >>> from transformers import AutoModelForImageClassification
        >>> model = from_pretrained(AutoModelForImageClassification, "out")  # doctest: +SKIP
    """
    model = kind.from_pretrained(folder, **options)
    record = getattr(model.config, RECORD, None)
    if record is None:
        raise ValueError(
            f"folder={folder!r}: the network there was not saved after anybatch.convert; load it "
            "with its own from_pretrained and convert it"
        )
    delattr(model.config, RECORD)
    plain = set(model.state_dict())
    modules = dict(model.named_modules())
    for group in record["layers"]:
        names = [n for n in group["names"] if not isinstance(modules.get(n), nn.GroupNorm)]
        methods = dict.fromkeys(names, group["method"])
        if methods:
            how = {"centralize": False, "example_inputs": example_inputs, **group["options"]}
            convert(model, methods, **how)
    for name in record["centralized"]:
        weight_centralization(model.get_submodule(name))
    settle_centring(model)
    saved = _saved_tensors(folder, options)
    layers = tuple(f"{name}." for group in record["layers"] for name in group["names"])
    ours = {key for key in (*model.state_dict(), *saved) if key.startswith(layers)} - plain
    ours |= {f"{name}.{UNCENTRED}" for name in record["centralized"]}
    # With what torch's norms have as well: a conversion writes these by arithmetic.
    state = {key: value for key, value in saved.items() if key in ours or key.startswith(layers)}
    if lacking := ours - set(state):
        warnings.warn(
            f"folder={folder!r}: what methods remember of training is not there under the names of "
            f"{type(model).__name__}, such as {min(lacking)!r}, and starts fresh",
            stacklevel=2,
        )
    model.load_state_dict(state, strict=False)
    return model


def _saved_tensors(folder: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in the files of a saved network, by key."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    hub = {name: options[name] for name in names if name in options}

    def path(name: str, **more: Any) -> Any:
        return cached_file(folder, name, **hub, **more)

    whole = path(_FILE, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return dict(load_file(whole))
    index = json.loads(Path(path(f"{_FILE}.index.json")).read_text())
    parts = sorted(set(index["weight_map"].values()))
    return {key: value for part in parts for key, value in load_file(path(part)).items()}
