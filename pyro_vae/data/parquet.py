"""Read a Parquet file into memory, and validate how far its columns unpack before they are read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.limits import UNPACKED, in_bytes, most_unpacked, try_reading, validate_unpacked
from pyro_vae.data.precision import validate_integers
from pyro_vae.data.row_labels import UNNAMED
from pyro_vae.data.values import reason
from pyro_vae.errors import DataError

BYTES_PER_OBJECT = 64
"""The memory, in bytes, of a value that pandas has no array type for, such as a date."""

SLACK = 2**24
"""The size, in bytes, by which a column may exceed its numbers."""


def read_parquet(path: Path, *, drop: Sequence[str] = (), text: Sequence[str | None] = ()) -> tuple[Any, list[str]]:
    """Read the columns of a Parquet file that are not dropped, decimals as double-precision numbers.

    Args:
        path: the path of the file.
        drop: columns to leave out.
        text: columns whose decimals become text, since they name rows or classes.

    Returns:
        The Arrow table, and the columns that were left out.

    Raises:
        DataError: if the file is damaged, unpacks to too much, or a column has more than one value per row.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with whole_parquet(path), parquet.ParquetFile(path) as file:
        dropped = [name for name in file.schema_arrow.names if name in drop]
        fields = [field for field in file.schema_arrow if field.name not in dropped]
        _validate_flat(path, fields)
        _validate_size(path, file.metadata, fields, dropped)
        table = file.read(columns=[field.name for field in fields] if dropped else None)
        table.validate(full=True)  # text that is not UTF-8, for example, is an error only when it is used
    named = {*text, *UNNAMED, *pandas_index(table.schema)}
    for i, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type):  # a Python object per value in pandas
            convert = _as_text if field.name in named else floats
            table = table.set_column(i, field.name, convert(table.column(i)))
    return table, dropped


def _validate_flat(path: Path, fields: Sequence[Any]) -> None:
    """Validate that columns have one value per row: a list of any length may be one row."""
    import pyarrow as pa

    for field in fields:
        if pa.types.is_nested(field.type):
            raise DataError(
                f"{path}: column {field.name!r} has type {field.type}, not one number per row; drop it, or save each "
                "of its elements as a column"
            )


def _validate_size(path: Path, about: Any, fields: Sequence[Any], dropped: Sequence[str]) -> None:
    """Validate the size of columns in memory: from the footer, and text and other codecs by reading them."""
    tried = try_reading("parquet", path, "Parquet file", most_unpacked(path.stat().st_size), dropped)
    chunks = [*column_chunks(path, about, [field.name for field in fields])]
    rows = sum(about.row_group(i).num_rows for i in range(about.num_row_groups))
    size = rows * sum(_bytes_of(field.type) for field in fields)
    stored = sum(max(chunk.total_compressed_size, chunk.total_uncompressed_size) for chunk in chunks)
    validate_unpacked(path, max(size, stored))
    size = max(size, tried)
    validate_unpacked(path, size)
    if stored > 2 * size + UNPACKED:
        raise DataError(f"{path}: {in_bytes(stored)} are stored for {in_bytes(size)} of values; copy or make it again")


def column_chunks(path: str | Path, about: Any, names: Sequence[str]) -> Iterator[Any]:
    """Iterate over the descriptions of columns in each row group of a Parquet file, given its footer.

    Raises:
        DataError: if a column does not have one value, or null, per row, or its numbers take too many bytes.
    """
    columns, some = [about.schema.column(i) for i in range(about.num_columns)], {*names}
    chosen = [(i, column) for i, column in enumerate(columns) if column.path in some]
    for group in map(about.row_group, range(about.num_row_groups)):
        for i, column in chosen:
            chunk = group.column(i)
            if (values := chunk.num_values) != group.num_rows:
                raise DataError(
                    f"{path}: not a valid Parquet file (column {column.path!r} has {values} values in "
                    f"{group.num_rows} rows); copy or make it again"
                )
            most = max(BYTES_PER_OBJECT, 2 * column.length) * values + SLACK
            if chunk.physical_type != "BYTE_ARRAY" and chunk.total_compressed_size > most:
                raise DataError(
                    f"{path}: column {column.path!r} has {in_bytes(chunk.total_compressed_size)} for numbers of "
                    f"{in_bytes(most)} at most; copy or make it again"
                )
            yield chunk


def _bytes_of(kind: Any) -> int:
    """Return the memory, in bytes, of a value of an Arrow type, besides its text."""
    import pyarrow as pa

    if pa.types.is_decimal(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
        return BYTES_PER_OBJECT
    return BYTES_PER_OBJECT + int(kind.byte_width) if pa.types.is_fixed_size_binary(kind) else 8


def pandas_index(schema: Any) -> list[str]:
    """Return the columns that pandas wrote as the index of a DataFrame, given the schema of a file."""
    with suppress(Exception):  # what a file says about pandas may be anything
        return [name for name in schema.pandas_metadata["index_columns"] if isinstance(name, str)]
    return []


@contextmanager
def whole_parquet(path: str | Path) -> Iterator[None]:
    """Convert Arrow's errors on reading a Parquet file to a DataError of one sentence."""
    import pyarrow as pa

    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a valid Parquet file ({reason(error)}); copy or make it again") from error


def _as_text(column: Any) -> Any:
    import pyarrow as pa

    return column.cast(pa.string())


def floats(column: Any) -> Any:
    """Convert a column of decimals to the nearest numbers in double precision; Arrow's own conversion is off by a bit.

    Example:
        >>> import decimal, pyarrow as pa
        >>> floats(pa.chunked_array([[decimal.Decimal("0.10"), None]])).to_pylist()
        [0.1, None]
    """
    import pyarrow as pa

    return pa.chunked_array([part.cast(pa.string()).cast(pa.float64()) for part in column.chunks], pa.float64())


def arrow_numbers(column: Any, name: str = "a column") -> np.ndarray | None:
    """Convert a column of an Arrow table to numbers, NaN for null; None if its type is not numeric.

    The name is for messages.

    Example:
        >>> import pyarrow as pa
        >>> arrow_numbers(pa.chunked_array([[1, None]])), arrow_numbers(pa.chunked_array([["a"]]))
        (array([ 1., nan]), None)
        >>> arrow_numbers(pa.chunked_array([[None, None]], pa.null()))
        array([nan, nan])
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_decimal(kind):
        column, kind = floats(column), pa.float64()
    if pa.types.is_floating(kind):
        values: np.ndarray = column.to_numpy(zero_copy_only=False)
        return values
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        if pa.types.is_integer(kind) and kind.bit_width == 64:
            validate_integers(column.drop_null().to_numpy(zero_copy_only=False), name)
        return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return column.cast(pa.uint8()).to_numpy(zero_copy_only=False) if pa.types.is_boolean(kind) else None
