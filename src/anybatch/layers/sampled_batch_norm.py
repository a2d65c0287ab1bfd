"""Batch normalization sampling (Chen et al. 2018, bn-sampling): statistics from a few values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from anybatch import backends
from anybatch.backends.aten import recorded
from anybatch.backends.aten.samples import Place
from anybatch.backends.protocol import Formula, Gradients, NormCall, SampleSpec, Spec, Statistics
from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import check_between, check_choice, check_count
from anybatch.core.grouping import Partition
from anybatch.core.norm_batch import Batch, Moments
from anybatch.core.norm_layer import NormLayer
from anybatch.core.reduction_scope import Source, first_of, rank_in, size_of
from anybatch.layers.sample_positions import (
    NUMBERS,
    Part,
    Size,
    draw,
    draw_ranks,
    mixed,
    part_moments,
    place,
    virtual,
)

SAMPLES = ("naive", "batch", "feature", "points", "virtual", "feature+virtual", "batch+virtual")


class _SampledBatchNorm(NormLayer):
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
        num_features: Channels C.
        eps: Added to the variance (default 1e-5).
        momentum: Weight of the newest batch in the running statistics (default
            0.1); None averages over all batches.
        affine: Learn weight and bias (default True).
        bias: Learn the shift, where affine is true (default True).
        track_running_stats: Keep running statistics (default True). Without them
            inference takes the whole batch.
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
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
        example_weight: Share of an example's own statistics at inference.
        process_group: Processes whose batches are one in training, a process group or "world"
            (default None: this process alone).
        outlier_limit: Times its running variance that a channel of a batch may have and enter
            memory (default None: any).

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

    rings: ClassVar[tuple[str, ...]] = ("seed", "draw", "index")

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
        bias: bool = True,
        sample: str = "batch",
        ratio: float = 1 / 32,
        size: Size = None,
        num_virtual: int | None = None,
        mix: float = 0.5,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        ranks: int | None = None,
        norm_batch_size: int | None = None,
        example_weight: float = 0.0,
        process_group: Any = None,
        outlier_limit: float | None = None,
    ) -> None:
        check_choice("sample", sample, SAMPLES)
        check_between("ratio", ratio, 0.0, 1.0)
        if ratio == 0:
            raise ValueError("ratio=0: give a number above 0, such as 1/32")
        _check_size(size, sample, self.dims)
        if num_virtual is not None:
            check_count("num_virtual", num_virtual)
        check_between("mix", mix, 0.0, 1.0)
        if ranks is not None:
            check_count("ranks", ranks)
            if process_group is None:
                raise ValueError(f"ranks={ranks}: give the process_group that they are of")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            norm_batch_size=norm_batch_size,
            example_weight=example_weight,
            process_group=process_group,
            outlier_limit=outlier_limit,
        )
        self.sample, self.ratio, self.size = sample, ratio, size
        self.num_virtual, self.mix, self.ranks = num_virtual, mix, ranks
        self._agreed = False
        self.seed = _drawn_seed(seed, generator)
        self.wrapped_rows: int | None = None
        self.latest_rows: int | None = None
        self._places: dict[Any, Any] = {}
        self._numbers: tuple[int, ...] = ()
        for name in ("seed", "draw"):
            self.memory[name] = self.new_counter()
        self.memory["index"] = self.new_memory(NUMBERS).long()
        self.reset_memory()

    # --- the index ---------------------------------------------------------

    def reset_memory(self) -> None:
        super().reset_memory()
        if "seed" in self.memory:
            self.memory["seed"].fill_(self.seed)
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
        self.memory["draw"].fill_(number)
        self.memory["index"].copy_(torch.tensor(self._numbers, device="cpu"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        if self.memory["seed"].is_meta:
            return
        self.seed, number = (int(self.memory[name]) for name in ("seed", "draw"))
        self._draw(number)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_places": {}, "_agreed": False}

    # --- the sample --------------------------------------------------------

    @property
    def is_virtual(self) -> bool:
        """Whether statistics come from virtual examples, alone or with others."""
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
            return self._place(sizes, spatial, tuple(self.memory["index"]), x.device)
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
        one_each = {size: self._place_one(size, spatial, numbers, device) for size in sizes}
        parts = tuple(one_each[size] for size in sizes)
        values = virtual(1, spatial).values  # of an example
        whole = all(
            len(one) == 1 and one[0].values == size * values
            for one, size in zip(parts, sizes, strict=True)
        )
        return None if whole else parts

    def _place_one(
        self,
        rows: int,
        spatial: tuple[int, ...],
        numbers: tuple[Place, ...],
        device: torch.device,
    ) -> tuple[Part, ...]:
        first, found = min(self._virtual_rows(), rows), []
        if first:
            found.append(virtual(first, spatial))
        kind = self.sample.split("+")[0]
        if kind != "virtual" and rows > first:
            shape = (rows - first, *spatial)
            found.append(place(kind, shape, first, numbers, self.ratio, self.size, device))
        return mixed(found, self.mix) if len(found) > 1 else tuple(found)

    def _virtual_rows(self) -> int:
        """How many of the first rows are virtual."""
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
            numbers = tuple(self.memory["index"]) if compiling else self._numbers
            found: list[Part | None] = []
            if self.is_virtual:
                found.append(virtual(first, spatial) if first else None)
            kind = self.sample.split("+")[0]
            if kind != "virtual":
                shape = (rows - first, *spatial)
                part = None
                if rows > first:
                    part = place(kind, shape, first, numbers, self.ratio, self.size, device)
                found.append(part)
            if backends.is_traced():
                return tuple(found)
            self._places[key] = tuple(found)
        parts: tuple[Part | None, ...] = self._places[key]
        if self.ranks is not None and group is not None and not self._is_sampled(group):
            parts = (*parts[:-1], None) if self.sample != "virtual" else parts
        return parts

    def _is_sampled(self, group: Any) -> bool:
        """Whether this process is one of those sampled in this draw."""
        assert self.ranks is not None
        if not self._agreed:
            seed = int(first_of(group, self.memory["seed"]))
            if seed != self.seed:
                self.seed = seed
                self.memory["seed"].fill_(seed)
                self._draw(self._drawn)
            self._agreed = True
        return rank_in(group) in draw_ranks(self.seed, self._drawn, size_of(group), self.ranks)

    def _fit(self, mask: Tensor, x: Tensor) -> Tensor:
        rows = self.wrapped_rows or 0
        if rows and mask.dim() and mask.shape[0] == x.shape[0] - rows:  # virtual ones are valid
            mask = torch.cat([mask.new_ones(rows, *mask.shape[1:]), mask])
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

    def formula(self, x: Tensor, cut: Partition, source: Source | None) -> Formula | None:
        if source is None:
            parts = self._parts(x, cut.sizes)
            return None if parts is None else _SampleFormula(parts, self.mix)
        if not self.training or self.frozen:
            return None
        spatial, group = tuple(x.shape[2:]), source.group
        shared = [self._shared_parts(n, spatial, x.device, group) for n in cut.sizes]
        return _SampleFormula(tuple(shared), self.mix, scoped=True)

    def _run_rule(
        self, x: Tensor, cut: Partition, values: int, update: bool, source: Source | None
    ) -> Statistics:
        if source is not None and self.training:
            return self._run_shared(x, cut, values, update, source)
        parts = None if source is not None else self._parts(x, cut.sizes)
        if parts is None:
            return super()._run_rule(x, cut, values, update, source)
        rows = [
            _mean_and_var(piece, one) for piece, one in zip(x.split(cut.sizes), parts, strict=True)
        ]
        # To the course of a forward the sample is the batch: so many examples of one value.
        numbers = tuple(sum(part.values for part in one) for one in parts)
        counts = None
        if min(numbers) < 2:
            counts = torch.stack([rows[0][0].new_full((1,), n) for n in numbers])
            counts = counts if len(rows) > 1 else counts.view(())
        small = Partition(numbers, cut.steps, numbers)
        chosen = self._decide(Moments(*_table(rows), counts), small, 1, update)
        return Statistics(*chosen[:-1])  # parts come with their own counts

    def _run_shared(
        self, x: Tensor, cut: Partition, values: int, update: bool, source: Source
    ) -> Statistics:
        """The rule on samples of valid positions, or of several processes."""
        found = self._shared_moments(x, cut.sizes, source)
        table = _table([_mix(*one, self.mix) for one in found])
        counts = torch.stack([counts for _, _, counts in found])  # of each group's parts
        total = counts.sum(1) if len(found) == 1 else counts.sum(1, keepdim=True)
        total = total[0] if len(found) == 1 else total
        chosen = self._decide(Moments(*table, total), cut, values, update)
        return chosen.of(counts)

    def _shared_moments(
        self, x: Tensor, sizes: tuple[int, ...], source: Source
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Means and variances ``(P, C)`` and counts ``(P,)`` of each group's parts."""
        masks = [None] * len(sizes) if source.mask is None else source.mask.split(sizes)
        found = []
        for piece, mask in zip(x.split(sizes), masks, strict=True):
            spatial, group = tuple(piece.shape[2:]), source.group
            parts = self._shared_parts(piece.shape[0], spatial, piece.device, group)
            rows = [_part_source_moments(piece, part, mask, group) for part in parts]
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


