"""Data in memory, with validation and metadata."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vae.data.columns import code_by_name, recode
from pyro_vae.data.context import context_recoded, validate_kind
from pyro_vae.data.netcdf import validate_decoded
from pyro_vae.data.precision import coarse_columns, narrow
from pyro_vae.data.tables import columns_like, matched_by_name
from pyro_vae.errors import DataError, type_of


@dataclass(frozen=True)
class Data:
    """A table of numbers with its metadata.

    Args:
        x: the data, shape ``(datum, feature)``.
        labels: a class per datum, for colours in figures only, shape ``(datum,)``.
        context: additional input of a conditional VAE, shape ``(datum, c)``.
        mask: true where a value was observed, same shape as ``x``.
        columns: the names of the features.
        image_shape: ``(height, width)`` if rows are grey images, ``(3, height, width)`` if colour images.
        source: the origin of the data, for messages.
        row_labels: numbers, times or text that name the rows, shape ``(datum,)``. :meth:`rows` selects them, or the
            row numbers if there are none.
        label_names: the names of the labels 0, 1, ….
        categories: the names of the codes 0, 1, …, by column.
        context_columns: the names of the context columns; those in ``categories`` are one-hot.
        summary: one line on the rows and columns that were read, and on detected options.
        exact: the numbers in double precision if ``x`` rounds them, same shape as ``x``.

    Example:
        >>> Data(torch.zeros(3, 2), source="zeros").x.shape
        torch.Size([3, 2])
    """

    x: Tensor
    labels: Tensor | None = None
    context: Tensor | None = None
    mask: Tensor | None = None
    columns: Sequence[str] | None = None
    image_shape: tuple[int, ...] | None = None
    source: str = "data"
    row_labels: np.ndarray | None = None
    label_names: Sequence[str] | None = None
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    context_columns: Sequence[str] | None = None
    summary: str = ""
    exact: Tensor | None = None

    def rows(self, index: Tensor) -> "Data":
        """Select rows."""
        own = {name: getattr(self, name) for name in ("x", "labels", "context", "mask", "exact")}
        some = {name: value[index] for name, value in own.items() if value is not None}
        labels = np.arange(len(self.x)) if self.row_labels is None else np.asarray(self.row_labels)
        return replace(self, **some, row_labels=labels[np.asarray(index.cpu())])


def as_tensor(data: Any, *, source: str = "data", columns: Sequence[str] | None = None) -> Tensor:
    """Convert data to a floating-point tensor and validate them; return a view if possible.

    Args:
        data: a tensor or an array-like, shape ``(datum, *features)``.
        source: the name of the data, for messages.
        columns: the names of the features, for messages.

    Returns:
        A tensor, float64 if the data are, else float32 (float64 for integers that float32 would merge).

    Raises:
        DataError: if there are no rows or features, fewer than two dimensions, or a non-finite value.

    Example:
        >>> as_tensor([[1, 2], [3, float("nan")]])
        Traceback (most recent call last):
        pyro_vae.errors.DataError: data: 1 of 4 values is not finite, the first in row 1, column 1 (nan); ...
    """
    tensor = from_array(data, source)
    if tensor.dtype in (torch.int32, torch.int64, torch.uint32, torch.uint64):
        tensor = tensor.double() if tensor.dim() == 2 and coarse_columns(tensor.double()) else tensor.float()
    elif tensor.dtype != torch.float64:
        tensor = tensor.float()
    if tensor.dim() < 2:
        raise DataError(
            f"{source}: the shape is {tuple(tensor.shape)}; give one row per datum and one column per feature "
            "(data.reshape(-1, 1) makes a column)"
        )
    if 0 in tensor.shape:
        raise DataError(f"{source}: the shape is {tuple(tensor.shape)}; there must be at least one row and one feature")
    validate_finite(tensor, source, columns)
    return tensor


def own_values(tensor: Tensor, source: str) -> Tensor:
    """Detach a tensor, and validate that it is dense and stores a real number for each value.

    Raises:
        DataError: if it is complex, nested, quantized, sparse or on the ``meta`` device.

    Example:
        >>> own_values(torch.eye(2).to_sparse(), "data")
        Traceback (most recent call last):
        pyro_vae.errors.DataError: data: the tensor is sparse; give its to_dense()
    """
    kinds = {
        "is nested; give rows of the same length": tensor.is_nested,
        "is sparse; give its to_dense()": tensor.layout != torch.strided,
        "is quantized; give its dequantize()": tensor.is_quantized,
        "is on the meta device, which stores no values; give one with values": tensor.is_meta,
        "is complex; give real numbers": tensor.is_complex(),
    }
    if wrong := next((what for what, holds in kinds.items() if holds), None):
        raise DataError(f"{source}: the tensor {wrong}")
    return tensor.detach()


def _validate_in_memory(data: Any, source: str) -> None:
    """Validate that data are neither a path nor an iterator over batches."""
    if isinstance(data, str | PathLike):
        raise DataError(
            f"{source}: {str(data)!r} is a path; read it with pyro_vae.data.load, or with pyro_vae.data.stream if it "
            "is large"
        )
    if isinstance(data, Dataset | DataLoader | Iterator):
        raise DataError(
            f"{source}: {type_of(data)} gives rows in batches; pass pyro_vae.data.stream of it to "
            "pyro_vae.fit, and all rows as one tensor to other functions"
        )


def validate_unmasked(data: Any, source: str) -> None:
    """Validate that neither an array nor an array in a list has masked values, which NumPy would read as numbers.

    Example:
        >>> validate_unmasked([np.ma.array([1.0, 2.0], mask=[True, False])], "data")
        Traceback (most recent call last):
        pyro_vae.errors.DataError: data: is a masked array; give data.filled(0) and mask=~numpy.ma.getmaskarray(data)
    """
    parts = data if isinstance(data, list | tuple) else [data]
    if any(isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part) for part in parts):
        raise DataError(f"{source}: is a masked array; give data.filled(0) and mask=~numpy.ma.getmaskarray(data)")


def from_array(data: Any, source: str) -> Tensor:
    """Convert an array or nested lists of numbers to a tensor in single or double precision; detach a tensor.

    Raises:
        DataError: if values are masked or not real numbers, or rows differ in length.

    Example:
        >>> from_array([[1, 2], [3, 4]], "x").dtype
        torch.float32
    """
    if isinstance(data, Tensor):
        return own_values(data, source)
    _validate_in_memory(data, source)
    validate_unmasked(data, source)
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise DataError(f"{source}: the rows differ in length ({reason(error)}); make them equal") from error
    except TypeError as error:
        raise DataError(f"{source}: {type_of(data)} is not an array ({reason(error)}); give an array") from error
    validate_decoded(data, array.dtype, source)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{source}: the values have type {array.dtype}; give real numbers")
    if array.dtype.kind in "iu" and array.dtype.itemsize > 2 and array.ndim == 2 and 0 not in array.shape:
        return narrow(array)
    if array.dtype != np.float64:
        with np.errstate(over="ignore"):  # overflow gives infinity, which validation reports with its position
            array = array.astype(np.float32, copy=False)
    shareable = array.flags.writeable and min(array.strides, default=0) >= 0  # required for a view by torch
    return torch.as_tensor(array if shareable else array.copy())


def validate_finite(tensor: Tensor, source: str, columns: Sequence[str] | None, first_row: int = 0) -> None:
    """Validate that all values are finite; messages count rows from ``first_row``."""
    if torch.stack(tensor.aminmax()).isfinite().all():  # without a mask of the size of the data
        return
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    row, *place = bad.nonzero()[0].tolist()
    value = tensor[(row, *place)].item()
    shown = f"{value}, or too large for float32" if math.isinf(value) and tensor.dtype == torch.float32 else value
    column = repr(columns[place[0]]) if columns is not None else ", ".join(map(str, place))
    verb = "is" if count == 1 else "are"
    mask = ", or treat NaN as missing (missing='nan' when you read them)" if math.isnan(value) else ""
    raise DataError(
        f"{source}: {count} of {tensor.numel()} values {verb} not finite, the first in row {first_row + row}, "
        f"column {column} ({shown}); fill or drop them{mask} (rows and columns are counted from 0)"
    )


def reason(error: object, limit: int = 200) -> str:
    """Shorten an error message to one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + "…"


