"""Virtual dataset normalization (bn-sampling, section 4.2): random examples around a network."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import check_count
from anybatch.core.grouping import successive
from anybatch.core.nested import mapped
from anybatch.core.tensor_subclasses import on_plain
from anybatch.layers.sample_positions import drawn_seed
from anybatch.layers.sampled_batch_norm import SampledBatchNorm

Moments = float | Sequence[float] | Tensor
_STATE = ("virtual_seed", "virtual_step")


class VirtualDataset(nn.Module):
    """A network that trains on virtual examples in front of every batch.

    In training it puts `num_virtual` random examples in front of the batch, normal with the
    dataset's mean and standard deviation of each channel, fresh in each forward. The network's
    `SampledBatchNorm` layers with a virtual sample take statistics from these rows; the rows are
    stripped from everything that comes out. The gradient passes their activations, as it passes
    those of any example behind statistics. In evaluation mode the network alone runs.

    Tensors that come out and have a row an example, virtual ones included, lose the virtual rows,
    in nests of tuples, lists, mappings and dataclasses; all else is passed on. A loss or an average
    over the batch within the network would contain the virtual rows: compute it outside.

    Where the layers have a `norm_batch_size` of k (section 5.3), each of their normalization
    batches begins with virtual examples of its own, followed by k - `num_virtual` of the batch.

    Args:
        model: The network, converted to `vdn`, `fs+vdn` or `bs+vdn`, before or afterwards.
        mean: Mean of each channel of the dataset, as `anybatch.dataset_statistics` gives it, or a
            number for all. For several inputs a mapping from position or name to the mean of each.
            It belongs to the first floating-point tensor otherwise. Other tensors with as many
            rows get their own first rows as virtual ones.
        std: Standard deviation, likewise.
        num_virtual: Virtual examples (default 1), of each process. Where a batch norm sees
            ``(N, C)``, one example is one value a channel, which has no variance: give 2 or more.
        seed: Of the virtual examples (default None: drawn from `generator`).
        generator: What the seed is drawn from (default None: torch's on the CPU).
        ranks: Processes of ``torch.distributed``, by rank, that have virtual examples (default
            None: each; section 4.3). The layers must synchronize: convert with a
            `process_group`.

    Raises:
        ValueError: For an argument out of range, a network without layers that look at virtual
            examples, or one that returns nothing with a row an example.
        TypeError: For inputs that are lists of pictures, as detection networks take.

    Source: bn-sampling, section 4.2 and algorithm 3.

    Example:
        >>> import torch, anybatch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> net = VirtualDataset(anybatch.convert(net, "vdn"), mean=[0.5] * 3, std=[0.2] * 3)
        >>> net(torch.rand(8, 3, 5, 5)).shape
        torch.Size([8, 4, 3, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Moments | Mapping[int | str, Moments],
        std: Moments | Mapping[int | str, Moments],
        num_virtual: int = 1,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_count("num_virtual", num_virtual)
        if ranks is not None and not list(ranks):
            raise ValueError("ranks=[]: give the processes that have virtual examples")
        self.ranks = None if ranks is None else tuple(ranks)
        self.model, self.num_virtual = model, num_virtual
        self.mean, self.std = _by_input("mean", mean), _by_input("std", std)
        if self.mean.keys() != self.std.keys():
            raise ValueError(
                f"std is of {list(self.std)}: give it of {list(self.mean)} as the mean"
            )
        if any(bool((value < 0).any()) for value in self.std.values()):
            raise ValueError(f"std={std!r}: give numbers from 0 on")
        self.seed = drawn_seed(seed, generator)
        self.step = 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network; what it returns is of the batch alone."""
        if not self.training:
            return self.model(*inputs, **named)
        layers = self._layers()
        given: dict[int | str, Any] = dict(enumerate(inputs))
        given.update(named)
        rows = _rows(given, self.mean)
        self.step += not in_backward()  # a checkpointed forward that runs again draws the same
        if not self._is_here(layers):
            with _virtual_rows(layers.values(), 0):
                return self.model(*inputs, **named)
        parts = self._parts(rows, layers)
        grown = {key: self._grow(key, value, parts, given) for key, value in given.items()}
        with _virtual_rows(layers.values(), self.num_virtual):
            output = self.model(
                *(grown[position] for position in range(len(inputs))),
                **{name: grown[name] for name in named},
            )
        stripped = _Strip([part + self.num_virtual for part in parts], self.num_virtual)
        output = mapped(stripped, output)
        if not stripped.done:
            raise ValueError(
                f"model: {type(self.model).__name__} returned no tensor with a row an example, "
                f"{sum(stripped.parts)} here, from which virtual ones could be stripped: let it "
                "return tensors with the batch in front, and compute losses outside"
            )
        return output

    def _parts(self, rows: int, layers: Mapping[str, SampledBatchNorm]) -> list[int]:
        """Examples of a batch behind each group of virtual ones."""
        size = self._norm_batch_size(layers)
        return [rows] if size is None else list(successive(rows, size - self.num_virtual)) or [0]

    def grown(self, values: Tensor, virtual: int) -> Tensor:
        """A value for each example, with that of the virtual ones in front of each part.

        Args:
            values: One for each example of the batch, ``(N,)``.
            virtual: That of virtual examples.
        """
        parts = values.split(self._parts(len(values), self._layers()))
        ahead = values.new_full((self.num_virtual,), virtual)
        return torch.cat([row for part in parts for row in (ahead, part)])

    def _is_here(self, layers: Mapping[str, SampledBatchNorm]) -> bool:
        """True if this process has virtual examples."""
        if self.ranks is None:
            return True
        for name, layer in layers.items():
            if layer.process_group is None:
                raise ValueError(
                    f"ranks={list(self.ranks)}: {name} does not synchronize with the processes "
                    "that have virtual examples; convert the network with process_group='world'"
                )
        together = dist.is_available() and dist.is_initialized()
        return (dist.get_rank() if together else 0) in self.ranks

    def _layers(self) -> dict[str, SampledBatchNorm]:
        """The layers that look at virtual examples."""
        modules = self.model.named_modules()
        found = {n: m for n, m in modules if isinstance(m, SampledBatchNorm) and m.is_virtual}
        if not found:
            raise ValueError(
                f"model: {type(self.model).__name__} has no layer that looks at virtual examples: "
                'convert it first, for example with anybatch.convert(model, "vdn"); after a '
                "conversion to another method, train its .model"
            )
        for name, layer in found.items():
            if layer.num_virtual not in (None, self.num_virtual):
                raise ValueError(
                    f"{name}: num_virtual={layer.num_virtual}, but the network has "
                    f"{self.num_virtual} virtual examples; leave it None"
                )
        return found

    def _norm_batch_size(self, layers: Mapping[str, SampledBatchNorm]) -> int | None:
        """Rows of a normalization batch, virtual ones included; None for one of all."""
        sizes = {name: layer.norm_batch_size for name, layer in layers.items()}
        name, size = next(iter(sizes.items()))
        other = next((name for name, one in sizes.items() if one != size), None)
        if other is not None:
            raise ValueError(
                f"{other}: norm_batch_size={sizes[other]}, but {size} in {name}; give all layers "
                "the same"
            )
        if size is not None and size <= self.num_virtual:
            raise ValueError(
                f"{name}: norm_batch_size={size} has no room beside num_virtual="
                f"{self.num_virtual}; it counts both"
            )
        return size

    def _grow(
        self, key: int | str, value: Any, parts: list[int], given: Mapping[int | str, Any]
    ) -> Any:
        """An input with virtual rows in front of each part."""
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != sum(parts):
            return value
        mine = None if None in self.mean and key == _first(given) else key
        pieces = value.split(parts)
        if mine in self.mean:
            rows = self._draw(mine, list(given).index(key), value, len(parts) * self.num_virtual)
            virtual = rows.split(self.num_virtual)
        elif len(value):
            first = torch.arange(self.num_virtual, device=value.device)
            virtual = tuple(piece.index_select(0, first % len(piece)) for piece in pieces)
        else:
            return value
        return torch.cat([rows for pair in zip(virtual, pieces, strict=True) for rows in pair])

    def _draw(self, key: int | str | None, place: int, like: Tensor, count: int) -> Tensor:
        """Draw `count` virtual rows of one input, the same on every device."""
        number = random.Random(f"{self.seed}/{self.step}/{place}").getrandbits(63)
        generator = torch.Generator().manual_seed(number)
        shape = (count, *like.shape[1:])
        noise = torch.randn(shape, generator=generator, device="cpu").to(like.device)
        column = (1, -1, *(1,) * (like.dim() - 2)) if like.dim() > 1 else (-1,)
        pair = []
        for name, value in (("mean", self.mean[key]), ("std", self.std[key])):
            if value.numel() not in (1, like.shape[1] if like.dim() > 1 else 1):
                raise ValueError(
                    f"{name} is of {value.numel()} channels, the input of {like.shape[1]} "
                    "(dimension 1): give one number for each, or one for all"
                )
            pair.append(value.to(like.device).view(column))
        rows = torch.addcmul(pair[0], pair[1], noise).to(like.dtype)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
        if last is not None and like.is_contiguous(memory_format=last):
            rows = rows.contiguous(memory_format=last)
        return rows

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in zip(_STATE, (self.seed, self.step), strict=True):
            destination[prefix + name] = torch.tensor(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = [state_dict.get(prefix + name) for name in _STATE]
        plain = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in _STATE}
        super()._load_from_state_dict(plain, prefix, *rest)
        if all(value is not None for value in own):
            self.seed, self.step = (int(value) for value in own if value is not None)

    def extra_repr(self) -> str:
        return f"num_virtual={self.num_virtual}"


@contextmanager
def _virtual_rows(layers: Collection[SampledBatchNorm], rows: int) -> Iterator[None]:
    """Within it the first rows of what the layers see are virtual."""
    for layer in layers:
        layer.wrapped_rows = layer.latest_rows = rows
    try:
        yield
    finally:
        for layer in layers:
            layer.wrapped_rows = None


def _by_input(
    name: str, value: Moments | Mapping[int | str, Moments]
) -> dict[int | str | None, Tensor]:
    """A row of numbers for each input; None is the first floating-point one."""
    values: Mapping[Any, Moments] = value if isinstance(value, Mapping) else {None: value}
    wrong = f"{name}={value!r}: give a number for each channel, or one for all"
    try:
        rows = [torch.as_tensor(row, dtype=torch.float32).cpu() for row in values.values()]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(wrong) from error
    if any(row.dim() > 1 or not bool(row.isfinite().all()) for row in rows):
        raise ValueError(wrong)
    return dict(zip(values, rows, strict=True))


def _first(given: Mapping[int | str, Any]) -> int | str | None:
    """The first floating-point tensor with a row an example."""
    for key, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return key
    return None


def _rows(given: Mapping[int | str, Any], means: Mapping[int | str | None, Tensor]) -> int:
    """Examples in the batch."""
    for key, value in given.items():
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            raise TypeError(
                f"input {key!r} is a {type(value).__name__} of tensors, in front of which there "
                "is no place for virtual examples: give one tensor with the batch in front"
            )
    rows = []
    keys: list[int | str | None] = [_first(given)] if None in means else list(means)
    for wanted in keys:
        tensor = None if wanted is None else given.get(wanted)
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            known = ", ".join(map(repr, given))
            raise ValueError(
                f"mean: there is no tensor with a row an example for it among the inputs {known}"
            )
        rows.append(len(tensor))
    return rows[0]


class _Strip:
    """Takes the virtual rows off everything that has them, in front of each part."""

    def __init__(self, parts: list[int], virtual: int) -> None:
        self.parts, self.virtual, self.done = parts, virtual, False

    def __call__(self, value: Tensor) -> Tensor:
        if value.dim() == 0 or len(value) != sum(self.parts):
            return value
        self.done = True
        return on_plain(self._real, value)

    def _real(self, rows: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return rows[self.virtual :]
        return torch.cat([part[self.virtual :] for part in rows.split(self.parts)])
