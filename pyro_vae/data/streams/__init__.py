"""Stream data larger than memory from files, data sets and iterables, in shuffled windows."""

import os
from collections.abc import Iterable, Sequence
from mmap import mmap
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.columns import list_names
from pyro_vae.data.limits import validate_regular
from pyro_vae.data.streams.base import WINDOW_BYTES, Streamed
from pyro_vae.data.streams.batches import as_numpy, open_batches, open_dataset
from pyro_vae.data.streams.parquet import ParquetTable, open_parquet
from pyro_vae.data.streams.tables import Sliced, Table, describe_array, open_memmap, open_npy
from pyro_vae.data.streams.zarr_store import is_zarr, open_zarr
from pyro_vae.errors import DataError, SettingsError

__all__ = ["Streamed", "stream"]


@takes_settings
def stream(
    data: Any,
    *,
    size: int | None = None,
    context: Any = None,
    mask: Any = None,
    columns: Sequence[str] | None = None,
    nan_is_missing: bool = False,
    window_bytes: int = WINDOW_BYTES,
    block_rows: int | None = None,
    source: str | None = None,
) -> Streamed:
    """Stream data that need not fit into memory, for :func:`pyro_vae.fit`.

    One window of rows is in memory while a thread reads the next. Each pass cuts the rows into blocks of consecutive
    rows, concatenates the blocks in a new order, cuts the result into windows, and visits the rows of each window in a
    new order, so each row is visited once. Two distant rows share a batch only if their blocks fall into the same
    window. Shuffle the data once before you stream them if they are sorted and a window has few blocks (row groups,
    chunks). Rows of files with more than one dimension are flattened. Each value is validated when it is read. Files
    and arrays are in double precision if single precision would merge values of a few rows; a fit uses the precision
    of the VAE.

    Args:
        data: the path of a ``.npy`` file, a Parquet file, a folder of Parquet files (values in folder names, such as
            ``k=1``, are not columns), or a Zarr array; an array that supports slices, such as HDF5's; a map-style data
            set of torch; a ``DataLoader``; an ``IterableDataset``; an iterable of batches that can be read repeatedly,
            or a function that returns one. Items and batches are tensors or arrays, tuples with x first (the rest is
            left out), or mappings with ``"x"`` and perhaps ``"context"`` and ``"mask"``. A data set that draws random
            numbers should use its own generator; otherwise a warning is raised. Loaders are seeded in each epoch. A
            loader that shuffles, samples or drops rows is for training only: functions whose results belong to rows,
            such as :func:`pyro_vae.encode`, refuse it. An array of xarray has the names of its columns.
        size: the number of rows in a pass over an iterable, the n of the n/m scaling; other data know it.
        context: additional input of prior, decoder and encoder: data with the same number of rows, as for ``data`` but
            not an iterable, or names of Parquet columns.
        mask: true where a value was observed: as for ``context``, but not names.
        columns: the names of the Parquet columns to use; all columns except the context and the index that pandas
            wrote if not given.
        nan_is_missing: whether NaN and null mark missing values; otherwise they are an error.
        window_bytes: the maximum size, in bytes, of each of the two windows.
        block_rows: the approximate number of rows to read at once; by default a window has 512 blocks. Row groups of
            Parquet and chunks of Zarr are never split.
        source: the name of data without a path, for messages; their type if not given.

    Returns:
        The stream.

    Raises:
        DataError: if the data cannot be read or are not rows of numbers, or their size is unknown.
        SettingsError: if a setting is out of range or does not apply to this kind of data.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "x.npy"), np.arange(12.0).reshape(6, 2))
        ...     rows = stream(Path(folder, "x.npy"), window_bytes=32)
        ...     visited = [w.rows.x[w.order, 0].tolist() for w in rows.windows(seed=0, batch_size=2)]
        >>> len(rows), sorted(sum(visited, []))
        (6, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0])
    """
    if isinstance(columns, str):
        raise SettingsError(f"columns is {columns!r}; give a list of names")
    size = None if size is None else whole("size", size, 1)
    table = _open_table(data, source=source, size=size, columns=columns, context=context)
    if not table.seekable:
        _validate_unset(table.name, context=context, mask=mask, block_rows=block_rows)
    _validate_unset(table.name, columns=None if isinstance(table, ParquetTable) else columns)
    if size not in (None, table.size):
        raise SettingsError(f"{table.name}: size is {size} but there are {table.size} rows; leave size out")
    given = {"context": None if table.context else context, "mask": mask}
    streamed = Streamed(
        table=table,
        beside={part: _open_beside(other, part, table) for part, other in given.items() if other is not None},
        nan_is_missing=bool(nan_is_missing),
        window_bytes=whole("window_bytes", window_bytes, 1),
        block_rows=None if block_rows is None else whole("block_rows", block_rows, 1),
    )
    return streamed.narrowed() if table.wide else streamed


