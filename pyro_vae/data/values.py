"""Data in memory: numbers, checked, and what is known of them."""

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
from pyro_vae.data.context import context_like, validate_kind
from pyro_vae.data.precision import coarse_columns, narrow
from pyro_vae.data.tables import columns_like, given_names
from pyro_vae.errors import DataError


@dataclass(frozen=True)
class Data:
    """A table of numbers, and what is known of it.

    Args:
        x: the data, shape ``(datum, feature)``.
        labels: a class per datum, for colours in figures only, shape ``(datum,)``.
        context: what a conditional VAE is given besides, shape ``(datum, c)``.
        mask: true where a value was observed, the shape of ``x``.
        columns: the features' names.
        image_shape: ``(height, width)`` where a row is a grey image, ``(3, height, width)`` where one of colours.
        source: where it came from, for messages.
        row_labels: numbers, times or text that name the rows, shape ``(datum,)``; :meth:`rows` keeps them, and where
            there are none the numbers of the rows in the data they are taken from.
        label_names: what the labels 0, 1, … stand for.
        categories: by the name of a column what its codes 0, 1, … stand for.
        context_columns: the names of the columns that the context was made of; those among ``categories`` are one-hot.
        said: what was read, and what of it was inferred, in one line.
        exact: the numbers as they were read, in double precision, where ``x`` rounds them; the shape of ``x``.

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
    said: str = ""
    exact: Tensor | None = None

    def rows(self, index: Tensor) -> "Data":
        """The data of some rows."""
        own = {name: getattr(self, name) for name in ("x", "labels", "context", "mask", "exact")}
        some = {name: value[index] for name, value in own.items() if value is not None}
        labels = np.arange(len(self.x)) if self.row_labels is None else np.asarray(self.row_labels)
        return replace(self, **some, row_labels=labels[np.asarray(index.cpu())])


def as_tensor(data: Any, *, source: str = "data", columns: Sequence[str] | None = None) -> Tensor:
    """Data as a floating-point tensor, checked; a view of them where that is possible.

    Args:
        data: a tensor, an array or what numpy makes one of, shape ``(datum, *features)``.
        source: what to call the data in messages.
        columns: names of the features, for messages.

    Returns:
        A tensor, float64 if the data were, else float32.

    Raises:
        DataError: if there are no rows or features, fewer than two dimensions, or a value is not a finite number.

    Example:
        >>> as_tensor([[1, 2], [3, float("nan")]])
        Traceback (most recent call last):
        pyro_vae.errors.DataError: data: 1 of 4 values is not finite, the first in row 1, column 1 (nan); ...
    """
    tensor = data.detach() if isinstance(data, Tensor) else from_array(data, source)
    if tensor.is_complex():
        raise DataError(f"{source}: the numbers are complex; give real ones")
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
    refuse_non_finite(tensor, source, columns)
    return tensor


def _refuse_pieces(data: Any, source: str) -> None:
    """Refuse what is no table, but leads to one."""
    if isinstance(data, str | PathLike):
        raise DataError(
            f"{source}: a path, {str(data)!r}; give pyro_vae.data.load of it, or pyro_vae.data.stream where it is large"
        )
    if isinstance(data, Dataset | DataLoader | Iterator):
        raise DataError(
            f"{source}: a {type(data).__name__} gives rows piece by piece; give pyro_vae.fit pyro_vae.data.stream of "
            "it, and other functions all rows as one tensor"
        )


def from_array(data: Any, source: str) -> Tensor:
    """Turn an array, or nested lists of numbers, into a tensor in single or double precision.

    Raises:
        DataError: if it is masked, has rows of different lengths, or holds anything but real numbers.

    Example:
        >>> from_array([[1, 2], [3, 4]], "x").dtype
        torch.float32
    """
    _refuse_pieces(data, source)
    if isinstance(data, np.ma.MaskedArray) and np.ma.is_masked(data):
        raise DataError(f"{source}: is a masked array; give data.filled(0), and mask=~numpy.ma.getmaskarray(data)")
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise DataError(f"{source}: the rows are not of one length ({reason(error)})") from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"{source}: the values are of type {array.dtype}; give real numbers")
    if array.dtype.kind in "iu" and array.dtype.itemsize > 2 and array.ndim == 2 and 0 not in array.shape:
        return narrow(array)
    if array.dtype != np.float64:
        with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused by place
            array = array.astype(np.float32, copy=False)
    shareable = array.flags.writeable and min(array.strides, default=0) >= 0  # what torch can take a view of
    return torch.as_tensor(array if shareable else array.copy())


def refuse_non_finite(tensor: Tensor, source: str, columns: Sequence[str] | None, first_row: int = 0) -> None:
    """Refuse NaN and infinity, by count and first place, where row 0 is row ``first_row`` of the source."""
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if not count:
        return
    row, *place = bad.nonzero()[0].tolist()
    value = tensor[(row, *place)].item()
    shown = f"{value}, or too large for float32" if math.isinf(value) and tensor.dtype == torch.float32 else value
    column = repr(columns[place[0]]) if columns is not None else ", ".join(map(str, place))
    verb = "is" if count == 1 else "are"
    take = ", or take NaN for missing (missing='nan' where they are read)" if math.isnan(value) else ""
    raise DataError(
        f"{source}: {count} of {tensor.numel()} values {verb} not finite, the first in row {first_row + row}, "
        f"column {column} ({shown}); fill or drop them{take} (rows and columns are counted from 0)"
    )


def reason(error: object, limit: int = 200) -> str:
    """What a reader complains of, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + "…"


def row_names(data: Any, number: int) -> np.ndarray:
    """What the rows of data are called: their labels where they have some, else their numbers from 0.

    Args:
        data: from :func:`data_for`.
        number: of its rows.

    Raises:
        DataError: if there is not one label per row.

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
    """Data with the columns of other data, in their order, and with the same codes for categories.

    Columns and contexts without names stay as they are.

    Raises:
        DataError: if a column or a category is missing or unknown.

    Example:
        >>> both = Data(torch.tensor([[1.0, 2.0]]), columns=["b", "a"]), Data(torch.zeros(1, 2), columns=["a", "b"])
        >>> matched(*both).x
        tensor([[2., 1.]])
    """
    if data.context_columns and like.context_columns:
        data = replace(data, context=context_like(data, like), context_columns=like.context_columns)
    names, expected = given_names(data.columns), given_names(like.columns)
    if names is None or expected is None or data.x.dim() != 2:
        return data
    columns, _ = columns_like(names, expected, set(), data.source, like.source)
    order = [names.index(name) for name in columns]
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
    """The codes that other data have for a column of categories, or for one of numbers that are their names."""
    if own is None and known is not None:
        import pandas as pd

        numbers = column if column.dtype == torch.float32 else column.double()
        values = pd.Series([*numbers.detach().cpu().numpy()], dtype=object).where(seen.cpu().numpy())
        codes = torch.as_tensor(np.nan_to_num(code_by_name(values, name, source, known)[0])).to(column)
    else:
        validate_kind(name, own, known, source, other)
        codes = recode(column, own or (), known or (), name, source, seen)
    return torch.where(seen, codes, column)


def named(data: Any, source: str) -> tuple[str, Sequence[str] | None]:
    """What to call data in messages, and their columns: :class:`Data` know it themselves."""
    if not isinstance(data, Data):
        return source, None
    return source if data.source == "data" else data.source, data.columns
