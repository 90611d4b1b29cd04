"""Convert tables and arrays of any library to :class:`~pyro_vae.data.Data`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.columns import list_names
from pyro_vae.data.frames import is_table
from pyro_vae.data.images import Layout, layout_of
from pyro_vae.data.precision import narrow, unrounded, validate_integers
from pyro_vae.data.rows import data_of, validate_data
from pyro_vae.data.tables import column_names, given_names
from pyro_vae.data.values import Data, as_tensor, matched, own_values
from pyro_vae.errors import DataError, SettingsError, type_of

MOST_DENSE_BYTES = 2**31
"""The maximum dense size, in bytes, of a sparse matrix."""


@dataclass(frozen=True)
class Options:
    """The options of :func:`pyro_vae.data.load` that do not depend on the type of file.

    Example:
        >>> Options(label="y").table({"a": [1.5, 2.5], "y": ["u", "v"]}, "data").label_names
        ['u', 'v']
    """

    index: str | None = None
    label: str | None = None
    drop: Sequence[str] = ()
    columns: Sequence[str] | None = None
    missing: Sequence[Any] | None = None
    context: Sequence[str] = ()
    key: str | None = None
    like: Data | None = None

    def validate_unused(self, source: str, **more: Any) -> None:
        """Raise a SettingsError if an option is set that does not apply."""
        if unused := [name for name, value in more.items() if value is not None]:
            raise SettingsError(f"{source}: {unused[0]} does not apply to this kind of data; leave it out")

    def of_tables(self) -> dict[str, Any]:
        """Return the options that apply to tables of named columns, None where not set."""
        lists = {"drop": self.drop or None, "context": self.context or None}
        return {name: getattr(self, name) for name in ("index", "label", "columns", "missing", "key")} | lists

    def named(self) -> set[str]:
        """Return the names of columns that have a use, here or in the other data."""
        like = () if self.like is None else given_names(self.like.columns) or ()
        known = () if self.like is None else self.like.context_columns or ()
        given = [name for name in (self.index, self.label) if name]
        return {*given, *self.drop, *(self.columns or ()), *self.context, *like, *known}

    def table(self, table: Any, source: str, notes: Sequence[str] = ()) -> Data:
        """Convert a table of named columns to data."""
        self.validate_unused(source, key=self.key)
        return data_of(
            table, index=self.index, label=self.label, drop=self.drop, columns=self.columns, missing=self.missing,
            context=self.context, like=self.like, source=source, notes=notes,
        )  # fmt: skip

    def array(
        self,
        array: Any,
        source: str,
        labels: np.ndarray | None = None,
        labels_source: str | None = None,
        notes: Sequence[str] = (),
    ) -> Data:
        """Convert an array to data; options name its columns ``f0``, ``f1``, …"""
        if array.dtype.names is not None:
            return self._table_of(array, source, labels, labels_source, notes)
        by_name = any((self.index, self.label is not None, self.drop, self.columns, self.context))
        by_name = by_name or (self.like is not None and bool(self.like.context_columns))
        if by_name and array.ndim == 2 and array.dtype.kind in "biufOU":
            import pandas as pd

            kind = object if array.dtype.kind in "OU" else None  # pandas would validate text
            frame = pd.DataFrame(array, columns=[f"f{i}" for i in range(array.shape[1])], dtype=kind, copy=False)
            return self._table_of(frame, source, labels, labels_source, notes)
        if by_name and array.ndim != 2:
            raise SettingsError(f"{source}: the data have no named columns; leave out options that name columns")
        exact = None
        layout = layout_of(array.shape, array.dtype) if array.ndim > 2 else Layout(None)
        if array.dtype.kind in "fiu" and array.ndim >= 2 and 0 not in array.shape:
            validate_integers(array, source)
            array = layout.rows(_without_codes(array, self.missing or ()))
            x = narrow(array)
            exact = None if layout.image_shape else unrounded(array, x)  # imputation does not restore images to the bit
        else:
            x = as_tensor(array, source=source)
        classes = labels_of(labels, len(x), labels_source or source)
        data = Data(x.flatten(1), classes, image_shape=layout.image_shape, source=source, exact=exact)
        data = validate_data(data, self.missing is not None, [*notes, *layout.describe()])
        return data if self.like is None else matched(data, self.like)

    def _table_of(
        self, table: Any, source: str, labels: np.ndarray | None, labels_source: str | None, notes: Sequence[str]
    ) -> Data:
        """Convert a table with separate labels, which a column of labels replaces, to data."""
        data = self._without_key().table(table, source, notes)
        if data.labels is not None:
            return data
        return replace(data, labels=labels_of(labels, len(data.x), labels_source or source))

    def _without_key(self) -> "Options":
        return replace(self, key=None)


def _without_codes(array: np.ndarray, missing: Sequence[Any]) -> np.ndarray:
    """Replace the codes of missing values by NaN, before double precision is found unnecessary or too coarse."""
    codes = [value for value in missing if isinstance(value, int | float)]
    kind = array.dtype if array.dtype.kind == "f" else np.dtype(np.float32 if array.itemsize < 3 else np.float64)
    with np.errstate(over="ignore"):
        values = np.array(codes, kind)
    if not np.isfinite(values).any():
        return array
    numbers = array.astype(kind)
    numbers[np.isin(numbers, values[np.isfinite(values)])] = np.nan
    return numbers


DEFAULTS = Options()


def labels_of(labels: np.ndarray | None, rows: int, source: str) -> Tensor | None:
    """Validate that labels are one integer per row, and convert them to a tensor.

    Raises:
        DataError: if they are not.

    Example:
        >>> labels_of(np.array([3, 4]), 2, "data")
        tensor([3, 4])
    """
    if labels is None:
        return None
    if labels.shape != (rows,) or labels.dtype.kind not in "iub":
        raise DataError(f"{source}: the labels have shape {labels.shape}, type {labels.dtype}; give {rows} integers")
    return torch.as_tensor(labels.astype(np.int64))


def as_list(names: str | Sequence[Any] | None) -> list[Any] | None:
    """Convert names, or text separated by commas, to a list.

    Example:
        >>> as_list("age, sex"), as_list(None)
        (['age', 'sex'], None)
    """
    if names is None:
        return None
    if isinstance(names, str):
        return [name.strip() for name in names.split(",")]
    return column_names(names if isinstance(names, Iterable) else [names])


def as_missing(values: str | Sequence[Any] | None) -> list[Any] | None:
    """List the codes of missing values, as text and, if possible, as numbers.

    Example:
        >>> as_missing("?,-999")
        ['?', '-999', -999.0]
    """
    if values is None:
        return None
    listed = values.split(",") if isinstance(values, str) else [*values] if isinstance(values, Iterable) else [values]
    codes: list[Any] = []
    for value in listed:
        codes.append(str(value).strip())
        try:
            codes.append(float(value))
        except (TypeError, ValueError, OverflowError):
            continue
    return codes


def from_memory(source: Any, options: Options) -> Data:
    """Convert data of any library to :class:`~pyro_vae.data.Data`.

    Args:
        source: a table, an array, a tensor, a sparse matrix, an AnnData, or lists of numbers.
        options: the options.

    Raises:
        DataError: if the data cannot be used, or are sparse and too large to convert.

    Example:
        >>> from_memory(np.eye(2), DEFAULTS).x
        tensor([[1., 0.],
                [0., 1.]])
    """
    if isinstance(source, Data):
        options.validate_unused(source.source, **options.of_tables())
        return source if options.like is None else matched(source, options.like)
    if is_table(source):
        return options.table(source, "data")
    if hasattr(source, "obs_names") and hasattr(source, "var_names"):
        return from_anndata(source, options)
    if callable(getattr(source, "collect", None)):
        raise DataError(f"data: {type_of(source)} is lazy and has no values; give the result of its collect()")
    array = dense(source)
    options.validate_unused("data", key=options.key)
    if isinstance(array, np.ma.MaskedArray):
        as_tensor(array)  # raises if a value is masked
    return options.array(np.asarray(array), "data")


def dense(source: Any, name: str = "data") -> Any:
    """Convert a sparse matrix, a tensor or nested lists to a dense NumPy array.

    Raises:
        DataError: if a sparse matrix has entries outside, or would take more than 2 GiB, or a tensor has no real
            number for each value.

    Example:
        >>> from scipy import sparse
        >>> dense(sparse.eye_array(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    is_scipy = hasattr(source, "toarray") and hasattr(source, "nnz")
    is_torch = isinstance(source, Tensor) and source.layout != torch.strided and not source.is_nested
    if (is_scipy or is_torch) and (size := 8 * int(np.prod(source.shape))) > MOST_DENSE_BYTES:
        shape = " × ".join(map(str, source.shape))
        raise DataError(
            f"{name}: the sparse matrix of {shape} would take {size / 2**30:.1f} GiB as a dense array; give fewer rows "
            "or columns at a time, or save it as Zarr or Parquet and read it with pyro_vae.data.stream"
        )
    if is_scipy:
        _validate_indices(source, name)
        return source.toarray()
    if isinstance(source, Tensor):
        tensor = own_values(source.to_dense() if is_torch else source, name).cpu().resolve_neg()
        small = tensor.is_floating_point() and tensor.itemsize < 4
        return (tensor.float() if small else tensor).numpy()
    if not isinstance(source, np.ndarray):
        as_tensor(source, source=name)  # explains the error if it is not an array
    return np.asanyarray(source)


def _validate_indices(matrix: Any, name: str) -> None:
    """Validate that the entries of a sparse matrix lie inside it; SciPy writes others to any place in memory."""
    try:
        if hasattr(matrix, "check_format"):  # CSR, CSC and BSR
            matrix.check_format(full_check=True)
        elif matrix.nnz and matrix.format != "dia":  # diagonals may reach beyond the matrix
            coordinates = matrix.tocoo().coords
            inside = all((c.min() >= 0) and (c.max() < n) for c, n in zip(coordinates, matrix.shape, strict=True))
            if not inside:
                raise ValueError("indices must be < the shape and >= 0")
    except ValueError as error:
        raise DataError(f"{name}: the sparse matrix is damaged ({error}); make it again") from error


def from_anndata(source: Any, options: Options, name: str = "data") -> Data:
    """Convert the matrix or a layer of an AnnData to data, with label and context from ``obs``.

    Args:
        source: an object with ``X``, ``layers``, ``obs``, ``obs_names`` and ``var_names``.
        options: the options; ``key`` is the name of a layer.
        name: the name of the data, for messages.

    Raises:
        DataError: if there is no such layer or column of ``obs``.
    """
    import pandas as pd

    if options.key is not None and options.key not in source.layers:
        raise DataError(f"{name}: there is no layer {options.key!r}; it has {[*source.layers] or 'none'}")
    matrix = dense(source.X if options.key is None else source.layers[options.key], name)
    genes = [str(gene) for gene in source.var_names]
    frame = pd.DataFrame(np.asarray(matrix), index=source.obs_names, columns=genes, copy=False)
    for column in _obs_columns(source, options):
        if column not in source.obs:
            raise DataError(f"{name}: obs has no column {column!r}; it has {list_names([*source.obs]) or 'none'}")
        if column in frame:
            raise DataError(f"{name}: both obs and the matrix have a column {column!r}; rename one")
        frame[column] = source.obs[column].array
    return options._without_key().table(frame, name)


def _obs_columns(source: Any, options: Options) -> list[str]:
    """Return the columns of ``obs`` to use; new data may lack labels."""
    known = options.like.context_columns or () if options.like is not None else ()
    lacks_label = options.label is None or (options.like is not None and options.label not in source.obs)
    return list(dict.fromkeys([*(options.context or known), *([] if lacks_label else [str(options.label)])]))