def _open_table(data: Any, *, source: str | None, size: int | None, columns: Any = None, context: Any = None) -> Table:
    if isinstance(data, str | PathLike):
        return _open_path(Path(data), columns, context)
    name = source or str(getattr(data, "__name__", type(data).__name__))
    if isinstance(data, Tensor):
        data = as_numpy(data)
    if isinstance(data, np.ma.MaskedArray):
        raise DataError(f"{name}: is a masked array; give its .data and mask=~numpy.ma.getmaskarray(array)")
    # The file is read directly unless the array is a view or its changes are not written to the file.
    if isinstance(data, np.memmap) and isinstance(data.base, mmap) and data.mode != "c":
        return open_memmap(data, source or str(data.filename))
    if all(hasattr(data, attribute) for attribute in ("shape", "dtype", "__getitem__")):
        return Sliced(**describe_array(data, name), array=data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return open_dataset(data, name)
    if callable(data) or isinstance(data, Iterable):
        return open_batches(data, name, size)
    raise DataError(f"{name}: cannot be streamed; give a path, a data set of torch or an iterable of batches")


def _open_path(path: Path, columns: Sequence[str] | None, context: Any) -> Table:
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder; give the path of data")
    if not os.path.isdir(path):
        validate_regular(path, links=True, advice="give the path of a file")
    if os.path.isdir(path) and is_zarr(path):
        return Sliced(**describe_array(array := open_zarr(path), str(path)), array=array)
    if os.path.isdir(path) or path.suffix.lower() == ".parquet":
        names = context is not None and not isinstance(context, str | PathLike) and not hasattr(context, "shape")
        return open_parquet(path, columns=columns, context=tuple(context) if names else ())
    if path.suffix.lower() == ".npy":
        return open_npy(path)
    raise DataError(
        f"{path}: only .npy, Parquet and Zarr can be streamed; read it with pyro_vae.data.load, or convert it"
    )


def _open_beside(data: Any, part: str, x: Table) -> Table:
    """Open a context or a mask, and validate that its rows, and the shape of a mask, match the data."""
    table = _open_table(data, source=None, size=x.size)
    if not table.seekable:
        raise SettingsError(f"{part}: is an iterable, whose order may differ from the data; include it in the data")
    if part == "mask" and table.dtype != np.bool_:
        kind = "is not an array" if table.dtype is None else f"has type {table.dtype}"
        raise DataError(f"{table.name}: the mask {kind}; give booleans of the data's shape")
    if table.size != x.size:
        raise DataError(f"{table.name}: the {part} has {table.size} rows, but {x.name} has {x.size}; make them equal")
    if part == "mask" and table.features != x.features:
        raise DataError(
            f"{table.name}: a row of the mask has shape {table.features}, but a row of {x.name} {x.features}; "
            "make them equal"
        )
    if part == "mask" and table.columns and x.columns and [*table.columns] != [*x.columns]:
        raise DataError(
            f"{table.name}: the columns of the mask are {list_names(table.columns)}, but those of {x.name} are "
            f"{list_names(x.columns)}; give the mask the columns of the data, in their order"
        )
    if isinstance(table, ParquetTable) and isinstance(x, ParquetTable):
        own, labels = table.labels(), x.labels()
        if own is not None and labels is not None and own.columns != labels.columns:
            raise DataError(
                f"{table.name}: the rows of the {part} are labelled differently from {x.name}; write both in one "
                "order, or without an index"
            )
    return table


def _validate_unset(name: str, **settings: Any) -> None:
    for setting, value in settings.items():
        if value is not None:
            raise SettingsError(f"{name}: {setting} does not apply to this kind of data; leave it out")
