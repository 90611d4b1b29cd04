"""Data in memory: checked, with their context and what of them is missing."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_vae.core.rows import Rows
from pyro_vae.data.columns import code_by_name, recoded
from pyro_vae.data.context import context_like, validate_context, validate_kind
from pyro_vae.data.precision import coarse_columns, narrow, unrounded
from pyro_vae.data.tables import UNNAMED, as_frame, columns_like, columns_of, given_names, is_table
from pyro_vae.errors import DataError, PrecisionWarning
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    from pyro_vae.core.vae import VAE


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
    tensor = data.detach() if isinstance(data, Tensor) else _from_numpy(data, source)
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


def _from_numpy(data: Any, source: str) -> Tensor:
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


def data_of(
    source_of_data: Any,
    *,
    index: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    missing: Sequence[Any] | None = None,
    context: Sequence[str] = (),
    like: Data | None = None,
    source: str = "data",
    said: Sequence[str] = (),
) -> Data:
    """Turn a table of named columns into :class:`Data`.

    Args:
        source_of_data: a DataFrame, or what :func:`~pyro_vae.data.tables.as_frame` makes one of.
        index: as for :func:`~pyro_vae.data.tables.columns_of`, as the following three.
        label: the column of the labels.
        drop: columns to leave out.
        columns: columns to take.
        missing: values that say that a value is missing, besides NaN; if not given, a missing value is refused.
        context: columns that are no data, but the context.
        like: other data, whose columns, context columns and categories these must have.
        source: what to call the data in messages.
        said: what else was inferred.

    Raises:
        DataError: if a column is missing or not of numbers, or a value is not finite.

    Example:
        >>> import pandas as pd
        >>> data_of(pd.DataFrame({"a": [1, 2], "b": [0.5, None]}, index=["x", "y"]), missing=[]).said
        'read 2 rows, 2 columns; row labels from the index; 1 of 4 values is missing'
    """
    frame = as_frame(source_of_data, source)
    if frame is None:
        raise DataError(f"{source}: is a {type(source_of_data).__name__}, no table of named columns; give a DataFrame")
    names = [str(name).strip() for name in frame.columns]
    if like is not None and like.context_columns:
        context = like.context_columns
        validate_context(names, context, source, like.source)
    if like is not None and (expected := given_names(like.columns)):
        index, label = (name if name in names else None for name in (index, label))  # new data may lack them
        drop = [name for name in drop if name in names]
        if given_names(names):
            besides = {index, label, *drop, *context} if columns is None else {*names} - {*expected}
            columns, reordered = columns_like(names, expected, besides, source, like.source)
            said = [*said, *reordered]
    table = columns_of(
        frame, index=index, label=label, drop=drop, columns=columns, missing=missing or (),
        context=context, categories=None if like is None else like.categories, source=source,
    )  # fmt: skip
    if like is not None:
        expected = [] if like.columns is None else [*like.columns]
        features = [name for name in table.names if name in expected]
        for name in (*(like.context_columns or ()), *features):
            validate_kind(name, table.categories.get(name), like.categories.get(name), source, like.source)
    x = narrow(table.values)
    labels = None if table.labels is None else torch.tensor(table.labels)
    given = None if table.context is None else narrow(table.context)
    data = Data(
        x, labels, given, columns=table.names, source=source, row_labels=table.row_labels,
        label_names=table.label_names, categories=table.categories, context_columns=[*context] or None,
        exact=unrounded(table.values, x),
    )  # fmt: skip
    return checked(data, missing is not None, [*said, *table.said])


def checked(data: Data, may_miss: bool, said: Sequence[str] = ()) -> Data:
    """Data seen to be finite numbers, NaN taken for missing where that is asked for, with a line on what was read.

    Raises:
        DataError: if a value is not finite, or a row has nothing observed.

    Example:
        >>> checked(Data(torch.tensor([[1.0, torch.nan]])), True).said
        'read 1 row, 2 columns; 1 of 2 values is missing'
    """
    gaps = int(data.x.isnan().sum()) if may_miss else 0
    data = mask_nan(data) if gaps else replace(data, x=as_tensor(data.x, source=data.source, columns=data.columns))
    (n, d), size = data.x.shape, data.x.numel()
    missing = [f"{gaps} of {size} values {'is' if gaps == 1 else 'are'} missing"] if gaps else []
    line = [f"read {n} row{'s' if n > 1 else ''}, {d} column{'s' if d > 1 else ''}", *said, *missing]
    return replace(data, said="; ".join(line))


def _warn_if_coarse(rows: Rows, vae: "VAE", source: str, columns: Sequence[str] | None) -> None:
    """Warn that the precision of a VAE merges values."""
    single = vae.like(rows.x[:1]).dtype == torch.float32
    coarse = coarse_columns(rows.x, rows.mask) if single else []
    for i in coarse[:3]:
        column = rows.x[:, i] if rows.mask is None else rows.x[rows.mask[:, i], i]
        name = repr(columns[i]) if columns else i
        warnings.warn(
            f"{source}: column {name} has {len(column.unique())} distinct values, of which the VAE's float32 keeps "
            f"{len(column.float().unique())}; subtract the column's mean first, or use a VAE in double (vae.double())",
            PrecisionWarning,
            stacklevel=3,
        )


def rows_of(data: Any, *, context: Any = None, mask: Any = None, source: str = "data") -> Rows:
    """Data, context and mask as :class:`Rows`, checked.

    Args:
        data: a tensor, an array, a DataFrame or another table (:func:`data_of`), :class:`Data` (with its own context
            and mask) or :class:`Rows`.
        context: shape ``(datum, c)``.
        mask: booleans, the shape of the data: true where observed. What is missing may hold anything.
        source: what to call the data in messages.

    Raises:
        DataError: if an observed value is not a finite number, or the shapes disagree.

    Example:
        >>> rows_of(torch.tensor([[1.0, torch.nan]]), mask=[[True, False]]).x
        tensor([[1., 0.]])
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors[0]  # the others are labels, as a stream has it
    if is_table(data):
        data, mask = data_like(None, data, source=source, mask=mask), None
    source, columns = _named(data, source)
    if isinstance(data, Data):
        context = data.context if context is None else context
        mask = data.mask if mask is None else mask
        data = data.x
    if mask is not None:
        raw = data if isinstance(data, Tensor) else _from_numpy(data, source)
        mask = _as_mask(mask, raw.shape, source)
        data = torch.where(mask, raw, torch.zeros((), dtype=raw.dtype, device=raw.device))
    x = as_tensor(data, source=source, columns=columns)
    if context is not None:
        context = as_tensor(context, source=f"context of {source}")
        if context.dim() != 2 or len(context) != len(x):
            raise DataError(
                f"{source}: the context has shape {tuple(context.shape)} for {len(x)} data; give one row per datum"
            )
    return Rows(x, context, mask)


