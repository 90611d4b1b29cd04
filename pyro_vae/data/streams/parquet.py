"""Read Parquet files and folders by row group, with pyarrow.dataset."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.limits import MOST_ENTRIES, try_reading, validate_regular
from pyro_vae.data.parquet import arrow_numbers, column_chunks, pandas_index, read_parquet, whole_parquet
from pyro_vae.data.row_labels import UNNAMED
from pyro_vae.data.streams.tables import Table, copy_numbers, file_changed, stamp_of
from pyro_vae.errors import DataError

MOST_BYTES = 2**30
"""The maximum size, in bytes, of a row group, which must fit into the memory of a stream."""

NARROW = ("float", "halffloat", "int8", "uint8", "int16", "uint16", "bool", "null")
"""The types of columns whose numbers single precision does not change."""

PIECE = 2**12
"""The number of rows to transpose at a time, small enough for the cache of the CPU."""


@dataclass(frozen=True, eq=False)
class ParquetTable(Table):
    """The concatenated rows of Parquet files, in the order of their names.

    Args:
        files: the fragment of each file, which contains its footer, and the stamp of the file.
        groups: for each row group the index of its file, its index in the file, and its first row in the file.
        bounds: the bounds of the row groups, from 0 to the number of rows.
        names: the names of the columns to read, x before the context.
    """

    files: Sequence[tuple[Any, tuple[int, int]]]
    groups: Sequence[tuple[int, int, int]]
    bounds: np.ndarray
    names: Sequence[str]
    _last: dict[tuple[int, str], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def wide(self) -> bool:
        schema = self.files[0][0].physical_schema
        return any(str(schema.field(name).type) not in NARROW for name in self.names)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, without the cached row group."""
        return {**self.__dict__, "_last": {}}

    def cuts(self, rows: int) -> np.ndarray:
        """Return the bounds of the row groups, which cannot be read in part."""
        return self.bounds

    def _group(self, row: int) -> tuple[int, int, int]:
        """Return the index of the row group of a row, the row's number in it, and the number of rows from there on."""
        index = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return index, row - int(self.bounds[index]), int(self.bounds[index + 1]) - row

    def place(self, row: int) -> tuple[str, int, int]:
        index, inside, left = self._group(row)
        file, _, first = self.groups[index]
        return self.files[file][0].path, first + inside, left

    def read(self, start: int, into: Rows) -> int:
        """Read at most to the end of the row group, and cache it, because the next window may start in it."""
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

    def labels(self) -> Any:
        """Read the row labels that pandas wrote as an index; return an Arrow table, or None if there are none."""
        import pyarrow as pa

        schema = self.files[0][0].physical_schema
        if not (index := pandas_index(schema)):
            return None
        others = [name for name in schema.names if name not in index]
        paths = [Path(fragment.path) for fragment, _ in self.files]
        return pa.concat_tables([read_parquet(path, drop=others, text=index)[0] for path in paths])

    def _decode(self, index: int, dtype: np.dtype) -> np.ndarray:
        """Decode a row group, shape ``(column, row)``, x before the context."""
        file, number, _ = self.groups[index]
        fragment, stamp = self.files[file]
        with whole_parquet(fragment.path):
            if stamp_of(Path(fragment.path)) != stamp:
                raise file_changed(fragment.path)
            table = fragment.subset(row_group_ids=[number]).to_table(columns=self.names, use_threads=False)
        values = np.empty((len(self.names), len(table)), dtype)
        for row, name in zip(values, self.names, strict=True):
            copy_numbers(arrow_numbers(table.column(name), f"{fragment.path}: column {name!r}"), row)
        return values


