"""Images as flat rows, channels first: arrays of any layout, and folders of image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.limits import validate_unpacked
from pyro_vae.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of files of images."""

GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes of 8 bits for each channel."""


@dataclass(frozen=True)
class Layout:
    """How a row of an array holds an image.

    Args:
        image_shape: ``(height, width)`` of a grey image, ``(3, height, width)`` of one of colours; None for no image.
        channels_last: ``(height, width, channels)`` where the array holds them in this order.

    Example:
        >>> layout_of((10, 8, 6, 3), np.dtype("uint8"))
        Layout(image_shape=(3, 8, 6), channels_last=(8, 6, 3))
    """

    image_shape: tuple[int, ...] | None
    channels_last: tuple[int, int, int] | None = None

    def rows(self, array: np.ndarray) -> np.ndarray:
        """Return an array as flat rows, channels first.

        Args:
            array: shape ``(datum, …)``, flat or not.
        """
        if self.channels_last is not None:
            array = np.moveaxis(array.reshape(len(array), *self.channels_last), -1, 1)
        return array.reshape(len(array), -1)

    def said(self) -> list[str]:
        """Say so, if channels were moved."""
        return [] if self.channels_last is None else ["the channels, last in the array, come first in a row"]


def layout_of(shape: Sequence[int], dtype: np.dtype) -> Layout:
    """Find the layout of images in an array of shape ``(datum, …)``.

    Of four dimensions, the last one are the channels if it is 1 or 3 and the numbers are bytes; else the second one,
    if it is 1 or 3.

    Args:
        shape: of the array.
        dtype: of the array.

    Example:
        >>> layout_of((10, 1, 8, 6), np.dtype("float32")).image_shape, layout_of((10, 8), np.dtype("uint8")).image_shape
        ((8, 6), None)
    """
    _, *row = map(int, shape)
    if len(row) == 2:
        return Layout((row[0], row[1]))
    if len(row) == 3 and row[2] in (1, 3) and dtype == np.uint8:
        return Layout(_grey_or_colour(row[2], row[0], row[1]), (row[0], row[1], row[2]))
    if len(row) == 3 and row[0] in (1, 3):
        return Layout(_grey_or_colour(*row))
    return Layout(None)


def _grey_or_colour(channels: int, height: int, width: int) -> tuple[int, ...]:
    return (height, width) if channels == 1 else (channels, height, width)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a folder.

    Args:
        array: bytes, shape ``(image, height, width)``, with a last dimension of 3 for colours.
        names: of the files, within the folder.
        labels: the subfolder of each, by its place among the sorted ones; None where there are none.
        label_names: of the subfolders.
        said: what was inferred.
    """

    array: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    label_names: list[str] | None
    said: list[str]


def find_pictures(folder: Path) -> list[Path]:
    """Find the files of images in a folder and its subfolders, sorted by their names.

    Raises:
        DataError: if some are in subfolders and some are not.
    """
    every = [*folder.glob("*"), *folder.glob("*/*")]
    found = sorted(path for path in every if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file())
    beside = [path for path in found if path.parent == folder]
    if beside and len(beside) < len(found):
        raise DataError(
            f"{folder}: {beside[0].name} is in no subfolder, and other images are; put each into a subfolder that is "
            "its label, or none"
        )
    return found


def read_pictures(folder: Path, paths: Sequence[Path]) -> Pictures:
    """Read files of images, which must be of one size; grey ones beside colours become colours.

    Args:
        folder: that holds them; a subfolder is a label.
        paths: of the files.

    Raises:
        DataError: if one cannot be read, or is of another size.
    """
    _validate_sizes(folder, paths)
    images = [_open(path) for path in paths]
    modes = [image.mode for image in images]
    for path, mode in zip(paths, modes, strict=True):
        if mode not in GREY + COLOUR:
            raise DataError(f"{path}: has pixels of Pillow's mode {mode}; save it with 8 bits for each channel")
    grey = [mode in GREY for mode in modes]
    said = [f"{sum(grey)} grey images among colours"] if 0 < sum(grey) < len(grey) else []
    array = np.stack([np.asarray(image.convert("L" if all(grey) else "RGB")) for image in images])
    names = [path.relative_to(folder).as_posix() for path in paths]
    if paths[0].parent == folder:
        return Pictures(array, names, None, None, said)
    of_files = [path.parent.name for path in paths]
    label_names = sorted({*of_files})
    labels = np.array([label_names.index(name) for name in of_files])
    return Pictures(array, names, labels, label_names, [*said, f"labels from {len(label_names)} subfolders"])


def _validate_sizes(folder: Path, paths: Sequence[Path]) -> None:
    """Validate that images are of one size and fit into memory, before any pixel is read."""
    sizes = [_open(path, load=False).size for path in paths]
    if other := next((i for i, size in enumerate(sizes) if size != sizes[0]), None):
        told = [f"{sizes[i][0]} × {sizes[i][1]}" for i in (0, other)]
        raise DataError(
            f"{folder}: {paths[0].name} has {told[0]} pixels and {paths[other].name} {told[1]}; make the sizes equal"
        )
    width, height = sizes[0]
    validate_unpacked(folder, 12 * width * height * len(paths), sum(path.stat().st_size for path in paths))


def _open(path: Path, *, load: bool = True) -> Any:
    """An image, wholly read unless only its header is asked for."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path}: needs Pillow to be read; pip install pillow") from error
    try:
        with Image.open(path) as image:
            if load:
                image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a whole image ({' '.join(str(error).split())}); copy or make it again") from error