def _as_mask(mask: Any, shape: Sequence[int], source: str) -> Tensor:
    mask = mask if isinstance(mask, Tensor) else torch.as_tensor(np.array(mask))  # what pandas gives is read-only
    if mask.dtype != torch.bool or mask.shape != tuple(shape):
        raise DataError(
            f"{source}: the mask is of {mask.dtype} and shape {tuple(mask.shape)}; "
            f"give booleans of the data's shape {tuple(shape)}"
        )
    return mask


def rows_for(vae: "VAE", data: Any, *, context: Any = None, mask: Any = None, source: str = "data") -> Rows:
    """:func:`rows_of` data that fit the parts of a VAE and lie in the support of its likelihood.

    Args:
        vae: the VAE that is to see the data.
        data: as for :func:`rows_of`.
        context: shape ``(datum, c)``.
        mask: booleans, the shape of the data, its columns in the order of theirs.
        source: what to call the data in messages.

    Raises:
        DataError: if an observed value is not a finite number or not one that the likelihood takes.
        ModelError: if the data do not fit the parts, or these not each other.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> len(rows_for(vae, torch.zeros(3, 4)))
        3
    """
    data = data_for(vae, data, source=source, mask=mask)
    rows = rows_of(data, context=context, mask=None if isinstance(data, Data) else mask, source=source)
    _warn_if_coarse(rows, vae, *_named(data, source))
    vae.check(rows.x, rows.context, rows.mask)
    if isinstance(vae.decoder, Likelihood):
        vae.decoder.refuse(rows.x, *_named(data, source))
    return rows


def data_for(
    vae: "VAE", data: Any, *, source: str = "data", missing: Sequence[Any] | None = None, mask: Any = None
) -> Any:
    """Tables as :class:`Data`, with the columns and the codes of categories that the VAE was trained on.

    Args:
        vae: the VAE that is to see the data.
        data: whatever :func:`rows_for` takes; what has no named columns stays as it is.
        source: what to call the data in messages.
        missing: of a table, values that say that a value is missing, besides NaN; if not given, NaN is refused.
        mask: booleans, the shape of the data: true where observed. Tables and :class:`Data` get it as their own, its
            columns in the order of theirs; of other data it stays apart.

    Raises:
        DataError: if the VAE was trained on named columns, and these have others.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> _ = pv.fit(vae, {"a": [0.0, 1.0], "b": [2.0, 3.0]}, epochs=1, progress=False)
        >>> data_for(vae, {"b": [5.0], "a": [4.0]}).x
        tensor([[4., 5.]])
    """
    return data_like(getattr(vae, "trained_on", None), data, source=source, missing=missing, mask=mask)


