"""Tables: rows that are read by their number, from a file or an array."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.images import Layout, layout_of
from pyro_vae.data.readers import whole_numpy
from pyro_vae.data.values import reason
from pyro_vae.errors import DataError

Read = Callable[[int, Rows], int]
"""Fills rows from a number on, and returns how many: at least 1, unless the reader has to move on first."""


@dataclass(frozen=True, eq=False)
class Table:
    """Whatever is streamed: so many rows of one shape.

    Args:
        name: for messages.
        size: the number of rows.
        features: the shape of a row.
        context: the width of the context, 0 for none.
        masked: whether the table says which values were observed.
        columns: the names of the features.
        layout: how a row holds an image, where it is one.
        dtype: of the numbers, where the table is one array.
        seekable: whether rows can be read in any order, and not from the front only.
    """

    name: str
    size: int
    features: tuple[int, ...]
    context: int = field(default=0, kw_only=True)
    masked: bool = field(default=False, kw_only=True)
    columns: Sequence[str] | None = field(default=None, kw_only=True)
    layout: Layout = field(default=Layout(None), kw_only=True)
    dtype: np.dtype | None = field(default=None, kw_only=True)
    seekable: bool = field(default=True, kw_only=True)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of the image that a row is, if it is one."""
        return self.layout.image_shape

    def cuts(self, rows: int) -> np.ndarray:
        """Where to cut into blocks of about so many rows, from 0 to the number of rows."""
        return np.append(np.arange(0, self.size, rows), self.size)

    def place(self, row: int) -> tuple[str, int, int]:
        """The file that holds a row, the row's number there, and how many of its rows follow, this one among them."""
        return self.name, row, self.size - row

    def soon(self, first: int, last: int) -> None:
        """Learn that these rows will be read soon."""

    def reader(self, seed: int) -> Read:
        """What reads the table in one pass, whose seed may decide the order of the rows."""
        return self.read

    def read(self, start: int, into: Rows) -> int:
        """Fill ``into`` with the rows from ``start`` on, and return how many: less where a file or a group ends."""
        raise NotImplementedError

    def read_all(self, start: int, into: Rows) -> None:
        """Fill the whole of ``into`` with the rows from ``start`` on."""
        at = 0
        while at < len(into):
            at += self.read(start + at, into.take(slice(at, None)))


def describe_array(array: Any, name: str) -> dict[str, Any]:
    """Validate that an array is a table of numbers, and describe it as :class:`Table` does, its rows flattened."""
    shape, dtype = array.shape, np.dtype(array.dtype)
    if dtype.kind not in "fiub":
        raise DataError(f"{name}: the values are of type {dtype}; give real numbers")
    if len(shape) < 2:
        raise DataError(f"{name}: the shape is {tuple(shape)}; give one row per datum and one column per feature")
    if 0 in shape:
        raise DataError(f"{name}: the shape is {tuple(shape)}; there must be at least one row and one feature")
    size, *row = map(int, shape)
    about = {"name": name, "size": size, "features": (math.prod(row),), "dtype": dtype}
    return {**about, "layout": layout_of(shape, dtype)}


def put(values: Any, into: np.ndarray) -> None:
    """Copy numbers in another precision; what overflows becomes infinite, and is refused by its place."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(into, values, casting="unsafe")


def stamp_of(file: Path | int) -> tuple[int, int]:
    """The size of a file, by its path or number, and the time of its last change."""
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns


def changed(path: Path) -> DataError:
    """The error to raise where a file has changed."""
    return DataError(f"{path}: the file has changed since it was opened; leave it as it is while it is read")


@dataclass(frozen=True, eq=False)
class RawFile(Table):
    """Rows one after another in a file, read where they are needed and kept nowhere else.

    A memory-mapped file instead would count as memory of the process, page by page.

    Args:
        path: the file.
        offset: where the first row begins, in bytes.
        stamp: of the file when it was opened.
    """

    path: Path
    offset: int
    stamp: tuple[int, int]

    def _at(self, row: int) -> int:
        return self.offset + row * self.features[0] * np.dtype(self.dtype).itemsize

    def soon(self, first: int, last: int) -> None:
        """Ask the system to read ahead, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.path.open("rb", buffering=0) as file:
                begin, end = self._at(first), self._at(last)
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, into: Rows) -> int:
        """Read straight into ``into`` where the file has its precision and byte order."""
        out = into.x.numpy()
        raw = out if out.dtype == self.dtype and out.flags.c_contiguous else np.empty(out.shape, self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._at(start))
                left = raw.reshape(-1).view(np.uint8).data
                while left and stamp_of(file.fileno()) == self.stamp and (got := file.readinto(left)):
                    left = left[got:]
            if left:
                raise changed(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({reason(error)}); copy or make it again") from error
        if raw is not out:
            put(self.layout.rows(raw), out)
        return len(into)


def open_npy(path: Path) -> RawFile:
    """Open a ``.npy`` file, of which only the header is read."""
    with whole_numpy(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return open_memmap(array, str(path))


def open_memmap(array: np.memmap, name: str) -> RawFile:
    """Open the file behind a memory-mapped array."""
    about, path = describe_array(array, name), Path(str(array.filename))
    if not array.flags.c_contiguous:
        raise DataError(f"{name}: a row does not lie in one piece (Fortran order); save numpy.ascontiguousarray of it")
    return RawFile(**about, path=path, offset=int(array.offset), stamp=stamp_of(path))


@dataclass(frozen=True, eq=False)
class Sliced(Table):
    """An array that is cut by slices, as NumPy's, Zarr's and HDF5's are.

    Args:
        array: with a shape, a ``dtype``, and perhaps ``chunks``.
    """

    array: Any

    def cuts(self, rows: int) -> np.ndarray:
        """Whole chunks, so that none is decoded twice for one window."""
        chunk = (getattr(self.array, "chunks", None) or (1,))[0]
        return super().cuts(-(-rows // chunk) * chunk)

    def read(self, start: int, into: Rows) -> int:
        try:
            put(self.layout.rows(np.asarray(self.array[start : start + len(into)])), into.x.numpy())
        except Exception as error:  # of whatever library the array is
            raise DataError(f"{self.name}: cannot be read ({reason(error)}); copy or make it again") from error
        return len(into)
