"""Positions of the samples of batch normalization sampling, from a draw and a shape."""

import random
from operator import index
from typing import NamedTuple

import torch

from anybatch import backends
from anybatch.backends.aten.samples import Box, Place, Points, Sample, random_positions
from anybatch.core.arguments import check_count

NUMBERS = 4  # of a draw: for the examples, and for each spatial dimension
_BITS = 31
_LEAST = 16  # values a channel in the sample of a ratio: fewer may be alike, without variance

Size = int | tuple[int, ...] | None


class Part(NamedTuple):
    """A part of the data behind a normalization batch's statistics.

    Attributes:
        sample: Where it is.
        share: Its weight in mean and variance (bn-sampling, equation 4).
        values: Number of values a channel.
    """

    sample: Sample
    share: float
    values: int


def draw(seed: int, number: int) -> list[int]:
    """The numbers of one epoch's index, below ``2 ** 31``, whatever the shapes to come.

    >>> draw(7, 1) == draw(7, 1), draw(7, 1) == draw(7, 2)
    (True, False)
    """
    source = random.Random(f"{seed}/{number}")  # the same on every platform and version
    return [source.getrandbits(_BITS) for _ in range(NUMBERS)]


def draw_ranks(seed: int, number: int, world: int, count: int) -> frozenset[int]:
    """The processes of a group that are sampled in a draw (bn-sampling, section 4.3).

    >>> len(draw_ranks(7, 1, world=8, count=2))
    2
    """
    source = random.Random(f"{seed}/{number}/ranks")
    return frozenset(source.sample(range(world), min(count, world)))


def nearest(wanted: float, least: int, most: int) -> int:
    """The nearest whole number within limits; never a compiler's symbol."""
    return index(min(max(int(wanted + 0.5), least), most))


def patch_sides(sides: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """A patch with a ratio's area and a map's aspect, as nearly as whole pixels allow.

    Sides are rounded in turn, the shortest first; those that follow make up for it.

    >>> patch_sides((56, 56), 1 / 32), patch_sides((8, 8), 1 / 32), patch_sides((1, 100), 1 / 32)
    ((10, 10), (1, 2), (1, 3))
    """
    sides = tuple(index(side) for side in sides)  # which a compiler may know as symbols
    chosen = list(sides)
    order = sorted(range(len(sides)), key=lambda dim: sides[dim])
    for done, dim in enumerate(order):
        wanted = sides[dim] * ratio ** (1 / (len(sides) - done))
        chosen[dim] = nearest(wanted, 1, sides[dim])
        ratio = ratio * sides[dim] / chosen[dim]
    return tuple(chosen)


def _begin(number: Place, length: int, side: int) -> Place:
    """Begin of ``side`` of ``length`` positions, each place as likely as another."""
    return (number * (length - side + 1)) >> _BITS


def _volume(sides: tuple[int, ...]) -> int:
    volume = 1
    for side in sides:
        volume *= side
    return volume


def place(
    kind: str,
    shape: tuple[int, ...],
    first: int,
    numbers: tuple[Place, ...],
    ratio: float,
    size: Size,
    device: torch.device,
) -> Part:
    """The sample of one normalization batch.

    Args:
        kind: "naive", "batch", "feature" or "points".
        shape: Its examples and its spatial dimensions.
        first: Rows before its examples, which it leaves alone.
        numbers: The draw.
        ratio: Part of the values.
        size: Examples, sides of the patch or points instead, or None.
        device: Of the activation.

    Returns:
        The sample as a part of weight 1.
    """
    rows, *spatial = shape
    sides = tuple(spatial)
    area = _volume(sides)
    if kind == "points":
        total = rows * area
        wanted = ratio * total if size is None else size
        assert not isinstance(wanted, tuple)
        count = nearest(wanted, min(_LEAST, total) if size is None else 1, total)
        flat = random_positions(numbers[0], total, count, device)
        where: list[torch.Tensor] = []
        for side in reversed(sides):
            where.insert(0, flat % side)
            flat = flat.div(side, rounding_mode="floor")
        return Part(Points((flat + first, *where)), 1.0, count)
    begin: list[Place] = [first, *(0 for _ in sides)]
    if kind == "feature":
        patch = _patch(rows, sides, ratio, size)
        for dim, (side, whole) in enumerate(zip(patch, sides, strict=True)):
            begin[dim + 1] = _begin(numbers[dim + 1], whole, side)
        return Part(Box(tuple(begin), (rows, *patch)), 1.0, rows * _volume(patch))
    assert not isinstance(size, tuple)
    least = min(-(-_LEAST // area), rows) if size is None else 1
    examples = nearest(ratio * rows if size is None else size, least, rows)
    if kind == "batch":
        start = _begin(numbers[0], rows, examples)
        begin[0] = start + first
    return Part(Box(tuple(begin), (examples, *sides)), 1.0, examples * area)


def _patch(rows: int, sides: tuple[int, ...], ratio: float, size: Size) -> tuple[int, ...]:
    if size is None:
        patch = patch_sides(sides, ratio)
        area = _volume(sides)
        if rows * _volume(patch) < _LEAST:
            patch = patch_sides(sides, min(_LEAST / max(rows * area, 1), 1.0))
        return patch
    wanted = size if isinstance(size, tuple) else (size,) * len(sides)
    return tuple(min(side, whole) for side, whole in zip(wanted, sides, strict=True))


def virtual(rows: int, spatial: tuple[int, ...]) -> Part:
    """The first rows, which are virtual."""
    box = Box((0,) * (1 + len(spatial)), (rows, *spatial))
    return Part(box, 1.0, rows * _volume(spatial))


def mixed(parts: list[Part], mix: float) -> tuple[Part, ...]:
    """Virtual and sampled values by equation 4; a part of one value has no share where it can be.

    Args:
        parts: The virtual part, and the sampled one where there is one.
        mix: Weight of the virtual part.

    Returns:
        Parts whose shares sum to 1.
    """
    shares = (mix, 1 - mix)
    weighed = [Part(p.sample, s, p.values) for p, s in zip(parts, shares, strict=False)]
    chosen = [part for part in weighed if part.share > 0]
    rich = [part for part in chosen if part.values > 1] or chosen[:1]
    if len(rich) == 1:
        return (Part(rich[0].sample, 1.0, rich[0].values),)
    return tuple(rich)


def part_moments(
    x: torch.Tensor, parts: tuple[Part, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and biased variance of each part."""
    return [backends.sample_moments(x, part.sample) for part in parts]


def check_size(size: Size, sample: str, dims: int) -> None:
    """Raise for a size that a sample cannot have."""
    if size is None:
        return
    if not isinstance(size, tuple):
        return check_count("size", size)
    if not sample.startswith("feature") or len(size) != dims:
        many = f"{dims} sides of a patch" if sample.startswith("feature") else "a whole number"
        raise ValueError(f"size={size!r}: give {many} with sample={sample!r}")
    for side in size:
        check_count("size", side)


def drawn_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed that is given, or one from a generator (None: torch's own)."""
    if seed is not None and generator is not None:
        raise ValueError(f"seed={seed!r} and a generator: give one of them")
    if seed is None:
        return int(torch.randint(2**31, (), generator=generator, device="cpu"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: give a whole number")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: give a whole number from 0 to 2 ** 63 - 1")
    return seed
