"""Images with boxes in COCO's format, from a folder or from a zip file that is never unpacked."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anybatch.tools.images import ImageFiles, Place, read_image, standardized

if TYPE_CHECKING:
    from PIL.Image import Image

PARTS = {"train": ("train",), "test": ("test", "val")}  # held-out images: the first there is
# A folder made for this format, and COCO as it comes.
_LISTS = ("{part}.json", "annotations/instances_{part}2017.json")
_PLACES = ("{part}/{name}", "{name}", "{part}2017/{name}", "images/{name}")

_STEP = 32  # sides are filled up to a multiple, as networks halve them up to five times
_MOST_BYTES = 8 * 2**30  # of decoded images that are kept
CLASS, BOX, CROWD = 0, slice(1, 5), 5  # columns of a target
COLUMNS = 6


class AnnotatedFiles(NamedTuple):
    """Training or held-out images.

    Attributes:
        files: The images.
        sizes: Their widths and heights, as the list has them.
        targets: ``(N, M, 6)``: class, left, top, right, bottom, and whether it is a crowd; in
            pixels after resizing. An image with fewer than M boxes has classes -1 at the end.
        outlines: Of each image, the ``segmentation`` of its boxes, in its own pixels.
    """

    files: list[Place]
    sizes: list[tuple[int, int]]
    targets: Tensor
    outlines: list[list[Any]]


class AnnotatedImages(ImageFiles):
    """Images resized to one longer side, and filled up with the mean on the right and below.

    A batch, and so a network, has one size for all: that of the largest image, up to a multiple
    of 32. Decoded images are kept, up to 8 GiB.

    Args:
        part: Which they are.
        side: Their longer side, after resizing.
        height: Of what is read, the filling included.
        width: Likewise.
    """

    def __init__(self, part: AnnotatedFiles, side: int, height: int, width: int) -> None:
        super().__init__([], side)
        self.part, self.height, self.width = part, height, width
        self._kept: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.part.files)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), 3, self.height, self.width))

    def __getitem__(self, index: slice | Tensor) -> "AnnotatedImages":
        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        part = AnnotatedFiles(
            [self.part.files[k] for k in chosen],
            [self.part.sizes[k] for k in chosen],
            self.part.targets[list(chosen)],
            [self.part.outlines[k] for k in chosen],
        )
        some = AnnotatedImages(part, self.size, self.height, self.width)
        some._kept = self._kept
        return some

    def read(self) -> Tensor:
        """The images, standardized, ``(N, 3, height, width)``."""
        x = torch.zeros(self.shape)
        for row, file, size in zip(x, self.part.files, self.part.sizes, strict=True):
            pixels = standardized(self._read_one(file, size)[None])[0]
            row[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        return x

    def widths(self) -> Tensor:
        """Return the width of each image without its filling, ``(N,)``."""
        return torch.tensor([resized(size, self.size)[0] for size in self.part.sizes])

    def augmented(self, generator: torch.Generator) -> Tensor:
        """Not for images with boxes, which `papers.tasks.detection` flips together."""
        raise NotImplementedError

    def _read_one(self, file: Place, size: tuple[int, int]) -> Tensor:
        """An image in the size that its boxes are in, ``(3, height, width)``, uint8."""
        if str(file) in self._kept:
            return self._kept[str(file)]

        def edit(image: "Image") -> "Image":
            if image.size != size:
                raise ValueError(f"{file}: it is of {image.size} pixels, its list says {size}")
            return image.convert("RGB").resize(resized(size, self.size))

        image = torch.from_numpy(read_image(file, edit).copy()).permute(2, 0, 1)
        if len(self._kept) * self.height * self.width * 3 < _MOST_BYTES:
            self._kept[str(file)] = image
        return image

    def masks(self) -> Tensor:
        """Return the mask of each box's object, ``(N, M, height, width)``, bool.

        Raises:
            ValueError: If a box has no outline.
        """
        from pycocotools import mask as coder

        masks = torch.zeros(len(self), self.part.targets.shape[1], *self.shape[2:]).bool()
        for image, outlines in enumerate(self.part.outlines):
            own_width, own_height = self.part.sizes[image]
            width, height = resized((own_width, own_height), self.size)
            for k, outline in enumerate(outlines):
                if not outline:
                    raise ValueError(
                        f"{self.part.files[image]}: a box has no segmentation in the list of "
                        "annotations, which masks are learned from"
                    )
                coded = coder.frPyObjects(outline, own_height, own_width)
                coded = coder.merge(coded) if isinstance(coded, list) else coded
                whole = torch.from_numpy(coder.decode(coded))[None, None]
                small = torch.nn.functional.interpolate(whole, (height, width))
                masks[image, k, :height, :width] = small[0, 0].bool()
        return masks


def resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with the longer one brought to a side.

    >>> resized((640, 480), 160)
    (160, 120)
    """
    longer = max(size)
    width, height = (max(round(length * side / longer), 1) for length in size)
    return width, height


