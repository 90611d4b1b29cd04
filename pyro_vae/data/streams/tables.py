"""Rows that can be read by their number: of a file, of an array, of a data set of torch."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.readers import whole_numpy
from pyro_vae.data.rows import reason
from pyro_vae.errors import DataError


@dataclass(frozen=True, eq=False)
class Table(ABC):
    """Rows that are read by their number, as a file or an array holds them in one piece; others say where theirs lie.

    Args:
        name: for messages.
        size: how many rows there are.
        features: the shape of a row.
        context: the width of the context, 0 where there is none.
        masked: whether it says itself what is missing.
        columns: the names of the features.
        image_shape: ``(height, width)`` where a row is an image.
    """

    name: str
    size: int
    features: tuple[int, ...]
    context: int = field(default=0, kw_only=True)
    masked: bool = field(default=False, kw_only=True)
    columns: Sequence[str] | None = field(default=None, kw_only=True)
    image_shape: tuple[int, int] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return self.size

    def cuts(self, rows: int) -> np.ndarray:
        """Where to cut into blocks of about so many rows, from 0 to the number of rows."""
        return np.append(np.arange(0, self.size, rows), self.size)

    def place(self, row: int) -> tuple[str, int, int]:
        """The file that holds a row, the row's number there, and how many of its rows follow, this one among them."""
        return self.name, row, self.size - row

    def soon(self, first: int, last: int) -> None:  # noqa: B027
        """These rows will be read soon."""

    @abstractmethod
    def read(self, start: int, into: Rows) -> None:
        """Fill ``into`` with the rows from ``start`` on."""


def flat(shape: Sequence[int]) -> dict[str, Any]:
    """Of an array's shape, the settings of a :class:`Table` whose rows are flattened.

    Example:
        >>> flat((5, 2, 3))
        {'size': 5, 'features': (6,), 'image_shape': (2, 3)}
    """
    size, *row = map(int, shape)
    return {"size": size, "features": (math.prod(row),), "image_shape": (row[0], row[1]) if len(row) == 2 else None}


def refuse_table(name: str, shape: Sequence[int], dtype: Any) -> None:
    """Refuse what is no table of numbers.

    Raises:
        DataError: naming what it is.

    Example:
        >>> refuse_table("a.npy", (3,), np.dtype(float))
        Traceback (most recent call last):
        pyro_vae.errors.DataError: a.npy: the shape is (3,); give one row per datum and one column per feature
    """
    if np.dtype(dtype).kind not in "fiub":
        raise DataError(f"{name}: the values are of type {dtype}; give real numbers")
    if len(shape) < 2:
        raise DataError(f"{name}: the shape is {tuple(shape)}; give one row per datum and one column per feature")
    if 0 in shape:
        raise DataError(f"{name}: the shape is {tuple(shape)}; there must be at least one row and one feature")


def put(values: Any, into: np.ndarray) -> None:
    """Copy numbers in another precision; what overflows becomes infinite, and is refused by its place."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(into, values, casting="unsafe")


def stamp_of(path: Path) -> tuple[int, int]:
    """What tells that a file has changed: its size and the time of the last change."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def changed(path: Path) -> DataError:
    """To be raised where a file has changed."""
    return DataError(f"{path}: the file has changed since it was opened; leave it as it is while it is read")


