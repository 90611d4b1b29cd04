"""Convert tables of any library to DataFrames."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_vae.data.netcdf import validate_decoded
from pyro_vae.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

PROTOCOLS = ("__arrow_c_stream__", "__dataframe__")


def as_frame(source: Any, name: str = "data") -> "pd.DataFrame | None":
    """Convert a table of any library to a pandas DataFrame; return None for other objects.

    Args:
        source: a DataFrame or Series, a structured array, a dict of columns, a DataArray, or an object with the Arrow
            or ``__dataframe__`` protocol (polars, pyarrow, DuckDB, …).
        name: the name of the data, for messages.

    Raises:
        DataError: if the columns of a dict or array are not sequences of the same length.

    Example:
        >>> as_frame({"a": [1, 2]}).shape, as_frame(np.zeros((2, 2)))
        ((2, 1), None)
    """
    if not is_table(source):
        return None
    import pandas as pd

    if isinstance(source, np.ndarray):
        _validate_fields(source, name)
    if _is_data_array(source):
        validate_decoded(source, source.dtype, name)
        return source.to_pandas()
    if isinstance(source, pd.DataFrame):
        return source
    if isinstance(source, pd.Series):
        return source.to_frame(0 if source.name is None else source.name)
    if isinstance(source, np.ndarray | dict):
        fields = source if isinstance(source, dict) else {field: source[field] for field in source.dtype.names or ()}
        try:
            return pd.DataFrame({field: usable(values) for field, values in fields.items()})
        except (TypeError, ValueError, SystemError) as error:  # the last of text that is none
            raise DataError(
                f"{name}: the {type(source).__name__} is not a table; give each column as a list with one value per "
                "row, all of the same length"
            ) from error
    if hasattr(source, "__arrow_c_stream__"):
        return _from_arrow(source, name)
    from pyarrow.interchange import from_dataframe

    return from_dataframe(source).to_pandas()


def _validate_fields(array: np.ndarray, name: str) -> None:
    """Raise unless each field of a structured array holds one number, text or date per row."""
    names = array.dtype.names or ()
    if array.ndim != 1 or not names:
        raise DataError(
            f"{name}: the structured array has shape {array.shape} and {len(names)} fields; give one dimension, and a "
            "field per column"
        )
    if (wrong := next((field for field in names if array.dtype[field].kind == "V"), None)) is not None:
        raise DataError(
            f"{name}: field {wrong!r} has type {array.dtype[wrong]}; give each field one number, text or date per row"
        )


def usable(values: Any) -> Any:
    """Convert NumPy's types that pandas takes but cannot use.

    These are bytes, other byte orders, half and extended precision, and numbers whose parts have names.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    kind = getattr(values, "dtype", None)
    if not isinstance(kind, np.dtype):
        return values
    if kind.kind == "S":
        return values.astype(object)
    plain = kind if kind.names is None else np.dtype(kind.str)
    return values.astype({"e": "f4", "g": "f8", "G": "c16"}.get(kind.char, plain.newbyteorder("=")))


def _from_arrow(source: Any, name: str) -> "pd.DataFrame":
    """Convert a table or a column with the Arrow protocol."""
    import pandas as pd
    import pyarrow as pa

    try:
        table = pa.table(source)
    except pa.ArrowInvalid:  # a single column, such as a polars Series
        table = _from_column(source, name)
    large = {column.type for column in table.columns if column.null_count and column.type in (pa.int64(), pa.uint64())}
    integers = {kind: pd.ArrowDtype(kind) for kind in large}  # pandas would round them to double precision
    try:
        return table.to_pandas(types_mapper=integers.get)
    except Exception as error:  # what pandas wrote about the columns may be anything in a file, and so the error
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"{name}: cannot be converted to a DataFrame ({what}); write the table again") from error


def _from_column(source: Any, name: str) -> Any:
    """Convert a column with the Arrow protocol to an Arrow table."""
    import pyarrow as pa

    try:
        return pa.table({str(getattr(source, "name", None) or 0): pa.chunked_array(source)})
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{name}: cannot be converted to an Arrow table ({error}); convert its columns first"
        ) from error


def is_table(source: Any) -> bool:
    """Return whether an object is a table of named columns, without converting it.

    An array of xarray is a table if its second dimension names the columns. Its Arrow stream is not used: it has one
    row per value.

    Example:
        >>> is_table({"a": [1, 2]}), is_table(np.zeros((2, 2)))
        (True, False)
    """
    if isinstance(source, np.ndarray):
        return source.dtype.names is not None
    if _is_data_array(source):
        return source.ndim == 2 and source.dims[1] in source.coords
    return isinstance(source, dict) or any(hasattr(source, name) for name in PROTOCOLS)


def _is_data_array(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("dims", "coords", "ndim"))  # an array of h5py has dims, too
