"""Convert images to flat rows, channels first, from arrays of any layout and from folders of files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.limits import validate_unpacked
from pyro_vae.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files."""

GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes with 8 bits per channel."""


@dataclass(frozen=True)
class Layout:
    """The layout of an image in a row of an array.

    Args:
        image_shape: ``(height, width)`` of a grey image, ``(3, height, width)`` of a colour image; None for no image.
        channels_last: ``(height, width, channels)`` if the array has this layout.

    Example:
        >>> layout_of((10, 8, 6, 3), np.dtype("uint8"))
        Layout(image_shape=(3, 8, 6), channels_last=(8, 6, 3))
    """

    image_shape: tuple[int, ...] | None
    channels_last: tuple[int, int, int] | None = None

    def rows(self, array: np.ndarray) -> np.ndarray:
        """Convert an array to flat rows, channels first.

        Args:
            array: shape ``(datum, …)``, flat or not.
        """
        if self.channels_last is not None:
            array = np.moveaxis(array.reshape(len(array), *self.channels_last), -1, 1)
        return array.reshape(len(array), -1)

    def describe(self) -> list[str]:
        """Describe the layout if channels are moved."""
        return [] if self.channels_last is None else ["channels moved from last to first"]


def layout_of(shape: Sequence[int], dtype: np.dtype) -> Layout:
    """Infer the layout of images in an array of shape ``(datum, …)``.

    In an array of bytes with four dimensions, the last dimension holds the channels if its size is 1 or 3. Otherwise
    the second dimension does, if its size is 1 or 3.

    Args:
        shape: the shape of the array.
        dtype: the type of the array.

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
        array: bytes, shape ``(image, height, width)``, or ``(image, height, width, 3)`` for colours.
        names: the paths of the files, relative to the folder.
        labels: the index of each image's subfolder among the sorted subfolders; None without subfolders.
        label_names: the names of the subfolders.
        notes: sentences for the summary, such as on grey images among colour images.
    """

    array: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    label_names: list[str] | None
    notes: list[str]


def find_pictures(folder: Path) -> list[Path]:
    """Find the image files in a folder and its subfolders, sorted by name.

    Raises:
        DataError: if only some files are in subfolders.
    """
    every = [*folder.glob("*"), *folder.glob("*/*")]
    found = sorted(path for path in every if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file())
    beside = [path for path in found if path.parent == folder]
    if beside and len(beside) < len(found):
        raise DataError(
            f"{folder}: {beside[0].name} is in no subfolder, but other images are; put every image or none into a "
            "subfolder named by its label"
        )
    return found


def read_pictures(folder: Path, paths: Sequence[Path]) -> Pictures:
    """Read image files of one size; convert grey images to colours if there are both.

    Args:
        folder: the folder of the files; subfolders are labels.
        paths: the paths of the files.

    Raises:
        DataError: if a file cannot be read, or the sizes differ.
    """
    _validate_sizes(folder, paths)
    images = [_open(path) for path in paths]
    modes = [image.mode for image in images]
    for path, mode in zip(paths, modes, strict=True):
        if mode not in GREY + COLOUR:
            raise DataError(f"{path}: the pixels have Pillow's mode {mode}; save the image with 8 bits per channel")
    grey = [mode in GREY for mode in modes]
    notes = [f"{sum(grey)} grey images converted to colours"] if 0 < sum(grey) < len(grey) else []
    array = np.stack([np.asarray(image.convert("L" if all(grey) else "RGB")) for image in images])
    names = [path.relative_to(folder).as_posix() for path in paths]
    if paths[0].parent == folder:
        return Pictures(array, names, None, None, notes)
    of_files = [path.parent.name for path in paths]
    label_names = sorted({*of_files})
    labels = np.array([label_names.index(name) for name in of_files])
    return Pictures(array, names, labels, label_names, [*notes, f"labels from {len(label_names)} subfolders"])


def _validate_sizes(folder: Path, paths: Sequence[Path]) -> None:
    """Validate, before any pixel is read, that images have one size and fit into memory."""
    sizes = [_open(path, load=False).size for path in paths]
    if other := next((i for i, size in enumerate(sizes) if size != sizes[0]), None):
        first, second = (f"{sizes[i][0]} × {sizes[i][1]}" for i in (0, other))
        raise DataError(
            f"{folder}: {paths[0].name} has {first} pixels and {paths[other].name} {second}; make the sizes equal"
        )
    width, height = sizes[0]
    validate_unpacked(folder, 12 * width * height * len(paths), sum(path.stat().st_size for path in paths))


def _open(path: Path, *, load: bool = True) -> Any:
    """Open an image, and read its pixels unless ``load`` is false."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path}: reading images needs Pillow; pip install pillow") from error
    try:
        with Image.open(path) as image:
            if load:
                image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a valid image ({' '.join(str(error).split())}); copy or make it again") from error
