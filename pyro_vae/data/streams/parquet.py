"""Parquet data sets: a file, or a folder of them, read a row group at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.readers import arrow_numbers
from pyro_vae.data.rows import reason
from pyro_vae.data.streams.tables import Table, changed, put, stamp_of
from pyro_vae.errors import DataError

MOST_BYTES = 2**30
"""A row group of more cannot be read within the memory that a stream keeps to."""


PIECE = 2**12
"""Columns become rows so many rows at a time, which stay in the processor's cache."""


@dataclass(frozen=True)
class Group:
    """A row group.

    Args:
        file: the number of its file.
        number: its own number there.
        first: the number of its first row in the file.
        rows: how many it has.
    """

    file: int
    number: int
    first: int
    rows: int


@dataclass(frozen=True, eq=False)
class ParquetTable(Table):
    """The rows of Parquet files one after another, in the order of their names.

    Args:
        files: the files, each with its stamp and what its footer says.
        groups: all row groups.
        bounds: of the groups, from 0 to the number of rows.
        names: of the columns that are read, x before the context.
    """

    files: Sequence[tuple[Path, tuple[int, int], Any]]
    groups: Sequence[Group]
    bounds: np.ndarray
    names: Sequence[str]
    _last: dict[tuple[int, str], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """To be handed to another process, without the row group that was read last."""
        return {**self.__dict__, "_last": {}}

    def cuts(self, rows: int) -> np.ndarray:
        """Row groups, whatever their size: none can be read in part."""
        return self.bounds

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self.bounds, row, side="right")) - 1

    def place(self, row: int) -> tuple[str, int, int]:
        index = self._group(row)
        group, inside = self.groups[index], row - int(self.bounds[index])
        return str(self.files[group.file][0]), group.first + inside, group.rows - inside

    def read(self, start: int, into: Rows) -> None:
        """Fill ``into``, which ends where the row group of ``start`` ends, or before."""
        index, dtype = self._group(start), into.x.numpy().dtype
        if (values := self._last.get((index, dtype.name))) is None:
            self._last.clear()
            values = self._last[index, dtype.name] = self._decoded(self.groups[index], dtype)
        begin, width = start - int(self.bounds[index]), self.features[0]
        for at in range(0, len(into), PIECE):
            rows = values[:, begin + at : begin + min(at + PIECE, len(into))].T
            into.x.numpy()[at : at + PIECE] = rows[:, :width]
            if into.context is not None and self.context:
                into.context.numpy()[at : at + PIECE] = rows[:, width:]

    def _decoded(self, group: Group, dtype: np.dtype) -> np.ndarray:
        """All numbers of a row group, shape ``(column, row)``, x before the context."""
        import pyarrow as pa
        from pyarrow import parquet

        path, known, footer = self.files[group.file]
        try:
            if stamp_of(path) != known:
                raise changed(path)
            with parquet.ParquetFile(path, metadata=footer) as file:
                table = file.read_row_group(group.number, columns=self.names, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a whole Parquet file ({reason(error)}); copy or make it again") from error
        values = np.empty((len(self.names), group.rows), dtype)
        for own, name in zip(values, self.names, strict=True):
            put(arrow_numbers(table.column(name)), own)
        return values


def parquet_table(path: Path, *, columns: Sequence[str] | None = None, context: Sequence[str] = ()) -> ParquetTable:
    """The Parquet files of a folder, or one file, of which only the footers are read.

    Args:
        path: the folder or file.
        columns: those that are x; all that are not context, if not given.
        context: those that are context.

    Raises:
        DataError: if there is none, one is damaged or of other columns, or a column holds no numbers.
    """
    paths = [path] if path.is_file() else parquet_files(path)
    if not paths:
        raise DataError(f"{path}: the folder holds no .parquet files and is no Zarr array; give one that does")
    files = [(p, stamp_of(p), _footer(p)) for p in paths]
    schema = files[0][2].schema.to_arrow_schema()
    for p, _, footer in files[1:]:
        _refuse_other(p, footer.schema.to_arrow_schema(), paths[0], schema)
    names = [name for name in schema.names if name not in context] if columns is None else list(columns)
    _refuse_columns(paths[0], schema, names, context)
    groups = []
    for number, (p, _, footer) in enumerate(files):
        first = 0
        for i in range(footer.num_row_groups):
            rows = footer.row_group(i).num_rows
            if (size := 8 * rows * (len(names) + len(context))) > MOST_BYTES:
                raise DataError(
                    f"{p}: row group {i} has {rows} rows, {size / 2**30:.1f} GiB once read, and it can be read only as "
                    "a whole; write it again with a smaller row_group_size"
                )
            groups += [Group(number, i, first, rows)] if rows else []
            first += rows
    if not groups:
        raise DataError(f"{path}: the table has 0 rows; it needs some")
    bounds = np.cumsum([0, *(group.rows for group in groups)])
    return ParquetTable(
        str(path), int(bounds[-1]), (len(names),), files=files, groups=groups, bounds=bounds,
        names=[*names, *context], columns=names, context=len(context),
    )  # fmt: skip


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder and of those in it, without those whose name begins with a dot or a low line.

    Writers of such folders name what is no part of the table so, as what a job that failed has left.

    Args:
        folder: the folder.

    Example:
        >>> parquet_files(Path("nowhere"))
        []
    """
    found = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    return [path for path in found if not any(part[0] in "._" for part in path.relative_to(folder).parts)]


def _footer(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole Parquet file ({reason(error)}); copy or make it again") from error


def _refuse_other(path: Path, schema: Any, first: Path, of: Any) -> None:
    if schema.names != of.names:
        other = sorted(set(schema.names) ^ set(of.names)) or "the same in another order"
        raise DataError(f"{path}: other columns than {first} ({other}); give files of the same columns")
    for name in of.names:
        if schema.field(name).type != of.field(name).type:
            raise DataError(
                f"{path}: column {name!r} is of type {schema.field(name).type}, and {of.field(name).type} in {first}; "
                "write it again with the same types"
            )


def _refuse_columns(path: Path, schema: Any, names: Sequence[str], context: Sequence[str]) -> None:
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
