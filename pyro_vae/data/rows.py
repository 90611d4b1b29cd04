"""Data read, and fitted to a VAE: its columns and categories, with their context and what of them is missing."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_vae.core.rows import Rows
from pyro_vae.data.context import validate_context, validate_kind
from pyro_vae.data.precision import coarse_columns, narrow, unrounded
from pyro_vae.data.tables import UNNAMED, as_frame, columns_like, columns_of, given_names, is_table
from pyro_vae.data.values import Data, as_tensor, from_array, matched, named
from pyro_vae.errors import DataError, PrecisionWarning
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortised


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
    return validate_data(data, missing is not None, [*said, *table.said])


def validate_data(data: Data, may_miss: bool, said: Sequence[str] = ()) -> Data:
    """Data seen to be finite numbers, NaN taken for missing where that is asked for, with a line on what was read.

    Raises:
        DataError: if a value is not finite, or a row has nothing observed.

    Example:
        >>> validate_data(Data(torch.tensor([[1.0, torch.nan]])), True).said
        'read 1 row, 2 columns; 1 of 2 values is missing'
    """
    gaps = int(data.x.isnan().sum()) if may_miss else 0
    data = mask_nan(data) if gaps else replace(data, x=as_tensor(data.x, source=data.source, columns=data.columns))
    (n, d), size = data.x.shape, data.x.numel()
    missing = [f"{gaps} of {size} values {'is' if gaps == 1 else 'are'} missing"] if gaps else []
    line = [f"read {n} row{'s' if n > 1 else ''}, {d} column{'s' if d > 1 else ''}", *said, *missing]
    return replace(data, said="; ".join(line))


def _warn_if_coarse(rows: Rows, vae: "Amortised", source: str, columns: Sequence[str] | None) -> None:
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
        data: a tensor, an array, a DataFrame or another table (:func:`~pyro_vae.data.rows.data_of`), :class:`Data`
            (with its own context and mask) or :class:`Rows`.
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
    source, columns = named(data, source)
    if isinstance(data, Data):
        context = data.context if context is None else context
        mask = data.mask if mask is None else mask
        data = data.x
    if mask is not None:
        raw = data if isinstance(data, Tensor) else from_array(data, source)
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


def rows_for(vae: "Amortised", data: Any, *, context: Any = None, mask: Any = None, source: str = "data") -> Rows:
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
    _warn_if_coarse(rows, vae, *named(data, source))
    vae.check(rows.x, rows.context, rows.mask)
    if isinstance(decoder := getattr(vae, "decoder", None), Likelihood):
        decoder.refuse(rows.x, *named(data, source))
    return rows


def data_for(
    vae: "Amortised", data: Any, *, source: str = "data", missing: Sequence[Any] | None = None, mask: Any = None
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
    source, _ = named(data, source)
    known = data if isinstance(data, Data) else Data(torch.empty(0))
    raw = data.x if isinstance(data, Data) else data if isinstance(data, Tensor) else from_array(data, source)
    raw = raw if raw.is_floating_point() else raw.float()
    mask = ~raw.isnan() if known.mask is None else known.mask & ~raw.isnan()
    rows = rows_of(replace(known, x=raw, mask=mask, source=source))
    if (empty := (~mask.flatten(1).any(1)).nonzero()).numel():
        raise DataError(f"{source}: row {empty[0].item()} has no observed value, counted from 0; drop it")
    return replace(known, x=rows.x, mask=mask, source=source)
