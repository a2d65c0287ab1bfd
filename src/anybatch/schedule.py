"""A scheduler that tells the layers the epoch, and may switch the method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from anybatch.conversion.convert import convert, refuse_impossible
from anybatch.conversion.norm_types import check_bare, is_batch_norm
from anybatch.conversion.plan import decide
from anybatch.conversion.relu_fusion.fused_block import fusions
from anybatch.core.arguments import check_count, check_module, shown
from anybatch.core.norm_layer import NormLayer
from anybatch.core.notices import NoEffectWarning
from anybatch.core.reduction_scope import WORLD, active_group
from anybatch.layers.control import is_independent
from anybatch.layers.uncentered_norm_layer import UncenteredNormLayer
from anybatch.layers.virtual_dataset import VirtualDataset
from anybatch.registry import get_method


class NormScheduler:
    """Tells the layers of a network the epoch, and may switch the method at an epoch.

    It is used like torch's learning rate schedulers: make it before training, which starts epoch 1,
    and step it once after each epoch. Momentum batch norm takes the weight of its averages from the
    epoch (momentum-bn, equation 11), batch normalization sampling draws new positions (bn-sampling,
    section 4.1), and cross-iteration batch norm ends its burn-in. Other methods ignore it.

    To resume a run, load the scheduler's state *before* the model's: loading repeats the method
    switches that were due, so that the model has the layers that its checkpoint was made with.

    Args:
        model: the network, converted or about to be.
        total_epochs: how many epochs training will have, from 1.
        switch: epoch -> method from that epoch on, as `convert` takes it; `{8: "bn"}` trains
            epochs 1 to 7 as the model is and the rest with batch norm. Epochs count from 1. With
            DistributedDataParallel, give the scheduler the bare model; before a switch to "mabn"
            call `average_running_stats`, as it moves running means into shifts, and for one to
            "frozen" wrap with ``find_unused_parameters=True``.
        last_epoch: how many epochs are done already (default 0).

    Attributes:
        epoch: the epoch that is running, from 1 to `total_epochs`.

    Raises:
        ValueError: numbers out of range, an unknown method, a model without layers to schedule or
            norms to switch, a first switch that `convert` would refuse, or a switch of a model that
            is itself a norm (it could not be exchanged in place) or a `VirtualDataset` (which
            trains no other method).

    Example:
        >>> import anybatch
        >>> model = nn.Sequential(anybatch.MomentumBatchNorm1d(3))
        >>> scheduler = NormScheduler(model, total_epochs=2, switch={2: "bn"})
        >>> scheduler.step()
        >>> scheduler.epoch, type(model[0]).__name__
        (2, 'BatchNorm1d')
    """

    def __init__(
        self,
        model: nn.Module,
        total_epochs: int,
        *,
        switch: Mapping[int, str] | None = None,
        last_epoch: int = 0,
    ) -> None:
        check_module("model", model)
        check_count("total_epochs", total_epochs)
        check_count("last_epoch", last_epoch, 0)
        _check_done(last_epoch, total_epochs)
        self.model = model
        self.total_epochs = total_epochs
        self.switch = _checked_switch(switch, total_epochs)
        if self.switch:
            check_bare(model)
        norms = [module for module in model.modules() if is_batch_norm(module)]
        ours = any(isinstance(norm, NormLayer) for norm in norms)
        if not (ours or is_independent(model) or (self.switch and norms)):
            raise ValueError(
                f"model: {type(model).__name__} has no anybatch layer, so nothing would be "
                'scheduled: convert it first, for example with anybatch.convert(model, "mbn")'
            )
        if self.switch and is_batch_norm(model):
            raise ValueError(
                f"switch={switch!r}: the model is itself a norm, which cannot be exchanged in "
                "place: put it into a torch.nn.Sequential"
            )
        self._check_first_switch()
        self.last_epoch = last_epoch
        self._switched = 0  # the epoch of the last switch that was made
        self._apply()

    @property
    def epoch(self) -> int:
        """The epoch that is running, from 1 to `total_epochs`."""
        return min(self.last_epoch + 1, self.total_epochs)

    def step(self) -> None:
        """Begin the next epoch; beyond the last one nothing moves any more.

        Example:
            >>> import anybatch
            >>> scheduler = NormScheduler(anybatch.MomentumBatchNorm1d(3), total_epochs=2)
            >>> for _ in range(5): scheduler.step()
            >>> scheduler.epoch
            2
        """
        self.last_epoch = min(self.last_epoch + 1, self.total_epochs)
        self._warn_of_replicas()
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, as plain data.

        Returns:
            `last_epoch`, `total_epochs` and `switch`.

        Example:
            >>> import anybatch
            >>> NormScheduler(anybatch.BatchNorm1d(3), total_epochs=9).state_dict()
            {'last_epoch': 0, 'total_epochs': 9, 'switch': {}}
        """
        return {
            "last_epoch": self.last_epoch,
            "total_epochs": self.total_epochs,
            "switch": dict(self.switch),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a saved run was: its epoch, and the method switches that were due.

        Load the model's state afterwards, so that it finds the layers it was made with.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: the state lacks something, or the model was switched already at an epoch
                that the state has not reached: switches cannot be undone.

        Example:
            >>> import anybatch
            >>> scheduler = NormScheduler(anybatch.BatchNorm1d(3), total_epochs=9)
            >>> scheduler.load_state_dict({"last_epoch": 3, "total_epochs": 9, "switch": {}})
            >>> scheduler.epoch
            4
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state={shown(state)}: give a state_dict()")
        missing = {"last_epoch", "total_epochs", "switch"} - set(state)
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}: give a state_dict()")
        last_epoch, total_epochs = state["last_epoch"], state["total_epochs"]
        check_count("total_epochs", total_epochs)
        check_count("last_epoch", last_epoch, 0)
        _check_done(last_epoch, total_epochs)
        switch = _checked_switch(state["switch"], total_epochs)
        if self._switched > min(last_epoch + 1, total_epochs):
            raise ValueError(
                f"state is in epoch {last_epoch + 1}, but the model was switched to "
                f"{self.switch[self._switched]!r} at epoch {self._switched}, which cannot be "
                "undone: load into a newly built model"
            )
        self.last_epoch, self.total_epochs, self.switch = last_epoch, total_epochs, switch
        with warnings.catch_warnings():  # of norms whose statistics are loaded afterwards
            warnings.simplefilter("ignore", NoEffectWarning)
            self._apply()

    def _check_first_switch(self) -> None:
        """Raise now if the first switch would be refused in its epoch."""
        for epoch in sorted(self.switch)[:1]:
            if any(isinstance(module, VirtualDataset) for module in self.model.modules()):
                raise ValueError(
                    f"switch={self.switch!r}: a VirtualDataset trains no other method than those "
                    "with virtual examples; convert its .model after the training with them"
                )
            method = self.switch[epoch]
            try:
                refuse_impossible(decide(self.model, method, centralize=False))
            except ValueError as error:
                raise ValueError(f"switch to {method!r} at epoch {epoch}: {error}") from error

    def _warn_of_replicas(self) -> None:
        """Warn where each process is about to move its own running means into shared shifts."""
        method = self.switch.get(self.epoch)
        if self._switched >= self.epoch or method is None or not _folds_means(method):
            return
        norms = [module for module in self.model.modules() if is_batch_norm(module)]
        joined = all(isinstance(one, NormLayer) and one.process_group is not None for one in norms)
        if joined or active_group(WORLD) is None:
            return
        warnings.warn(
            f"switch at epoch {self.epoch}: {method!r} has no running mean, moves it into the "
            "shift, and each of several processes has its own. Unless you have just called "
            "anybatch.average_running_stats(model), the replicas' parameters differ from now on",
            stacklevel=3,
        )

    def _apply(self) -> None:
        """Make the switches that are due, then tell every layer the epoch."""
        for epoch in sorted(self.switch):
            if self._switched < epoch <= self.epoch:
                # A resumed model is fresh where the first run's was trained: never centralize.
                fuse = any(fusions(self.model))
                convert(self.model, self.switch[epoch], centralize=False, fuse=fuse)
                self._switched = epoch
        for module in self.model.modules():
            if isinstance(module, NormLayer):
                module.set_progress(self.epoch, self.total_epochs)