def open_parquet(path: Path, *, columns: Sequence[str] | None = None, context: Sequence[str] = ()) -> ParquetTable:
    """Open a Parquet file or folder, reading only footers.

    By default x has all columns except the context, the index that pandas wrote, and a first column without a name.
    """
    fragments = parquet_fragments(path)
    if not fragments:
        raise DataError(f"{path}: the folder contains no .parquet files and is not a Zarr array; give another folder")
    for fragment in fragments:
        validate_regular(Path(fragment.path), links=True, advice="copy it again")
    try_reading("footers", path, "Parquet file", 0)
    files, groups, sizes = [], [], [0]
    for fragment in fragments:
        with whole_parquet(fragment.path):
            files.append((fragment, stamp_of(Path(fragment.path))))
            fragment.ensure_complete_metadata()
            _validate_schema(fragment, fragments[0])
    schema = fragments[0].physical_schema
    besides = {*context, *pandas_index(schema), *(name for name in schema.names[:1] if name in UNNAMED)}
    names = [name for name in schema.names if name not in besides] if columns is None else list(columns)
    _validate_columns(fragments[0].path, schema, names, context)
    for index, (fragment, _) in enumerate(files):
        for _ in column_chunks(fragment.path, fragment.metadata, [*names, *context]):
            pass
        first = 0
        for group in fragment.row_groups:
            if (size := 8 * group.num_rows * (len(names) + len(context))) > MOST_BYTES:
                raise DataError(
                    f"{fragment.path}: row group {group.id} has {group.num_rows} rows, {size / 2**30:.1f} GiB in "
                    "memory, and cannot be read in part; write the file again with a smaller row_group_size"
                )
            if group.num_rows:
                groups.append((index, group.id, first))
                sizes.append(group.num_rows)
            first += group.num_rows
    if not groups:
        raise DataError(f"{path}: the table has 0 rows; give at least one")
    return ParquetTable(
        str(path), sum(sizes), (len(names),), files=files, groups=groups, bounds=np.cumsum(sizes),
        names=[*names, *context], columns=names, context=len(context), context_columns=[*context] or None,
    )  # fmt: skip


def parquet_fragments(path: Path) -> list[Any]:
    """List the Parquet files of a path as fragments of a pyarrow data set, without opening them.

    Files whose names start with a dot or an underscore, such as remains of failed jobs, are not part of the table.
    """
    import pyarrow as pa
    from pyarrow import dataset

    if os.path.isdir(path) and not _holds_parquet(path):
        return []
    with whole_parquet(path):
        found = [*dataset.dataset(path, format="parquet", schema=pa.schema([])).get_fragments()]
    return [fragment for fragment in found if os.path.isfile(path) or fragment.path.endswith(".parquet")]


def _holds_parquet(folder: Path) -> bool:
    """Return whether there are Parquet files among the first entries of a folder."""
    entries = 0
    for _, folders, files in os.walk(folder):
        if any(name.endswith(".parquet") for name in files):
            return True
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            break
    return False


def _validate_schema(fragment: Any, of: Any) -> None:
    """Validate that a file has the same columns as another."""
    schema, other = fragment.physical_schema, of.physical_schema
    if schema.names != other.names:
        differing = sorted(set(schema.names) ^ set(other.names)) or "in another order"
        raise DataError(
            f"{fragment.path}: the columns differ from {of.path} ({differing}); give files with the same columns"
        )
    for name, kind, expected in zip(schema.names, schema.types, other.types, strict=True):
        if kind != expected:
            raise DataError(
                f"{fragment.path}: column {name!r} has type {kind}, but {expected} in {of.path}; "
                "write the file again with the same types"
            )


def _validate_columns(path: str, schema: Any, names: Sequence[str], context: Sequence[str]) -> None:
    """Validate that columns exist, occur once, and contain numbers."""
    import pyarrow as pa

    if twice := {*names} & {*context} or {name for name in names if [*names].count(name) > 1}:
        raise DataError(f"{path}: column {min(twice)!r} is selected twice; leave it out of columns= or context=")
    if not names:
        raise DataError(
            f"{path}: none of the {len(schema.names)} columns is selected as data; name at least one in columns="
        )
    for name in [*names, *context]:
        if schema.names.count(name) != 1:
            raise DataError(
                f"{path}: {schema.names.count(name)} columns have the name {name!r}; the columns are {schema.names}"
            )
        kind = schema.field(name).type
        known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
        if not any(is_one(kind) for is_one in known):
            raise DataError(
                f"{path}: column {name!r} has type {kind}, not numbers; encode it, or leave it out of columns="
            )
