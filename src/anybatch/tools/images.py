"""Images in files, more than fit in memory: read and cropped when they are needed."""

import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybatch.tools.examples import Unread

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Of ImageNet's training set, channels red, green, blue.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LEAST_AREA, _ASPECT = 0.08, 4 / 3
_BORDER = 256 / 224  # the shorter side that is resized to, over the side that is cropped

Place = Path | zipfile.Path  # a file or folder, on disk or in a zip file
Edit = Callable[["Image"], "Image"]


def read_image(file: Place, edit: Edit) -> NDArray[np.uint8]:
    """An image in red, green and blue, edited while the file is open.

    Of shape ``(height, width, 3)``.

    Raises:
        ValueError: If it cannot be read.
    """
    return edited(file, lambda image: edit(image).convert("RGB"))


def edited(file: Place, edit: Edit) -> NDArray[np.uint8]:
    """The pixels of an image, edited while the file is open.

    Of shape ``(height, width)``, or with the colours behind; `edit` gives an image of bytes.

    Raises:
        ValueError: If it cannot be read.
    """
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError
    from PIL.Image import open as opened

    try:
        with file.open("rb") as stream, opened(stream) as image:
            return np.asarray(edit(image), np.uint8)
    except (OSError, UnidentifiedImageError, DecompressionBombError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not an image that can be read ({error})") from error


def files_by_class(folder: Path, names: Sequence[str], root: Path) -> tuple[list[Path], list[int]]:
    """The images of a split, class by class.

    Files, and the number of each one's class.

    Raises:
        ValueError: If there are none, or a link leads out of the root.
    """
    files, classes = [], []
    for label, name in enumerate(names):
        _check_inside(folder / name, root)
        for file in sorted((folder / name).glob("*")):
            if file.suffix.lower() in ENDINGS:
                _check_inside(file, root)
                files.append(file)
                classes.append(label)
    if not files:
        raise ValueError(f"root={str(folder)!r}: no images ({', '.join(ENDINGS)}) in it")
    return files, classes


def _check_inside(path: Path, root: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"root={str(root)!r}: {path.relative_to(root)} is a link that leads out of it, to "
            f"{path.resolve()}; put the images themselves there"
        )


class ImageFiles(Unread):
    """Square images of files, standardized.

    Args:
        items: The files.
        size: Their side, after cropping.
    """

    def __init__(self, items: Sequence[Path], size: int) -> None:
        self.items, self.size = items, size

    @property
    def shape(self) -> torch.Size:
        """Shape of a tensor of all images."""
        return torch.Size((len(self), 3, self.size, self.size))

    def read(self) -> Tensor:
        """The middle of each, of 224 in 256 parts of its shorter side."""
        return self._read([self._middle] * len(self))

    def augmented(self, generator: torch.Generator) -> Tensor:
        """A random part of each, of 8 to 100 % of its area and up to 4:3, flipped or not."""
        numbers = torch.rand(len(self), 5, generator=generator).tolist()
        return self._read([self._part(*drawn) for drawn in numbers])

    def _read(self, edits: Sequence[Edit]) -> Tensor:
        images = np.stack(list(_readers().map(read_image, self.items, edits)))
        mean, std = torch.tensor(_MEAN), torch.tensor(_STD)
        x = (torch.from_numpy(images).float() / 255 - mean) / std
        return x.permute(0, 3, 1, 2).contiguous()

    def _middle(self, image: "Image") -> "Image":
        side = min(image.size) / _BORDER
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return self._resized(image, (left, top, left + side, top + side))

    def _part(self, area: float, aspect: float, x: float, y: float, flip: float) -> Edit:
        from PIL.Image import Transpose

        def edit(image: "Image") -> "Image":
            pixels = (_LEAST_AREA + (1 - _LEAST_AREA) * area) * image.width * image.height
            ratio = math.exp((2 * aspect - 1) * math.log(_ASPECT))
            width = min(math.sqrt(pixels * ratio), image.width)
            height = min(math.sqrt(pixels / ratio), image.height)
            left, top = x * (image.width - width), y * (image.height - height)
            part = self._resized(image, (left, top, left + width, top + height))
            return part.transpose(Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else part

        return edit

    def _resized(self, image: "Image", box: tuple[float, float, float, float]) -> "Image":
        from PIL.Image import Resampling

        return image.convert("RGB").resize((self.size, self.size), Resampling.BILINEAR, box)


def standardized(x: Tensor) -> Tensor:
    """Images of bytes ``(N, 3, H, W)``, standardized by ImageNet's means and deviations."""
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (x.float() / 255 - mean) / std


def as_tensor(x: Tensor | Unread) -> Tensor:
    """Examples themselves: what is not read yet is, of images in files their middle."""
    return x.read() if isinstance(x, Unread) else x


def read_ahead(batches: Iterator[Any], count: int = 2) -> Iterator[Any]:
    """Batches, of which the next ones are made while one is used.

    They are made in a thread of its own, in order, so many ahead.
    """
    with ThreadPoolExecutor(1) as maker:
        waiting = [maker.submit(next, batches, None) for _ in range(count)]
        while (batch := waiting.pop(0).result()) is not None:
            waiting.append(maker.submit(next, batches, None))
            yield batch


@cache
def _readers() -> ThreadPoolExecutor:
    """Threads that decode: Pillow works on several images at once."""
    return ThreadPoolExecutor(os.cpu_count() or 1)
