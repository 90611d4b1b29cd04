"""Parquet data sets: a file, or a folder of them, read a row group at a time by pyarrow.dataset."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.limits import MOST_ENTRIES, validate_regular
from pyro_vae.data.readers import arrow_numbers, whole_parquet
from pyro_vae.data.streams.tables import Table, changed, put, stamp_of
from pyro_vae.errors import DataError

MOST_BYTES = 2**30
"""A row group of more cannot be read within the memory that a stream keeps to."""

PIECE = 2**12
"""Columns become rows so many rows at a time, which stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class ParquetTable(Table):
    """The rows of Parquet files one after another, in the order of their names.

    Args:
        files: a fragment of each file, which holds its footer, and the file's stamp.
        groups: of each row group the index of its file, its own index there, and the number of its first row there.
        bounds: of the row groups, from 0 to the number of rows.
        names: of the columns that are read, x before the context.
    """

    files: Sequence[tuple[Any, tuple[int, int]]]
    groups: Sequence[tuple[int, int, int]]
    bounds: np.ndarray
    names: Sequence[str]
    _last: dict[tuple[int, str], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """To be handed to another process, without the row group that was read last."""
        return {**self.__dict__, "_last": {}}

    def cuts(self, rows: int) -> np.ndarray:
        """Row groups, whatever their size: none can be read in part."""
        return self.bounds

    def _group(self, row: int) -> tuple[int, int, int]:
        """The index of the row group that holds a row, the row's number in it, and how many of its rows follow."""
        index = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return index, row - int(self.bounds[index]), int(self.bounds[index + 1]) - row

    def place(self, row: int) -> tuple[str, int, int]:
        index, inside, left = self._group(row)
        file, _, first = self.groups[index]
        return self.files[file][0].path, first + inside, left

    def read(self, start: int, into: Rows) -> int:
        """Read to the end of the row group, which is kept: the next window may begin in it."""
        index, begin, left = self._group(start)
        dtype, width, count = into.x.numpy().dtype, self.features[0], min(len(into), left)
        if (values := self._last.get((index, dtype.name))) is None:
            self._last.clear()
            values = self._last[index, dtype.name] = self._decode(index, dtype)
        for at in range(0, count, PIECE):
            rows = values[:, begin + at : begin + min(at + PIECE, count)].T
            into.x.numpy()[at : at + len(rows)] = rows[:, :width]
            if into.context is not None and self.context:
                into.context.numpy()[at : at + len(rows)] = rows[:, width:]
        return count

    def _decode(self, index: int, dtype: np.dtype) -> np.ndarray:
        """All numbers of a row group, shape ``(column, row)``, x before the context."""
        file, number, _ = self.groups[index]
        fragment, stamp = self.files[file]
        with whole_parquet(fragment.path):
            if stamp_of(Path(fragment.path)) != stamp:
                raise changed(fragment.path)
            table = fragment.subset(row_group_ids=[number]).to_table(columns=self.names, use_threads=False)
        values = np.empty((len(self.names), len(table)), dtype)
        for own, name in zip(values, self.names, strict=True):
            put(arrow_numbers(table.column(name)), own)
        return values


def open_parquet(path: Path, *, columns: Sequence[str] | None = None, context: Sequence[str] = ()) -> ParquetTable:
    """Open a Parquet file or a folder of them, reading footers only; x are all columns but context, if not named."""
    fragments = parquet_fragments(path)
    if not fragments:
        raise DataError(f"{path}: the folder holds no .parquet files and is no Zarr array; give one that does")
    files, groups, sizes = [], [], [0]
    for fragment in fragments:
        validate_regular(Path(fragment.path), links=True, advice="copy it again")
        with whole_parquet(fragment.path):
            files.append((fragment, stamp_of(Path(fragment.path))))
            fragment.ensure_complete_metadata()
        _validate_schema(fragment, fragments[0])
    schema = fragments[0].physical_schema
    names = [name for name in schema.names if name not in context] if columns is None else list(columns)
    _validate_columns(fragments[0].path, schema, names, context)
    for index, (fragment, _) in enumerate(files):
        first = 0
        for group in fragment.row_groups:
            if (size := 8 * group.num_rows * (len(names) + len(context))) > MOST_BYTES:
                raise DataError(
                    f"{fragment.path}: row group {group.id} has {group.num_rows} rows, {size / 2**30:.1f} GiB once "
                    "read, and it can be read only as a whole; write it again with a smaller row_group_size"
                )
            if group.num_rows:
                groups.append((index, group.id, first))
                sizes.append(group.num_rows)
            first += group.num_rows
    if not groups:
        raise DataError(f"{path}: the table has 0 rows; it needs some")
    return ParquetTable(
        str(path), sum(sizes), (len(names),), files=files, groups=groups, bounds=np.cumsum(sizes),
        names=[*names, *context], columns=names, context=len(context),
    )  # fmt: skip


def parquet_fragments(path: Path) -> list[Any]:
    """The Parquet files of a path, none of them opened, as fragments of a data set of pyarrow.

    What writers of folders name with a dot or a low line is no part of the table, as what a failed job has left.
    """
    import pyarrow as pa
    from pyarrow import dataset

    if path.is_dir() and not _holds_parquet(path):
        return []
    with whole_parquet(path):
        found = [*dataset.dataset(path, format="parquet", schema=pa.schema([])).get_fragments()]
    return [fragment for fragment in found if path.is_file() or fragment.path.endswith(".parquet")]


def _holds_parquet(folder: Path) -> bool:
    """Whether a folder holds Parquet files, as far as its first entries tell."""
    entries = 0
    for _, folders, files in os.walk(folder):
        if any(name.endswith(".parquet") for name in files):
            return True
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            break
    return False


def _validate_schema(fragment: Any, of: Any) -> None:
    """Validate that a file has the columns of another."""
    mine, theirs = fragment.physical_schema, of.physical_schema
    if mine.names != theirs.names:
        other = sorted(set(mine.names) ^ set(theirs.names)) or "the same in another order"
        raise DataError(f"{fragment.path}: other columns than {of.path} ({other}); give files of the same columns")
    for name, kind, expected in zip(mine.names, mine.types, theirs.types, strict=True):
        if kind != expected:
            raise DataError(
                f"{fragment.path}: column {name!r} is of type {kind}, and {expected} in {of.path}; "
                "write it again with the same types"
            )


def _validate_columns(path: str, schema: Any, names: Sequence[str], context: Sequence[str]) -> None:
    """Validate that columns are there, once each, and hold numbers."""
    import pyarrow as pa

    if twice := {*names} & {*context} or {name for name in names if [*names].count(name) > 1}:
        raise DataError(f"{path}: column {min(twice)!r} is taken twice; leave it out of columns= or of context=")
    if not names:
        raise DataError(f"{path}: the table has {len(schema.names)} columns, none for the data; it needs some")
    for name in [*names, *context]:
        if schema.names.count(name) != 1:
            raise DataError(f"{path}: {schema.names.count(name)} columns are called {name!r}; it has {schema.names}")
        kind = schema.field(name).type
        known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
        if not any(is_one(kind) for is_one in known):
            raise DataError(
                f"{path}: column {name!r} is of type {kind}, no number; encode it as such, or leave it out by columns="
            )