def _check_size(size: Size, sample: str, dims: int) -> None:
    if size is None:
        return
    if not isinstance(size, tuple):
        return check_count("size", size)
    if not sample.startswith("feature") or len(size) != dims:
        many = f"{dims} sides of a patch" if sample.startswith("feature") else "a whole number"
        raise ValueError(f"size={size!r}: give {many} with sample={sample!r}")
    for side in size:
        check_count("size", side)


def _drawn_seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None and generator is not None:
        raise ValueError(f"seed={seed!r} and a generator: give one of them")
    if seed is None:
        return int(torch.randint(2**31, (), generator=generator, device="cpu"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: give a whole number")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: give a whole number from 0 to 2 ** 63 - 1")
    return seed


def _mean_and_var(x: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, Tensor]:
    """Statistics of a normalization batch (equations 3 and 4)."""
    found = part_moments(x, parts)
    if len(parts) == 1:
        return found[0]
    (mean, var), (other_mean, other_var) = found
    share = parts[1].share
    return torch.lerp(mean, other_mean, share), torch.lerp(var, other_var, share)


class _SampleFormula(NamedTuple):
    """The gradient of a norm by the statistics of a sample (equation 6).

    Attributes:
        parts: The parts of each normalization batch's sample; None where it has none here.
        mix: Weight of the virtual examples.
        scoped: Whether a mask or other processes contribute.
    """

    parts: tuple[tuple[Part | None, ...], ...]
    mix: float
    scoped: bool = False

    @property
    def moments(self) -> Callable[[Tensor, NormCall], tuple[Tensor, Tensor]] | None:
        """The sample's mean and variance, by operators that autograd records."""
        return None if self.scoped else self._moments

    def _moments(self, x: Tensor, call: NormCall) -> tuple[Tensor, Tensor]:
        found = []
        for piece, parts in zip(x.split(call.cut[0]), self.parts, strict=True):
            samples = [
                backends.take_dense(piece, part.sample) for part in parts if part is not None
            ]
            table = [recorded.moments(values, (values.shape[0],)) for values in samples]
            mean, var = (row[0] for row in table[0])
            if len(parts) > 1 and parts[1] is not None:
                share = parts[1].share
                mean = torch.lerp(mean, table[1][0][0], share)
                var = torch.lerp(var, table[1][1][0], share)
            found.append((mean, var))
        if len(found) == 1:
            return found[0]
        return torch.stack([mean for mean, _ in found]), torch.stack([var for _, var in found])

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, call: NormCall, needs: Sequence[bool]
    ) -> Gradients:
        chosen, sizes = call.statistics, call.cut[0]
        assert chosen is not None and chosen.mean is not None
        if call.scope is not None:
            return _shared_gradients(dy, x, weight, self, call, needs)
        if len(sizes) == 1:
            table = (chosen.mean, chosen.var, chosen.share)
            return _gradients(dy, x, weight, table, self.parts[0], call.eps, needs)
        share = chosen.share
        pieces = [
            _gradients(
                one_dy,
                one_x,
                weight,
                (chosen.mean[g], chosen.var[g], share[g] if isinstance(share, Tensor) else share),
                self.parts[g],
                call.eps,
                needs,
            )
            for g, (one_dy, one_x) in enumerate(zip(dy.split(sizes), x.split(sizes), strict=True))
        ]
        dxs, dws, dbs = zip(*pieces, strict=True)
        return (
            torch.cat(dxs) if needs[0] else None,
            torch.stack(dws).sum(0) if needs[1] else None,
            torch.stack(dbs).sum(0) if needs[2] else None,
        )


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    table: tuple[Tensor, Tensor, float | Tensor],
    parts: tuple[Any, ...],
    eps: float,
    needs: Sequence[bool],
) -> Gradients:
    """Equation 6: everywhere as by constants, then what passes the statistics, in the sample."""
    mean, var, share = table
    inner = needs[0] and not (isinstance(share, float) and share == 0)
    mask = (needs[0], needs[1] or inner, needs[2] or inner)
    dx, dw, db = backends.fixed_gradient(dy, x, mean, var, weight, eps, mask)
    if inner:
        assert dx is not None and dw is not None and db is not None
        inv = torch.rsqrt(var + backends.scalar(eps))
        on_dy = inv if weight is None else weight * inv
        passing = on_dy * share
        on_x, constant = passing * inv * dw, passing * db
        centers = [mean]
        if len(parts) > 1:  # of each part's variance; micro-batches pool by moving all of them
            own = [first for first, _ in part_moments(x, parts)]
            shift = mean - torch.lerp(own[0], own[1], parts[1].share)
            centers = [first + shift for first in own]
        for part, center in zip(parts, centers, strict=True):
            factor = backends.scalar(-part.share / part.values)
            dx = backends.put_gradient(
                dx, dy, x, part.sample, center, on_dy, on_x * factor, constant * factor
            )
    return dx, dw if needs[1] else None, db if needs[2] else None


