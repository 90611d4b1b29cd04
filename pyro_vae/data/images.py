"""Convert images to flat rows, channels first, from arrays of any layout and from folders of files."""

import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.limits import validate_unpacked
from pyro_vae.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's formats of these suffixes; it chooses one by content, and would start Ghostscript for a PostScript file."""

GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes with 8 bits per channel."""


MOST_SCANS = 100
"""The number of scans per JPEG image, about ten in progressive ones, above which large images are refused."""


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


def find_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """Find the image files in a folder and its subfolders, sorted by name; note how many other entries there are.

    Raises:
        DataError: if only some files are in subfolders.
    """
    every = [*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")]
    found = sorted(path for path in every if path.suffix.lower() in SUFFIXES and path.is_file())
    beside = [path for path in found if path.parent == folder]
    if beside and len(beside) < len(found):
        raise DataError(
            f"{folder}: {beside[0].name} is in no subfolder, but other images are; put every image or none into a "
            "subfolder named by its label"
        )
    others = len({*every} - {*found} - {path.parent for path in found})
    kind = "file or folder" if others == 1 else "files and folders"
    return found, [f"{others} other {kind} left out"] if others else []


def read_pictures(folder: Path, paths: Sequence[Path], notes: Sequence[str] = ()) -> Pictures:
    """Read image files of one size; convert grey images to colours if there are both.

    Args:
        folder: the folder of the files; subfolders are labels.
        paths: the paths of the files.
        notes: sentences to add to those on the images.

    Raises:
        DataError: if a file cannot be read, has several frames or more than 8 bits per channel, or the sizes differ.
    """
    _validate_sizes(folder, paths)
    images, ignored = zip(*map(_pixels, paths), strict=True)
    grey = [image.ndim == 2 for image in images]
    if not all(grey):
        images = tuple(np.stack([x, x, x], -1) if x.ndim == 2 else x for x in images)
    counts = {"grey images converted to colours": sum(grey) if not all(grey) else 0}
    counts |= {what: sum(what in one for one in ignored) for what in (ALPHA, TURNED)}
    about = [*notes, *(f"{count} {what}" for what, count in counts.items() if count)]
    names = [path.relative_to(folder).as_posix() for path in paths]
    if paths[0].parent == folder:
        return Pictures(np.stack(images), names, None, None, about)
    of_files = [path.parent.name for path in paths]
    label_names = sorted({*of_files})
    labels = np.array([label_names.index(name) for name in of_files])
    about.append(f"labels from {len(label_names)} subfolders")
    return Pictures(np.stack(images), names, labels, label_names, about)


def _validate_sizes(folder: Path, paths: Sequence[Path]) -> None:
    """Validate, before any pixel is read, that images have one size and fit into memory."""
    sizes, pixels, work = [], 0, 0
    for path in paths:
        with _opened(path) as image:
            sizes.append(image.size)
            decoded = max(image.width * image.height, _tile(image))
            pixels += decoded
            work += decoded * (_scans(path) if image.format in ("JPEG", "MPO") else 1)
    if other := next((i for i, size in enumerate(sizes) if size != sizes[0]), None):
        first, second = (f"{sizes[i][0]} × {sizes[i][1]}" for i in (0, other))
        raise DataError(
            f"{folder}: {paths[0].name} has {first} pixels and {paths[other].name} {second}; make the sizes equal"
        )
    validate_unpacked(folder, 12 * pixels, sum(path.stat().st_size for path in paths))
    if work > MOST_SCANS * pixels + 10**10:  # at about 10⁹ per second
        raise DataError(
            f"{folder}: the JPEG images have {round(work / pixels):,} scans on average, more than {MOST_SCANS}, and "
            "would take minutes to decode; save them as PNG"
        )


def _scans(path: Path) -> int:
    """Count the markers of scans in a JPEG file: each scan changes all pixels, however few bytes it has."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sum(1 for _ in re.finditer(rb"\xff\xda", content))


def _tile(image: Any) -> int:
    """Return the number of pixels in a tile of a TIFF image, which is decoded whole."""
    width, height = (getattr(image, "tag_v2", {}).get(tag, 0) for tag in (322, 323))
    return int(width) * int(height)


def _pixels(path: Path) -> tuple[np.ndarray, set[str]]:
    """Return the pixels of an image, shape ``(height, width)`` or ``(height, width, 3)``, and its ignored features."""
    with _opened(path) as image:
        _validate_channels(path, image)
        ignored = {ALPHA} if "A" in image.mode or "transparency" in image.info else set()
        if image.getexif().get(ORIENTATION, 1) not in (0, 1):
            ignored.add(TURNED)
        return np.asarray(image.convert("L" if image.mode in GREY else "RGB")), ignored


ALPHA, TURNED = "alpha channels left out", "EXIF orientations ignored"

ORIENTATION = 274
"""The EXIF tag that says how to turn an image."""


def _validate_channels(path: Path, image: Any) -> None:
    """Validate that an image has one frame and 8 bits per channel; Pillow reads a part of other images."""
    if image.mode not in GREY + COLOUR:
        raise DataError(f"{path}: the pixels have Pillow's mode {image.mode}; save the image with 8 bits per channel")
    raw = [part for tile in image.tile for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if any(re.search(r";16[BLN]", str(part)) for part in raw) or (
        image.format == "PPM" and max(map(_depth, raw)) > 255
    ):
        raise DataError(f"{path}: the pixels have 16 bits per channel; save the image with 8 bits per channel")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's JPEG with a preview
        raise DataError(f"{path}: has more than one frame or page; save each as an image of its own")


def _depth(part: Any) -> int:
    return part if isinstance(part, int) else 0


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an image, and convert Pillow's errors to a DataError of one sentence."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path}: reading images needs Pillow; pip install pillow") from error
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # the errors of Pillow on damaged files have no common base class
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: not a valid image ({why}); copy or make it again") from error