def _folds_means(method: str) -> bool:
    """True if a method's layers fold running means into shifts."""
    return issubclass(get_method(method).layer(2), UncenteredNormLayer)


def _check_done(last_epoch: int, total_epochs: int) -> None:
    if last_epoch > total_epochs:
        raise ValueError(
            f"last_epoch={last_epoch}: training has total_epochs={total_epochs}; give how many of "
            "them are done"
        )


def _checked_switch(switch: Mapping[int, str] | None, total_epochs: int) -> dict[int, str]:
    """Check epochs and method names; json turns whole numbers into text, so that is taken too."""
    checked = {}
    if switch is not None and not isinstance(switch, Mapping):
        raise TypeError(f"switch={shown(switch)}: give epochs and methods, as in {{8: 'bn'}}")
    for epoch, method in (switch or {}).items():
        number = int(epoch) if isinstance(epoch, str) and epoch.isdigit() else epoch
        check_count("switch's epochs", number)
        if number > total_epochs:
            raise ValueError(
                f"switch at epoch {number} never happens: total_epochs={total_epochs}; give "
                f"epochs from 1 to {total_epochs}"
            )
        if get_method(method).wraps:
            raise ValueError(
                f"switch={switch!r}: {method!r} wraps the network, which cannot be done in place; "
                "train with it from the start, or not"
            )
        checked[number] = method
    return checked