def _part_source_moments(
    x: Tensor, part: Part | None, mask: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of a part, of valid positions, of all processes."""
    if part is None:
        values = x.new_empty(0, x.shape[1])
        valid = None
    else:
        values = backends.take_dense(x, part.sample)
        valid = None if mask is None else backends.take_dense(mask, part.sample)
    mean, var, count = Source(valid, group).moments(values, (values.shape[0],), True)
    assert mean is not None
    return mean, var, count


def _mix(means: Tensor, variances: Tensor, counts: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """Equation 4 over parts ``(P, C)``; one of a single value has no share."""
    shares = _shares(counts, mix, means)
    return (means * shares).sum(0), (variances * shares).sum(0)


def _shares(counts: Tensor, mix: float, like: Tensor) -> Tensor:
    """Weights ``(P, 1)`` of the parts; one of a single value has none."""
    shares = (counts > 1).to(like.dtype)
    if len(counts) > 1:
        shares = shares * torch.tensor([mix, 1 - mix], dtype=like.dtype, device=like.device)
    return (shares / shares.sum().clamp(min=1e-30)).unsqueeze(1)


def _table(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows of several groups as tables; one stays a row."""
    if len(rows) == 1:
        return rows[0]
    means, variances = zip(*rows, strict=True)
    return torch.stack(means), torch.stack(variances)


def _shared_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    sample: _SampleFormula,
    call: NormCall,
    needs: Sequence[bool],
) -> Gradients:
    """Equation 6 where only valid positions are sampled, or those of several processes."""
    chosen, sizes, source = call.statistics, call.cut[0], call.scope
    assert (
        chosen is not None
        and source is not None
        and chosen.mean is not None
        and chosen.counts is not None
    )
    masks = [None] * len(sizes) if source.mask is None else source.mask.split(sizes)
    shape = (len(sizes), x.shape[1])
    means, variances = chosen.mean.view(shape), chosen.var.view(shape)
    given = torch.as_tensor(chosen.share, dtype=means.dtype, device=means.device)
    given = given.expand(len(sizes), 1) if given.dim() == 0 else given.view(-1, 1)
    grads: list[tuple[Tensor, Tensor, Tensor]] = []
    pieces = zip(dy.split(sizes), x.split(sizes), masks, sample.parts, strict=True)
    for g, (one_dy, one_x, mask, parts) in enumerate(pieces):
        mean, var = means[g], variances[g]
        if one_x.numel():
            all_three = (True, True, True)
            dx, dw, db = backends.fixed_gradient(
                one_dy, one_x, mean, var, weight, call.eps, all_three
            )
            assert dx is not None and dw is not None and db is not None
        else:
            dx, (dw, db) = torch.empty_like(one_x), mean.new_zeros(2, *mean.shape)
        if needs[0]:
            counts, centers = chosen.counts[g], [mean]
            shares = _shares(counts, sample.mix, mean)
            if len(parts) > 1:  # of each part's variance; micro-batches pool by moving all of them
                own = [_part_source_moments(one_x, part, mask, source.group)[0] for part in parts]
                middle = (torch.stack(own) * shares).sum(0)
                centers = [first + (mean - middle) for first in own]
            all_dw, all_db = source.sum(dw, db)
            assert all_dw is not None and all_db is not None
            inv = torch.rsqrt(var + backends.scalar(call.eps))
            on_dy = inv if weight is None else weight * inv
            passing = on_dy * given[g]
            for p, part in enumerate(parts):
                if part is None:
                    continue
                factor = -shares[p] / counts[p].clamp(min=1)
                on_x, constant = passing * inv * all_dw * factor, passing * all_db * factor
                rows = (centers[p], on_dy, on_x, constant)
                dx = backends.put_gradient(dx, one_dy, one_x, part.sample, *rows, mask)
        grads.append((dx, dw, db))
    dxs, dws, dbs = zip(*grads, strict=True)
    return (
        torch.cat(dxs) if needs[0] else None,
        torch.stack(dws).sum(0) if needs[1] else None,
        torch.stack(dbs).sum(0) if needs[2] else None,
    )


class SampledBatchNorm1d(_SampledBatchNorm):
    __doc__ = _SampledBatchNorm.__doc__
    dims = 1


class SampledBatchNorm2d(_SampledBatchNorm):
    __doc__ = _SampledBatchNorm.__doc__
    dims = 2


class SampledBatchNorm3d(_SampledBatchNorm):
    __doc__ = _SampledBatchNorm.__doc__
    dims = 3
