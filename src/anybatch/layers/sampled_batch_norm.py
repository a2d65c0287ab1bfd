"""Batch normalization sampling (Chen et al. 2018, bn-sampling): statistics from a few values."""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from anybatch import backends
from anybatch.backends.aten.samples import Place
from anybatch.backends.protocol import Formula, SampleSpec, Spec, Statistics
from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import check_between, check_choice, check_count
from anybatch.core.grouping import Partition
from anybatch.core.masks import FittedMask
from anybatch.core.norm_batch import Batch, Moments
from anybatch.core.norm_layer import NormLayer, NormOptions
from anybatch.core.notices import NoEffectWarning
from anybatch.core.reduction_scope import ReductionScope, first_of, rank_in, size_of
from anybatch.layers.sample_gradients import (
    SampleFormula,
    mean_and_var,
    mix_parts,
    part_source_moments,
    table_of,
)
from anybatch.layers.sample_positions import (
    NUMBERS,
    Part,
    Size,
    check_size,
    draw,
    draw_ranks,
    drawn_seed,
    mixed,
    place,
    virtual,
)

SAMPLES = ("naive", "batch", "feature", "points", "virtual", "feature+virtual", "batch+virtual")


class SampledBatchNorm(NormLayer):
    """Batch normalization sampling: statistics from a small part of the batch.

    ::

        y = weight * (x - mean_S) / sqrt(var_S + eps) + bias                          (eq. 1, 3)
        g = weight * dy / sqrt(var_S + eps),      z = (x - mean_S) / sqrt(var_S + eps)
        dx = g                                     outside the sample S               (eq. 6)
        dx = g - sum(g) / s - z * sum(g * z) / s   inside, of s values a channel

    with the sums over the whole batch. The sample S is the same for all channels:

    - "naive": the first examples;
    - "batch": adjacent examples from a random one on;
    - "feature": a patch at a random place of every example's map;
    - "points": values at random places;
    - "virtual": virtual examples that `anybatch.VirtualDataset` puts in front of the batch;
    - "feature+virtual" and "batch+virtual": mean and variance are ``mix`` times those of the
      virtual examples plus ``1 - mix`` times those of the sampled ones (eq. 4).

    Random places are drawn once an epoch, by `anybatch.NormScheduler` or `redraw`. They follow
    from the layer's seed and the number of the draw alone, on every device; both are in the
    ``state_dict``. Where a sample is the whole batch, this is `anybatch.BatchNorm`. At inference
    it is so in any case.

    Args:
        track_running_stats: Keep running statistics (default True). Without them
            inference takes the whole batch.
        sample: See above (default "batch").
        ratio: Part of the batch's values in the sample (default 1/32): of its examples, or of a
            map's area with the map's aspect as nearly as whole pixels allow. A sample has about
            16 values a channel at least, where the batch has.
        size: Instead of ratio: the number of examples ("naive", "batch") or points, or the side or
            sides of the patch; a sample of one value is normalized by the running statistics.
        num_virtual: Rows in front of the batch that are virtual (default None: those that
            `anybatch.VirtualDataset` puts there, without which training raises).
        mix: Weight of the virtual examples, beta of equation 4 (default 0.5).
        seed: Of the random places (default None: drawn from `generator`). Layers of a
            network need different seeds, or their errors go together.
        generator: What the seed is drawn from (default None: torch's on the CPU).
        ranks: With a process group, how many of its processes are sampled, others in each draw
            (default None: all; section 4.3). The first one's seed is then that of all.
        norm_batch_size: Normalize in successive batches of so many examples, each with its
            own sample (and its own virtual rows in front).

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d. ``(N, C)`` has no map: feature sampling takes all of it.

    Raises:
        ValueError: For an argument out of range or an input of another shape.
        TypeError: For an input that is not floating point.
        RuntimeError: In training on virtual examples without a `anybatch.VirtualDataset`.

    Source: bn-sampling, section 4, equations 3, 4 and 6, algorithms 1 to 3.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.SampledBatchNorm2d(4, sample="feature", ratio=1 / 16)
        >>> norm(torch.randn(8, 4, 16, 16)).shape  # statistics of 4 x 4 pixels
        torch.Size([8, 4, 16, 16])
    """

    set_state: ClassVar[tuple[str, ...]] = ("seed", "draw", "index")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        sample: str = "batch",
        ratio: float = 1 / 32,
        size: Size = None,
        num_virtual: int | None = None,
        mix: float = 0.5,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        ranks: int | None = None,
        **common: Unpack[NormOptions],
    ) -> None:
        check_choice("sample", sample, SAMPLES)
        check_between("ratio", ratio, 0.0, 1.0)
        if ratio == 0:
            raise ValueError("ratio=0: give a number above 0, such as 1/32")
        check_size(size, sample, self.dims)
        if num_virtual is not None:
            check_count("num_virtual", num_virtual)
        check_between("mix", mix, 0.0, 1.0)
        if ranks is not None:
            check_count("ranks", ranks)
            if common.get("process_group") is None:
                raise ValueError(f"ranks={ranks}: give the process_group that they are of")
        shared = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*shared, **common)
        self.sample, self.ratio, self.size = sample, ratio, size
        self.num_virtual, self.mix, self.ranks = num_virtual, mix, ranks
        self._agreed = False
        self.seed = drawn_seed(seed, generator)
        self.wrapped_rows: int | None = None
        self.latest_rows: int | None = None
        self._places: dict[Any, Any] = {}
        self._numbers: tuple[int, ...] = ()
        for name in ("seed", "draw"):
            self.method_state[name] = self.new_counter()
        self.method_state["index"] = self.new_state(NUMBERS).long()
        self.reset_memory()

    # --- the index ---------------------------------------------------------

    def reset_memory(self) -> None:
        super().reset_memory()
        if "seed" in self.method_state:
            self.method_state["seed"].fill_(self.seed)
            self._draw(1)

    def set_progress(self, epoch: int, total_epochs: int) -> None:
        """Take the random places of an epoch.

        Args:
            epoch: From 1 on; the number of the draw.
            total_epochs: Of no account here.
        """
        check_count("epoch", epoch)
        self._draw(epoch)

    def redraw(self) -> None:
        """Take the next random places, where no `anybatch.NormScheduler` does.

        Example:
            >>> norm = SampledBatchNorm2d(4, seed=1)
            >>> norm.redraw()
            >>> int(norm.state_dict()["draw"])
            2
        """
        self._draw(self._drawn + 1)

    def _draw(self, number: int) -> None:
        self._drawn = number
        self._numbers = tuple(draw(self.seed, number))
        self._places = {}
        self.method_state["draw"].fill_(number)
        self.method_state["index"].copy_(torch.tensor(self._numbers, device="cpu"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        if self.method_state["seed"].is_meta:
            return
        self.seed, number = (int(self.method_state[name]) for name in ("seed", "draw"))
        self._draw(number)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_places": {}, "_agreed": False}

    # --- the sample --------------------------------------------------------

    @property
    def is_virtual(self) -> bool:
        """True if statistics come from virtual examples, alone or with others."""
        return self.sample.endswith("virtual")

    def _parts(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[tuple[Part, ...], ...] | None:
        """The parts behind each normalization batch's statistics; None where these are all of it.

        Args:
            x: ``(N, C, ...)``.
            sizes: Examples in each normalization batch.
        """
        if not self.training or self.frozen:
            return None
        spatial = tuple(x.shape[2:])
        if torch.compiler.is_compiling():  # a graph that holds for every draw
            return self._place(sizes, spatial, tuple(self.method_state["index"]), x.device)
        if backends.is_traced():  # positions made now are not for other calls
            return self._place(sizes, spatial, self._numbers, x.device)
        key = (sizes, spatial, x.device, self._virtual_rows())
        if key not in self._places:
            if len(self._places) > 16:
                self._places = {}
            with torch.inference_mode(False):
                self._places[key] = self._place(sizes, spatial, self._numbers, x.device)
        found: tuple[tuple[Part, ...], ...] | None = self._places[key]
        return found

    def _place(
        self,
        sizes: tuple[int, ...],
        spatial: tuple[int, ...],
        numbers: tuple[Place, ...],
        device: torch.device,
    ) -> tuple[tuple[Part, ...], ...] | None:
        one_each = {}
        for size in set(sizes):
            there = self._place_parts(size, spatial, numbers, device)
            found = [part for part in there if part is not None]
            one_each[size] = mixed(found, self.mix) if len(found) > 1 else tuple(found)
        parts = tuple(one_each[size] for size in sizes)
        values = virtual(1, spatial).values  # of an example
        whole = all(
            len(one) == 1 and one[0].values == size * values
            for one, size in zip(parts, sizes, strict=True)
        )
        return None if whole else parts

    def _place_parts(
        self, rows: int, spatial: tuple[int, ...], numbers: tuple[Place, ...], device: torch.device
    ) -> tuple[Part | None, ...]:
        """The virtual part of a normalization batch and the sampled one; None for an empty one."""
        first, kind = min(self._virtual_rows(), rows), self.sample.split("+")[0]
        found: list[Part | None] = []
        if self.is_virtual:
            found.append(virtual(first, spatial) if first else None)
        if kind != "virtual":
            shape, how = (rows - first, *spatial), (first, numbers, self.ratio, self.size, device)
            found.append(place(kind, shape, *how) if rows > first else None)
        return tuple(found)

    def _virtual_rows(self) -> int:
        """Number of the first rows that are virtual."""
        if not self.is_virtual:
            return 0
        rows = self.wrapped_rows if self.num_virtual is None else self.num_virtual
        if rows is None and in_backward():  # of a checkpointed forward that runs again
            rows = self.latest_rows
        if rows is None:
            raise RuntimeError(
                f"sample={self.sample!r}: training needs virtual examples in front of the batch; "
                "wrap the network in anybatch.VirtualDataset(model, mean, std)"
            )
        return rows

    def _shared_parts(
        self, rows: int, spatial: tuple[int, ...], device: torch.device, group: Any
    ) -> tuple[Part | None, ...]:
        """The parts of a normalization batch of which this process may have none."""
        first = min(self._virtual_rows(), rows)
        key = ("shared", rows, spatial, device, first)
        if key not in self._places or backends.is_traced():
            compiling = torch.compiler.is_compiling()
            numbers = tuple(self.method_state["index"]) if compiling else self._numbers
            found = self._place_parts(rows, spatial, numbers, device)
            if backends.is_traced():
                return found
            self._places[key] = found
        parts: tuple[Part | None, ...] = self._places[key]
        if self.ranks is not None and group is not None and not self._is_sampled(group):
            parts = (*parts[:-1], None) if self.sample != "virtual" else parts
        return parts

    def _is_sampled(self, group: Any) -> bool:
        """True if this process is one of those sampled in this draw."""
        assert self.ranks is not None
        if not self._agreed:
            seed = int(first_of(group, self.method_state["seed"]))
            if seed != self.seed:
                self.seed = seed
                self.method_state["seed"].fill_(seed)
                self._draw(self._drawn)
            self._agreed = True
        return rank_in(group) in draw_ranks(self.seed, self._drawn, size_of(group), self.ranks)

    def _fit(self, mask: Tensor, x: Tensor) -> FittedMask:
        rows, size = self.wrapped_rows or 0, self.norm_batch_size or x.shape[0]
        parts = -(-x.shape[0] // size) if rows else 0
        if parts and mask.dim() and mask.shape[0] == x.shape[0] - parts * rows:
            valid = mask.new_ones(rows, *mask.shape[1:])  # as virtual ones are
            mask = torch.cat([m for part in mask.split(size - rows) for m in (valid, part)])
        return super()._fit(mask, x)

    # --- the course of a forward -------------------------------------------

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        assert mean is not None
        if update:
            self.track(mean, batch.unbiased(var))
        return Statistics(mean, var)

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        parts = self._parts(x, cut.sizes)
        if parts is None:
            return "the sample is the whole batch"
        if sum(part.values for part in parts[0]) < 2:
            return "a sample of one value has no statistics"
        key = ("tables", cut.sizes, self._virtual_rows())
        return SampleSpec(parts[0], self._places.setdefault(key, {}))

    def formula(self, x: Tensor, cut: Partition, source: ReductionScope | None) -> Formula | None:
        if source is None:
            parts = self._parts(x, cut.sizes)
            return None if parts is None else SampleFormula(parts, self.mix)
        if not self.training or self.frozen:
            return None
        spatial, group = tuple(x.shape[2:]), source.group
        shared = [self._shared_parts(n, spatial, x.device, group) for n in cut.sizes]
        return SampleFormula(tuple(shared), self.mix, scoped=True)

    def _run_rule(
        self, x: Tensor, cut: Partition, values: int, update: bool, source: ReductionScope | None
    ) -> Statistics:
        if source is not None and self.training:
            return self._run_shared(x, cut, values, update, source)
        parts = None if source is not None else self._parts(x, cut.sizes)
        if parts is None:
            return super()._run_rule(x, cut, values, update, source)
        rows = [
            mean_and_var(piece, one) for piece, one in zip(x.split(cut.sizes), parts, strict=True)
        ]
        # To the course of a forward the sample is the batch: so many examples of one value.
        numbers = tuple(sum(part.values for part in one) for one in parts)
        counts = None
        if min(numbers) < 2:
            counts = backends.as_counts(numbers, rows[0][0])
            if self.sample == "virtual" and update and not torch.compiler.is_compiling():
                warnings.warn(
                    f"{type(self).__name__}({self.num_features}): its virtual example gives one "
                    "value per channel, which has no variance: running statistics normalize, and "
                    "they never move; give num_virtual=2 or more",
                    NoEffectWarning,
                    stacklevel=2,
                )
        small = Partition(numbers, cut.steps, numbers)
        chosen = self._decide(Moments(*table_of(rows), counts), small, 1, update)
        return chosen.of(None)  # parts come with their own counts

    def _run_shared(
        self, x: Tensor, cut: Partition, values: int, update: bool, source: ReductionScope
    ) -> Statistics:
        """The rule on samples of valid positions, or of several processes."""
        found = self._shared_moments(x, cut.sizes, source)
        table = table_of([mix_parts(*one, self.mix) for one in found])
        counts = torch.stack([counts for _, _, counts in found])  # of each group's parts
        total = counts.sum(1) if len(found) == 1 else counts.sum(1, keepdim=True)
        total = total[0] if len(found) == 1 else total
        chosen = self._decide(Moments(*table, total), cut, values, update)
        return chosen.of(counts)

    def _shared_moments(
        self, x: Tensor, sizes: tuple[int, ...], source: ReductionScope
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Means and variances ``(P, C)`` and counts ``(P,)`` of each group's parts."""
        masks = [None] * len(sizes) if source.mask is None else source.mask.split(sizes)
        found = []
        for piece, mask in zip(x.split(sizes), masks, strict=True):
            spatial, group = tuple(piece.shape[2:]), source.group
            parts = self._shared_parts(piece.shape[0], spatial, piece.device, group)
            rows = [part_source_moments(piece, part, mask, group) for part in parts]
            means, variances, counts = (torch.stack(column) for column in zip(*rows, strict=True))
            found.append((means, variances, counts))
        return found

    def own_arguments(self) -> Mapping[str, Any]:
        shown: dict[str, Any] = {"sample": repr(self.sample)}
        if self.sample != "virtual":
            shown |= {"ratio": self.ratio} if self.size is None else {"size": self.size}
        if self.is_virtual:
            shown["num_virtual"] = self.num_virtual
        if self.ranks is not None:
            shown["ranks"] = self.ranks
        return shown | ({"mix": self.mix} if "+" in self.sample else {})


class SampledBatchNorm1d(SampledBatchNorm, dims=1): ...


class SampledBatchNorm2d(SampledBatchNorm, dims=2): ...


class SampledBatchNorm3d(SampledBatchNorm, dims=3): ...
