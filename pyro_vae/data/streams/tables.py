"""Tables that streams read: rows of a file or an array, by number."""

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
from pyro_vae.data.netcdf import validate_decoded
from pyro_vae.data.precision import validate_integers
from pyro_vae.data.readers import whole_numpy
from pyro_vae.data.tables import column_names
from pyro_vae.data.values import reason, validate_unmasked
from pyro_vae.errors import DataError

Read = Callable[[int, Rows], int]
"""Fills rows from a row number on, and returns how many; 0 while a sequential reader skips rows."""


@dataclass(frozen=True, eq=False)
class Table:
    """Base class of tables: rows of the same shape.

    Args:
        name: the name of the table, for messages.
        size: the number of rows.
        features: the shape of a row.
        context: the width of the context, 0 for none.
        masked: whether the table has a mask of observed values.
        columns: the names of the features.
        context_columns: the names of the context columns.
        layout: the layout of images in rows, if rows are images.
        dtype: the type of the numbers, if the table is an array.
        seekable: whether rows can be read in any order, or only sequentially.
    """

    name: str
    size: int
    features: tuple[int, ...]
    context: int = field(default=0, kw_only=True)
    masked: bool = field(default=False, kw_only=True)
    columns: Sequence[str] | None = field(default=None, kw_only=True)
    context_columns: Sequence[str] | None = field(default=None, kw_only=True)
    layout: Layout = field(default=Layout(None), kw_only=True)
    dtype: np.dtype | None = field(default=None, kw_only=True)
    seekable: bool = field(default=True, kw_only=True)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of an image, if rows are images."""
        return self.layout.image_shape

    @property
    def wide(self) -> bool:
        """Whether single precision may change the numbers of an array or a table of numbers."""
        return self.dtype is not None and self.dtype != np.float32 and self.dtype.itemsize > 2

    def cuts(self, rows: int) -> np.ndarray:
        """Return the bounds of blocks of about ``rows`` rows, from 0 to the number of rows."""
        return np.append(np.arange(0, self.size, rows), self.size)

    def place(self, row: int) -> tuple[str, int, int]:
        """Return the file of a row, the row's number in it, and the number of rows from there on."""
        return self.name, row, self.size - row

    def read_ahead(self, first: int, last: int) -> None:
        """Prepare for reading these rows soon."""

    def validate_in_order(self) -> None:
        """Raise a DataError if the table is known to give its rows in another order than the data."""

    def reader(self, seed: int) -> Read:
        """Return a reader for one pass, whose seed may determine the order of the rows."""
        return self.read

    def read(self, start: int, into: Rows) -> int:
        """Fill ``into`` with rows from ``start`` on, and return their number, fewer at the end of a file or group."""
        raise NotImplementedError

    def read_all(self, start: int, into: Rows) -> None:
        """Fill all of ``into`` with the rows from ``start`` on."""
        at = 0
        while at < len(into):
            at += self.read(start + at, into.take(slice(at, None)))


def describe_array(array: Any, name: str) -> dict[str, Any]:
    """Validate that an array is a table of numbers, and return the arguments of a :class:`Table` of its rows."""
    shape, dtype = array.shape, np.dtype(array.dtype)
    if dtype.kind not in "fiub":
        raise DataError(f"{name}: the values have type {dtype}; give real numbers")
    if len(shape) < 2:
        raise DataError(f"{name}: the shape is {tuple(shape)}; give one row per datum and one column per feature")
    if 0 in shape:
        raise DataError(f"{name}: the shape is {tuple(shape)}; there must be at least one row and one feature")
    validate_decoded(array, dtype, name)
    size, *row = map(int, shape)
    about = {"name": name, "size": size, "features": (math.prod(row),), "dtype": dtype}
    return {**about, "columns": _columns_of(array), "layout": layout_of(shape, dtype)}


def _columns_of(array: Any) -> list[str] | None:
    """Return the names that an array of xarray has for its second dimension, as in memory."""
    coords = getattr(array, "coords", {})
    if len(array.shape) != 2 or not coords or array.dims[1] not in coords:
        return None
    return column_names(coords[array.dims[1]].values.tolist())


def copy_numbers(values: Any, into: np.ndarray) -> None:
    """Copy numbers to another precision; overflow gives infinity, which validation reports with its position.

    Raises:
        DataError: if an integer above 2⁵³ would be rounded.
    """
    validate_integers(np.asarray(values), "the data")
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(into, values, casting="unsafe")


def stamp_of(file: Path | int) -> tuple[int, int]:
    """Return the size and the modification time of a file, given its path or file descriptor."""
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns


def file_changed(path: Path) -> DataError:
    """Return the error for a file that changed after it was opened."""
    return DataError(f"{path}: the file has changed since it was opened; do not write to it while it is read")


@dataclass(frozen=True, eq=False)
class RawFile(Table):
    """Rows stored contiguously in a file, read on demand and not cached.

    The pages of a memory-mapped file would count as memory of the process.

    Args:
        path: the path of the file.
        offset: the position of the first row, in bytes.
        stamp: the stamp of the file when it was opened.
    """

    path: Path
    offset: int
    stamp: tuple[int, int]

    def _at(self, row: int) -> int:
        return self.offset + row * self.features[0] * np.dtype(self.dtype).itemsize

    def read_ahead(self, first: int, last: int) -> None:
        """Ask the operating system to read ahead, if it supports that."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.path.open("rb", buffering=0) as file:
                begin, end = self._at(first), self._at(last)
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, into: Rows) -> int:
        """Read directly into ``into`` if the file has the same precision and byte order."""
        out = into.x.numpy()
        raw = out if out.dtype == self.dtype and out.flags.c_contiguous else np.empty(out.shape, self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._at(start))
                left = raw.reshape(-1).view(np.uint8).data
                while left and stamp_of(file.fileno()) == self.stamp and (got := file.readinto(left)):
                    left = left[got:]
            if left:
                raise file_changed(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({reason(error)}); copy or make it again") from error
        if raw is not out:
            copy_numbers(self.layout.rows(raw), out)
        return len(into)


def open_npy(path: Path) -> RawFile:
    """Open a ``.npy`` file, reading only its header."""
    with whole_numpy(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return open_memmap(array, str(path))


def open_memmap(array: np.memmap, name: str) -> RawFile:
    """Open the file behind a memory-mapped array."""
    about, path = describe_array(array, name), Path(str(array.filename))
    if not array.flags.c_contiguous:
        raise DataError(f"{name}: rows are not contiguous (Fortran order); save numpy.ascontiguousarray(array)")
    return RawFile(**about, path=path, offset=int(array.offset), stamp=stamp_of(path))


@dataclass(frozen=True, eq=False)
class Sliced(Table):
    """An array that supports slices, such as those of NumPy, Zarr and HDF5.

    Args:
        array: an array with ``shape``, ``dtype`` and perhaps ``chunks``.
    """

    array: Any

    def cuts(self, rows: int) -> np.ndarray:
        """Return bounds of whole chunks, so that no chunk is decoded twice for a window."""
        chunk = (getattr(self.array, "chunks", None) or (1,))[0]
        return super().cuts(-(-rows // chunk) * chunk)

    def read(self, start: int, into: Rows) -> int:
        try:
            values = self.array[start : start + len(into)]
            validate_unmasked(values, self.name)
            copy_numbers(self.layout.rows(np.asarray(values)), into.x.numpy())
        except DataError:
            raise
        except Exception as error:  # the array may come from any library
            raise DataError(f"{self.name}: cannot be read ({reason(error)}); copy or make it again") from error
        return len(into)