def read(root: Path, side: int) -> tuple[AnnotatedImages, AnnotatedImages, int]:
    """Read the lists of a data set; its images are read as they are needed.

    Args:
        root: A folder or a zip file with ``train.json`` and ``test.json`` (or ``val.json``), and
            the images beside them or in folders ``train`` and ``test``; or COCO as it comes, with
            ``annotations/instances_train2017.json`` and the folders ``train2017`` and ``val2017``.
        side: Longer side of the images, which are resized to it.

    Returns:
        Training and held-out images, and the number of classes. Training images without a
        box that is no crowd are left out.

    Raises:
        ValueError: If files are missing, incomplete or of another form.
    """
    place = opened(root)
    lists = {name: _list(place, parts) for name, parts in PARTS.items()}
    classes = _classes(root, *(data for _, data in lists.values()))
    found = [_part(place, part, data, classes, side) for part, data in lists.values()]
    shapes = [resized(size, side) for part in found for size in part.sizes]
    width, height = (-(-max(lengths) // _STEP) * _STEP for lengths in zip(*shapes, strict=True))
    train, test = (AnnotatedImages(part, side, height, width) for part in found)
    learned = (train.part.targets[..., CLASS] >= 0) & (train.part.targets[..., CROWD] == 0)
    return train[learned.any(1).nonzero()[:, 0]], test, len(classes)


def opened(root: Path) -> Place:
    """A folder, or a zip file as one.

    Raises:
        ValueError: If it is neither.
    """
    if root.is_dir():
        return root
    try:
        return zipfile.Path(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"root={str(root)!r}: neither a folder nor a zip ({error})") from error


def _file(place: Place, name: str) -> Place | None:
    """A file of that name inside, None if there is none; nothing outside is ever found."""
    file = place / name
    if not file.is_file():
        return None
    inside = not isinstance(file, Path) or file.resolve().is_relative_to(Path(str(place)).resolve())
    return file if inside else None


def _list(place: Place, parts: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
    """The first of some lists that is there."""
    looked = [(part, name.format(part=part)) for part in parts for name in _LISTS]
    there = ((part, _file(place, name)) for part, name in looked)
    part, file = next((pair for pair in there if pair[1] is not None), (None, None))
    if part is None or file is None:
        raise ValueError(
            f"root={str(place)!r}: it has none of {', '.join(n for _, n in looked)}; give a folder "
            "or a zip file in COCO's format, with train.json, and test.json or val.json"
        )
    try:
        data = json.loads(file.read_bytes())
        for key in ("images", "annotations", "categories"):
            if not isinstance(data[key], list):
                raise TypeError(f"{key} is no list")
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: it is not in COCO's format ({error!r})") from error
    return part, data


def _classes(root: Path, train: Mapping[str, Any], test: Mapping[str, Any]) -> dict[int, int]:
    """Numbers from 0 on of the categories, in the order of their own."""
    known, other = ({int(c["id"]) for c in part["categories"]} for part in (train, test))
    if not known or other - known:
        raise ValueError(
            f"root={str(root)!r}: the held-out images have the categories {sorted(other)}, the "
            f"training images {sorted(known)}"
        )
    return {category: k for k, category in enumerate(sorted(known))}


def _part(
    place: Place, part: str, data: Mapping[str, Any], classes: Mapping[int, int], side: int
) -> AnnotatedFiles:
    try:
        images = {int(i["id"]): i for i in data["images"]}
        boxes: dict[int, list[Any]] = {number: [] for number in images}
        for annotation in data["annotations"]:
            boxes[int(annotation["image_id"])].append(annotation)
        files = [_image(place, part, str(image["file_name"])) for image in images.values()]
        sizes = [(int(i["width"]), int(i["height"])) for i in images.values()]
        if any(min(size) < 1 for size in sizes):
            raise ValueError(f"{place}: an image of {part} is said to be empty")
        rows = [
            list(_targets(boxes[k], classes, size, side))
            for k, size in zip(images, sizes, strict=True)
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place}: {part} has no {error}; it needs COCO's format") from error
    if not any(rows):
        raise ValueError(f"{place}: there are no boxes for {part}")
    targets = torch.zeros(len(rows), max(map(len, rows)), COLUMNS)
    targets[..., CLASS] = -1
    for k, row in enumerate(rows):
        if row:
            targets[k, : len(row)] = torch.tensor([numbers for numbers, _ in row])
    return AnnotatedFiles(files, sizes, targets, [[outline for _, outline in row] for row in rows])


def _image(place: Place, part: str, name: str) -> Place:
    looked = (_file(place, pattern.format(part=part, name=name)) for pattern in _PLACES)
    found = next((file for file in looked if file is not None), None)
    if found is None:
        raise ValueError(f"{place}: the image {name} of {part} is not there")
    return found


def _targets(
    annotations: Sequence[Mapping[str, Any]],
    classes: Mapping[int, int],
    size: tuple[int, int],
    side: int,
) -> Iterator[tuple[list[float], Any]]:
    """Numbers and outline of each box, cut at the image's border; empty ones are left out."""
    width, height = resized(size, side)
    for annotation in annotations:
        left, top, wide, high = (float(number) for number in annotation["bbox"])
        x = [min(max(v, 0), size[0]) * width / size[0] for v in (left, left + wide)]
        y = [min(max(v, 0), size[1]) * height / size[1] for v in (top, top + high)]
        if x[0] < x[1] and y[0] < y[1]:
            label = float(classes[int(annotation["category_id"])])
            crowd = float(annotation.get("iscrowd", 0))
            yield [label, x[0], y[0], x[1], y[1], crowd], annotation.get("segmentation")
