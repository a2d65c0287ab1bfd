"""Base of layers that may have no mean: how they start from a batch norm and load checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from anybatch.core.norm_layer import NormLayer
from anybatch.layers.weight_centralization import is_centralized, match_centralization

WEIGHTS_CENTRED = "centred_weights"  # name in a checkpoint: whether those before the layer were


class UncenteredNormLayer(NormLayer):
    """A layer whose uncentered form has no mean; the weights before it may be centralized."""

    _feeder: tuple[nn.Module, ...] = ()

    @property
    def feeder(self) -> nn.Module | None:
        """The layer before this one, whose weights checkpoints tell of; None if there is none."""
        return self._feeder[0] if self._feeder else None

    def follow(self, module: nn.Module) -> None:
        """Keep the layer before this one, whose weights may be centred, for checkpoints.

        A checkpoint tells whether it was trained with centred weights. Where it was not, the layer
        uses its weights as they are from the load on, and the other way round.
        """
        self.__dict__["_feeder"] = (module,)  # a tuple: it is no part of this layer

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.feeder is not None:
            centred = torch.tensor(int(is_centralized(self.feeder)), device="cpu")
            destination[prefix + WEIGHTS_CENTRED] = centred

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        told = state_dict.get(prefix + WEIGHTS_CENTRED)
        own = {key: v for key, v in state_dict.items() if key != prefix + WEIGHTS_CENTRED}
        super()._load_from_state_dict(own, prefix, local_metadata, *rest)
        known = told is not None and not told.is_meta
        centred = bool(told) if known else local_metadata.get("centralized")
        if centred is None and not any(prefix + name in state_dict for name in self.method_state):
            count = state_dict.get(prefix + "num_batches_tracked")
            mean = state_dict.get(prefix + "running_mean")
            evidence = mean if count is None else count
            if evidence is not None and bool(evidence.any()):  # of a trained batch norm
                centred = False
        if centred is not None and prefix + "running_mean" in state_dict:
            why = match_centralization(prefix[:-1], self.feeder, centred, told=known)
            if why is not None:
                rest[-1].append(why)

    # --- from a batch norm -------------------------------------------------

    def adopt_(self, norm: torch.nn.Module) -> UncenteredNormLayer:
        super().adopt_(norm)
        if isinstance(norm, UncenteredNormLayer):
            self.__dict__["_feeder"] = norm._feeder
        obstacle = self._absorb_mean()
        if obstacle is not None:
            raise ValueError(obstacle)
        return self

    def _start_from_batchnorm(self, error_msgs: list[str], prefix: str) -> None:
        self.reset_memory()
        obstacle = self._absorb_mean()
        if obstacle is not None:
            error_msgs.append(f"{prefix}running_mean: {obstacle}")

    @torch.no_grad()
    def _absorb_mean(self) -> str | None:
        """Move a running mean into scale and shift: the uncentred form has none.

        ``var + mean**2`` is the second moment that the uncentred form divides by.

        Returns:
            Why it cannot be done, or None. State is changed only if it can.
        """
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or self.centered or mean.is_meta:
            return None
        if self.weight is None or self.bias is None:
            if bool(mean.any()):
                lacking = "affine=False" if self.weight is None else "bias=False"
                return (
                    f"{lacking} with a running mean that is not 0: {type(self).__name__} has "
                    "no mean and no bias to move it to; use centered=True"
                )
            return None
        second = torch.addcmul(var, mean, mean)
        inverse = torch.rsqrt(var + self.eps)
        self.bias.sub_(self.weight * mean * inverse)
        self.weight.mul_((second + self.eps).sqrt_() * inverse)
        self.running_mean, self.running_var = torch.zeros_like(mean), second
        return None


def settle_centring(model: nn.Module) -> None:
    """Let one entry of a checkpoint tell of centred weights: a norm's, else the layer's own."""
    followed = {
        layer.feeder
        for layer in model.modules()
        if isinstance(layer, UncenteredNormLayer) and layer.feeder is not None
    }
    for module in filter(is_centralized, model.modules()):
        if module in followed:
            module.__dict__["tells_centred"] = False
        else:
            module.__dict__.pop("tells_centred", None)