@dataclass(frozen=True, eq=False)
class RawFile(Table):
    """Rows one after another in a file, read where they are needed and kept nowhere else.

    Args:
        path: the file.
        dtype: of the numbers.
        offset: where the first row begins, in bytes.
        stamp: of the file when it was opened.
    """

    path: Path
    dtype: np.dtype
    offset: int
    stamp: tuple[int, int]

    def _at(self, row: int) -> int:
        return self.offset + row * self.features[0] * self.dtype.itemsize

    def soon(self, first: int, last: int) -> None:
        """Ask the system to read ahead, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.path.open("rb", buffering=0) as file:
                begin, end = self._at(first), self._at(last)
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, into: Rows) -> None:
        out = into.x.numpy()
        direct = out.dtype == self.dtype and out.flags.c_contiguous
        raw = out if direct else np.empty(out.shape, self.dtype)
        bytes_ = raw.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                about, got = os.fstat(file.fileno()), 0
                if (about.st_size, about.st_mtime_ns) != self.stamp:
                    raise changed(self.path)
                file.seek(self._at(start))
                while got < len(bytes_):
                    if not (more := file.readinto(bytes_[got:])):
                        raise changed(self.path)
                    got += more
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({reason(error)}); copy or make it again") from error
        if not direct:
            put(raw, out)


def npy(path: Path) -> RawFile:
    """A ``.npy`` file, of which only the header is read.

    Args:
        path: the file.

    Raises:
        DataError: if it is not a whole file of numbers in rows.
    """
    with whole_numpy(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped(array, str(path))


def mapped(array: np.memmap, name: str) -> RawFile:
    """The file behind a memory-mapped array.

    Raises:
        DataError: if it holds no numbers in rows.
    """
    refuse_table(name, array.shape, array.dtype)
    if not array.flags.c_contiguous:
        raise DataError(f"{name}: a row does not lie in one piece (Fortran order); save numpy.ascontiguousarray of it")
    path = Path(str(array.filename))
    return RawFile(
        name, **flat(array.shape), path=path, dtype=array.dtype, offset=int(array.offset), stamp=stamp_of(path)
    )


@dataclass(frozen=True, eq=False)
class Sliced(Table):
    """An array that is cut by slices, as NumPy's, Zarr's and HDF5's are.

    Args:
        array: with a ``dtype``, and perhaps ``chunks``.
    """

    array: Any

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers."""
        return np.dtype(self.array.dtype)

    def cuts(self, rows: int) -> np.ndarray:
        """Whole chunks, so that none is decoded twice for one window."""
        chunk = (getattr(self.array, "chunks", None) or (1,))[0]
        return super().cuts(-(-rows // chunk) * chunk)

    def read(self, start: int, into: Rows) -> None:
        try:
            put(np.asarray(self.array[start : start + len(into)]).reshape(len(into), -1), into.x.numpy())
        except Exception as error:  # of whatever library the array is
            raise DataError(f"{self.name}: cannot be read ({reason(error)}); copy or make it again") from error


def sliced(array: Any, name: str) -> Sliced:
    """An array that is cut by slices.

    Raises:
        DataError: if it holds no numbers in rows.
    """
    refuse_table(name, array.shape, array.dtype)
    return Sliced(name, **flat(array.shape), array=array)


@dataclass(frozen=True, eq=False)
class Beside(Table):
    """A table with its context and its mask in tables of their own.

    Args:
        x: the data.
        conditions: the context.
        observed: the mask.
    """

    x: Table
    conditions: Table | None
    observed: Table | None

    def cuts(self, rows: int) -> np.ndarray:
        return self.x.cuts(rows)

    def place(self, row: int) -> tuple[str, int, int]:
        return self.x.place(row)

    def soon(self, first: int, last: int) -> None:
        for part in (self.x, self.conditions, self.observed):
            if part is not None:
                part.soon(first, last)

    def read(self, start: int, into: Rows) -> None:
        for part, place in ((self.conditions, into.context), (self.observed, into.mask)):
            if part is not None and place is not None:
                part.read(start, Rows(place))
        own = Rows(
            into.x,
            into.context if self.conditions is None else None,
            into.mask if self.observed is None else None,
        )
        self.x.read(start, own)


def beside(x: Table, conditions: Table | None = None, observed: Table | None = None) -> Table:
    """A table with its context and its mask in tables of their own, where there are such.

    Args:
        x: the data.
        conditions: the context.
        observed: the mask.

    Raises:
        DataError: if one has not as many rows, or the mask not the data's shape.
    """
    if conditions is None and observed is None:
        return x
    for what, other in {"context": conditions, "mask": observed}.items():
        if other is not None and len(other) != len(x):
            raise DataError(f"{other.name}: the {what} has {len(other)} rows and {x.name} {len(x)}")
    if observed is not None and observed.features != x.features:
        raise DataError(
            f"{observed.name}: a row of the mask has shape {observed.features} and one of {x.name} {x.features}; "
            "make them equal"
        )
    return Beside(
        x.name, len(x), x.features, x=x, conditions=conditions, observed=observed,
        context=x.context if conditions is None else conditions.features[0],
        masked=x.masked or observed is not None, columns=x.columns, image_shape=x.image_shape,
    )  # fmt: skip