def data_like(
    known: Any, data: Any, *, source: str = "data", missing: Sequence[Any] | None = None, mask: Any = None
) -> Any:
    """Read tables as :class:`Data`, with the columns and the codes of categories of training data.

    Args:
        known: what has the names of the columns, the categories and the context columns of the training data, as a
            source has; None where there are none.
        data: as for :func:`data_for`, as the following three.
        source: what to call the data in messages.
        missing: of a table, values that say that a value is missing.
        mask: booleans, the shape of the data.

    Raises:
        DataError: if the training data had named columns, and these have others.

    Example:
        >>> data_like(Data(torch.zeros(1, 2), columns=["a", "b"]), {"b": [5.0], "a": [4.0]}).x
        tensor([[4., 5.]])
    """
    like = None
    if getattr(known, "columns", None) is not None:
        like = Data(
            torch.empty(0), columns=known.columns, categories=getattr(known, "categories", {}),
            context_columns=getattr(known, "context_columns", None), source="the training data",
        )  # fmt: skip
    if is_table(data):
        if mask is not None:
            return _observed_of(data, mask, like, source)
        return data_of(data, like=like, missing=missing, source=source)
    if not isinstance(data, Data):
        return data
    if mask is not None:
        data = replace(data, mask=_as_mask(mask, data.x.shape, source))
    return data if like is None else matched(data, like)


def _observed_of(table: Any, mask: Any, like: Data | None, source: str) -> Data:
    """Read the cells of a table that a mask says were observed, the mask's columns in the order of the table's."""
    frame = as_frame(table, source)
    assert frame is not None  # as is_table says
    names = [str(name).strip() for name in frame.columns]
    expected = given_names(like.columns) if like is not None and given_names(names) else None
    context = () if like is None else like.context_columns or ()
    own = [name for name in names if (name not in context if expected is None else name in expected)]
    if own and own[0] in UNNAMED and np.ndim(mask) == 2 and np.shape(mask)[1] == len(own) - 1:
        own = own[1:]  # the labels of the rows
    mask = _as_mask(mask, (len(frame), len(own)), source)
    looked_at = np.ones(frame.shape, bool)
    looked_at[:, [names.index(name) for name in own]] = mask.cpu().numpy()
    data = data_of(frame.where(looked_at), like=like, missing=[], source=source)
    x = data.x if data.mask is None else data.x.masked_fill(~data.mask, torch.nan)
    return replace(data, x=x, mask=mask[:, [own.index(name) for name in data.columns or own]])


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
        codes = recoded(column, own or (), known or (), name, source, seen)
    return torch.where(seen, codes, column)


def _named(data: Any, source: str) -> tuple[str, Sequence[str] | None]:
    """What to call data in messages, and their columns: :class:`Data` know it themselves."""
    if not isinstance(data, Data):
        return source, None
    return source if data.source == "data" else data.source, data.columns


def mask_nan(data: Any, *, source: str = "data") -> Data:
    """Data whose NaN mean that a value is missing.

    Args:
        data: shape ``(datum, *features)``, with NaN; :class:`Data` keep what else is known of them, and of
            their mask what was missing already.
        source: what to call the data in messages.

    Returns:
        The data, with 0 for each NaN, and the mask of what was observed; :func:`pyro_vae.fit` takes it.

    Raises:
        DataError: if a value is infinite or no number, or a row has nothing observed.

    Example:
        >>> data = mask_nan(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
        >>> data.x, data.mask
        (tensor([[1., 0.],
                [2., 3.]]), tensor([[ True, False],
                [ True,  True]]))
    """
    if is_table(data):
        return data_of(data, missing=[], source=source)
    source, _ = _named(data, source)
    known = data if isinstance(data, Data) else Data(torch.empty(0))
    raw = data.x if isinstance(data, Data) else data if isinstance(data, Tensor) else _from_numpy(data, source)
    raw = raw if raw.is_floating_point() else raw.float()
    mask = ~raw.isnan() if known.mask is None else known.mask & ~raw.isnan()
    rows = rows_of(replace(known, x=raw, mask=mask, source=source))
    if (empty := (~mask.flatten(1).any(1)).nonzero()).numel():
        raise DataError(f"{source}: row {empty[0].item()} has no observed value, counted from 0; drop it")
    return replace(known, x=rows.x, mask=mask, source=source)
