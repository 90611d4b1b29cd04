"""Data beyond memory: files, data sets and iterables, streamed in shuffled windows."""

from collections.abc import Iterable, Sequence
from mmap import mmap
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.limits import validate_regular
from pyro_vae.data.streams.base import WINDOW_BYTES, Streamed
from pyro_vae.data.streams.batches import as_numpy, open_batches, open_dataset
from pyro_vae.data.streams.parquet import open_parquet
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
    """Data that need not fit into memory, as :func:`pyro_vae.fit` takes them.

    A window of rows is in memory while the next is read by a thread. At each pass the rows are cut into
    blocks that lie together, the blocks chained in a new order, the chain cut into windows, and the rows
    of a window visited in a new order: each row once. Two rows that lie far apart in the data may thus
    meet in a batch, if no window is between them; shuffle data once that are sorted and hold few blocks
    (row groups, chunks) per window. Rows of files that have more than one dimension are flattened.
    Every value is looked at as it is read, and refused by its place if it is not finite.

    Args:
        data: the path of a ``.npy`` file, of a Parquet file or a folder of such (what only the names of
            folders in it say, as ``k=1``, is no column), or of a Zarr array; an array that is cut by
            slices, as HDF5's; a map-style data set of torch; a ``DataLoader``; an ``IterableDataset``; an
            iterable of batches that can be read again and again, or a function that makes one. Items and
            batches are tensors or arrays, tuples whose first is x (labels are left out), or mappings with
            ``"x"`` and perhaps ``"context"`` and ``"mask"``. What a data set draws at random should come
            from a generator of its own, and it is warned where it does not. Loaders are seeded by the epoch.
        size: how many rows an iterable gives in a pass, the n of n/m; others know it.
        context: what prior, decoder and encoder are given besides: of as many rows, as ``data`` but no
            iterable; of Parquet, names of columns.
        mask: true where a value was observed: as ``context``, but no names.
        columns: names of the columns of Parquet to take; all that are not context, if not given.
        nan_is_missing: whether NaN, and null, mean that a value was not observed; else it is refused.
        window_bytes: at most so many bytes in each of the two windows.
        block_rows: about so many rows are read at once; if not given, a window holds 512 blocks. Row
            groups of Parquet and chunks of Zarr are read as wholes.
        source: what to call data that have no path in messages; their type if not given.

    Returns:
        The stream.

    Raises:
        DataError: in one sentence, if it cannot be read, holds no numbers in rows, or its size is not known.
        SettingsError: if a setting is out of its range, or is of another kind of data.

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
    table = _table(data, source=source, size=size, columns=columns, context=context)
    if not table.seekable:
        _validate_unset(table.name, context=context, mask=mask, block_rows=block_rows)
    _validate_unset(table.name, columns=None if table.columns else columns)
    if size not in (None, table.size):
        raise SettingsError(f"{table.name}: size is {size} and there are {table.size} rows; leave size out")
    given = {"context": None if table.context else context, "mask": mask}
    return Streamed(
        table=table,
        beside={part: _beside(other, part, table) for part, other in given.items() if other is not None},
        nan_is_missing=bool(nan_is_missing),
        window_bytes=whole("window_bytes", window_bytes, 1),
        block_rows=None if block_rows is None else whole("block_rows", block_rows, 1),
    )


def _table(data: Any, *, source: str | None, size: int | None, columns: Any = None, context: Any = None) -> Table:
    if isinstance(data, str | PathLike):
        return _of_path(Path(data), columns, context)
    name = source or str(getattr(data, "__name__", type(data).__name__))
    if isinstance(data, Tensor):
        data = as_numpy(data)
    if isinstance(data, np.ma.MaskedArray):
        raise DataError(f"{name}: a masked array; give its .data, and mask=~numpy.ma.getmaskarray(of it)")
    # No view of another, and none whose changes are not in the file.
    if isinstance(data, np.memmap) and isinstance(data.base, mmap) and data.mode != "c":
        return open_memmap(data, source or str(data.filename))
    if all(hasattr(data, attribute) for attribute in ("shape", "dtype", "__getitem__")):
        return Sliced(**describe_array(data, name), array=data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return open_dataset(data, name)
    if callable(data) or isinstance(data, Iterable):
        return open_batches(data, name, size)
    raise DataError(f"{name}: nothing that can be streamed; give a path, a data set of torch or an iterable of batches")


def _of_path(path: Path, columns: Sequence[str] | None, context: Any) -> Table:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give the path of data")
    if not path.is_dir():
        validate_regular(path, links=True, advice="give the path of a file")
    if path.is_dir() and is_zarr(path):
        return Sliced(**describe_array(array := open_zarr(path), str(path)), array=array)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        names = context is not None and not isinstance(context, str | PathLike) and not hasattr(context, "shape")
        return open_parquet(path, columns=columns, context=tuple(context) if names else ())
    if path.suffix.lower() == ".npy":
        return open_npy(path)
    raise DataError(
        f"{path}: only .npy, Parquet and Zarr are streamed; read it into memory by pyro_vae.data.load, or write it anew"
    )


def _beside(data: Any, part: str, x: Table) -> Table:
    """The table of a context or a mask, which has as many rows as the data, and a mask also their shape."""
    table = _table(data, source=None, size=x.size)
    if not table.seekable:
        raise SettingsError(f"{part}: an iterable cannot be read beside other data; let the data give mappings with it")
    if part == "mask" and table.dtype != np.bool_:
        raise DataError(f"{table.name}: the mask is of {table.dtype or 'no array'}; give booleans of the data's shape")
    if table.size != x.size:
        raise DataError(f"{table.name}: the {part} has {table.size} rows and {x.name} {x.size}; make them equal")
    if part == "mask" and table.features != x.features:
        raise DataError(
            f"{table.name}: a row of the mask has shape {table.features} and one of {x.name} {x.features}; "
            "make them equal"
        )
    return table


def _validate_unset(name: str, **settings: Any) -> None:
    for setting, value in settings.items():
        if value is not None:
            raise SettingsError(f"{name}: {setting} is for other kinds of data; leave it out")