def row_names(data: Any, number: int) -> np.ndarray:
    """Return the row labels of data, or the numbers of the rows from 0.

    Args:
        data: the result of :func:`~pyro_vae.data.rows.data_for`.
        number: the number of rows.

    Raises:
        DataError: if the number of labels differs from the number of rows.

    Example:
        >>> row_names(Data(torch.zeros(2, 1), row_labels=np.array(["a", "b"])), 2).tolist()
        ['a', 'b']
        >>> row_names(torch.zeros(2, 1), 2).tolist()
        [0, 1]
    """
    labels = data.row_labels if isinstance(data, Data) else None
    if labels is None:
        return np.arange(number)
    if len(labels) != number:
        raise DataError(f"{data.source}: there are {len(labels)} row labels for {number} rows; give one for each")
    return np.asarray(labels)


def matched(data: Data, like: Data) -> Data:
    """Match the columns and the category codes of data to other data, by name.

    Columns and contexts without names, or with the default names of other columns, are not changed.

    Raises:
        DataError: if a column or a category is missing or unknown.

    Example:
        >>> both = Data(torch.tensor([[1.0, 2.0]]), columns=["b", "a"]), Data(torch.zeros(1, 2), columns=["a", "b"])
        >>> matched(*both).x
        tensor([[2., 1.]])
    """
    if data.context_columns and like.context_columns:
        data = replace(data, context=context_recoded(data, like), context_columns=like.context_columns)
    if data.columns is None or like.columns is None or data.x.dim() != 2:
        return data
    names, expected = [*map(str, data.columns)], [*map(str, like.columns)]
    if not matched_by_name(names, expected):
        return data
    columns, _ = columns_like(names, expected, set(), data.source, like.source)
    place = {name: i for i, name in enumerate(names)}
    order = [place[name] for name in columns]
    same = order == [*range(len(order))]
    x = data.x if same else data.x[:, order]
    mask, exact = (part if part is None or same else part[:, order] for part in (data.mask, data.exact))
    for i, name in enumerate(columns):
        own, known = data.categories.get(name), like.categories.get(name)
        if own == known:
            continue
        seen = ~x[:, i].isnan() if mask is None else mask[:, i] & ~x[:, i].isnan()
        codes = _codes_like((x if exact is None else exact)[:, i], seen, own, known, name, data.source, like.source)
        if exact is not None:
            exact = exact.clone()
            exact[:, i] = codes
        x = x.clone()
        x[:, i] = codes.to(x)
    return replace(data, x=x, mask=mask, exact=exact, columns=columns, categories=dict(like.categories))


def _codes_like(
    column: Tensor,
    seen: Tensor,
    own: Sequence[str] | None,
    known: Sequence[str] | None,
    name: str,
    source: str,
    other: str,
) -> Tensor:
    """Convert a column of categories, or of numbers that name categories, to the codes of other data."""
    if own is None and known is not None:
        import pandas as pd

        numbers = column if column.dtype == torch.float32 else column.double()
        values = pd.Series([*numbers.detach().cpu().numpy()], dtype=object).where(seen.cpu().numpy())
        codes = torch.as_tensor(np.nan_to_num(code_by_name(values, name, source, known)[0])).to(column)
    else:
        validate_kind(name, own, known, source, other)
        codes = recode(column, own or (), known or (), name, source, seen)
    return torch.where(seen, codes, column)


def name_and_columns(data: Any, source: str) -> tuple[str, Sequence[str] | None]:
    """Return the name of data for messages and their columns, which :class:`Data` contains."""
    if not isinstance(data, Data):
        return source, None
    return source if data.source == "data" else data.source, data.columns
