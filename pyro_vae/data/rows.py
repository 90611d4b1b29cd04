"""Convert inputs to rows, with context and mask, and match them to the columns of a VAE."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from pyro_vae.core.rows import Rows
from pyro_vae.data.context import one_hot_context, validate_context, validate_kind
from pyro_vae.data.frames import as_frame, is_table
from pyro_vae.data.masks import as_mask, validate_same_labels
from pyro_vae.data.precision import coarse_columns, narrow, unrounded
from pyro_vae.data.row_labels import UNNAMED, labels_of_index
from pyro_vae.data.tables import column_names, columns_like, columns_of, given_names, matched_by_name
from pyro_vae.data.values import Data, as_tensor, from_array, matched, name_and_columns
from pyro_vae.errors import DataError, PrecisionWarning, type_of
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    import pandas as pd

    from pyro_vae.core.pair import Amortized


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
    notes: Sequence[str] = (),
) -> Data:
    """Convert a table of named columns to :class:`Data`.

    Args:
        source_of_data: a DataFrame, or an input of :func:`~pyro_vae.data.frames.as_frame`.
        index: the column of the row labels, as in :func:`~pyro_vae.data.tables.columns_of`.
        label: the column of the labels.
        drop: columns to leave out.
        columns: columns to use.
        missing: codes of missing values, besides NaN; if not given, a missing value is an error.
        context: the context columns.
        like: other data, whose columns, context columns and categories the table must have.
        source: the name of the data, for messages.
        notes: sentences to add to the summary.

    Raises:
        DataError: if a column is missing or not numeric, or a value is not finite.

    Example:
        >>> import pandas as pd
        >>> data_of(pd.DataFrame({"a": [1, 2], "b": [0.5, None]}, index=["x", "y"]), missing=[]).summary
        'read 2 rows, 2 columns; row labels from the index; 1 of 4 values is missing'
    """
    frame = as_frame(source_of_data, source)
    if frame is None:
        raise DataError(f"{source}: is {type_of(source_of_data)}, not a table of named columns; give a DataFrame")
    names = column_names(frame.columns)
    if like is not None and like.context_columns:
        context = like.context_columns
        validate_context(names, context, source, like.source)
    expected = [] if like is None or like.columns is None else [*map(str, like.columns)]
    by_name = bool(expected) and matched_by_name(names, expected)
    if given_names(expected) is None and {index, label, *drop} & {*names}:
        by_name = False  # the remaining default names count anew
    if by_name or given_names(expected):
        index, label = (name if name in names else None for name in (index, label))  # new data may lack them
        drop = [name for name in drop if name in names]
    if like is not None and by_name:
        besides = {index, label, *drop, *context} if columns is None else {*names} - {*expected}
        columns, reordered = columns_like(names, expected, besides, source, like.source)
        notes = [*notes, *reordered]
    import pyarrow as pa

    try:
        table = columns_of(
            frame, index=index, label=label, drop=drop, columns=columns, missing=missing or (),
            context=context, categories=None if like is None else like.categories, source=source,
        )  # fmt: skip
    except (UnicodeError, pa.ArrowException) as error:
        what = " ".join(str(error).split())[:100]
        raise DataError(
            f"{source}: contains text that is not Unicode ({what!r}); correct it, or drop its column"
        ) from error
    if like is not None:
        features = {*expected}.intersection(table.names)
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
    return validate_data(data, missing is not None, [*notes, *table.notes])


def validate_data(data: Data, may_miss: bool, notes: Sequence[str] = ()) -> Data:
    """Validate data, mask NaN if ``may_miss``, and describe in ``summary`` what was read.

    Raises:
        DataError: if a value is not finite, or a row has no observed value.

    Example:
        >>> validate_data(Data(torch.tensor([[1.0, torch.nan]])), True).summary
        'read 1 row, 2 columns; 1 of 2 values is missing'
    """
    gaps = int(data.x.isnan().sum()) if may_miss else 0
    data = mask_nan(data) if gaps else replace(data, x=as_tensor(data.x, source=data.source, columns=data.columns))
    (n, d), size = data.x.shape, data.x.numel()
    missing = [f"{gaps} of {size} values {'is' if gaps == 1 else 'are'} missing"] if gaps else []
    line = [f"read {n} row{'s' if n > 1 else ''}, {d} column{'s' if d > 1 else ''}", *notes, *missing]
    return replace(data, summary="; ".join(line))


def warn_if_coarse(rows: Rows, vae: "Amortized", source: str, columns: Sequence[str] | None) -> None:
    """Warn if the precision of a VAE merges values of a column."""
    single = vae.like(rows.x[:1]).dtype == torch.float32
    coarse = coarse_columns(rows.x, rows.mask) if single else []
    for i in coarse[:3]:
        column = rows.x[:, i] if rows.mask is None else rows.x[rows.mask[:, i], i]
        name = repr(columns[i]) if columns else i
        warnings.warn(
            f"{source}: column {name} has {len(column.unique())} distinct values, but only "
            f"{len(column.float().unique())} in the VAE's float32; subtract the column's mean first, or use a VAE in "
            "double precision (vae.double())",
            PrecisionWarning,
            stacklevel=3,
        )


def rows_of(data: Any, *, context: Any = None, mask: Any = None, source: str = "data") -> Rows:
    """Convert data, context and mask to validated :class:`Rows`.

    Args:
        data: a tensor, an array, a DataFrame or another table (:func:`~pyro_vae.data.rows.data_of`), :class:`Data`
            (with its own context and mask) or :class:`Rows`.
        context: shape ``(datum, c)``, or a table of numbers, whose row labels must be those of the data, if both have
            them.
        mask: booleans, same shape as the data: true where observed. Missing values may be any number. A table with the
            names of the data's columns is matched by name, and its row labels must be those of the data, if both have
            them.
        source: the name of the data, for messages.

    Raises:
        DataError: if an observed value is not a finite number, or the shapes disagree.

    Example:
        >>> rows_of(torch.tensor([[1.0, torch.nan]]), mask=[[True, False]]).x
        tensor([[1., 0.]])
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors[0]  # as in streams, the other tensors are labels
    if is_table(data):
        data, mask = data_like(None, data, source=source, mask=mask), None
    source, columns = name_and_columns(data, source)
    labels = getattr(data, "row_labels", None)
    if isinstance(data, Data):
        context = data.context if context is None else context
        mask = data.mask if mask is None else mask
        data = data.x
    if mask is not None:
        raw = from_array(data, source)
        mask = as_mask(mask, raw.shape, source, columns, labels)
        data = torch.where(mask, raw, torch.zeros((), dtype=raw.dtype, device=raw.device))
    x = as_tensor(data, source=source, columns=columns)
    if context is not None:
        # Data are the context that rows_for has matched to training data.
        named = context if isinstance(context, Data) else context_like(None, context, source=f"context of {source}")
        context = as_tensor(context_numbers(named), source=f"context of {source}")
        if context.dim() != 2 or len(context) != len(x):
            raise DataError(
                f"{source}: the context has shape {tuple(context.shape)} for {len(x)} data; give one row per datum"
            )
        validate_same_labels("context", getattr(named, "row_labels", None), labels, source)
    return Rows(x, context, mask)


def context_like(known: Any, context: Any, *, source: str = "context") -> Any:
    """Convert a table of contexts to :class:`Data` with the context columns and categories of training data.

    Args:
        known: an object with the attributes ``context_columns`` and ``categories`` of the training data, or None.
        context: a table or :class:`Data`, whose columns are matched by name if the training data have named context
            columns; anything else is returned unchanged.
        source: the name of the context, for messages.

    Raises:
        DataError: if a context column is missing, or one has categories that the training data lack.

    Example:
        >>> known = Data(torch.zeros(1, 2), context_columns=["age", "dose"])
        >>> context_like(known, {"dose": [1.5], "age": [40]}).x
        tensor([[40.0000,  1.5000]])
    """
    like, columns = None, getattr(known, "context_columns", None) or ()
    if columns:
        like = Data(torch.empty(0), columns=columns, categories=known.categories, source="the training data")
    if is_table(context):
        data = data_of(context, columns=None if like is None else [*columns], like=like, source=source)
    elif isinstance(context, Data):
        data = context if like is None else matched(context, like)
    else:
        return context
    if like is None and data.categories:
        raise DataError(
            f"{source}: column {next(iter(data.categories))!r} has categories; encode them as numbers, or name the "
            "context columns of one table with the data (context= of pyro_vae.data.load)"
        )
    return data


def context_numbers(context: Any) -> Any:
    """Return the numbers of a context from :func:`context_like`, with categories one-hot and without rounding.

    Raises:
        DataError: if a value is missing.

    Example:
        >>> context_numbers(Data(torch.tensor([[1.0]]), columns=["sex"], categories={"sex": ["f", "m"]}))
        tensor([[0., 1.]])
    """
    if not isinstance(context, Data):
        return context
    if context.mask is not None:
        raise DataError(f"{context.source}: the context has missing values; fill them, or drop their rows")
    context = context if context.exact is None else replace(context, x=context.exact)
    return one_hot_context(context) if context.categories else context.x


def rows_for(vae: "Amortized", data: Any, *, context: Any = None, mask: Any = None, source: str = "data") -> Rows:
    """Convert data to :class:`Rows`, and validate them against a VAE and the support of its likelihood.

    Args:
        vae: the VAE.
        data: as for :func:`rows_of`.
        context: shape ``(datum, c)``, or a table, whose columns are matched by name to the context columns of the
            training data, if they have names.
        mask: as for :func:`rows_of`.
        source: the name of the data, for messages.

    Raises:
        DataError: if an observed value is not finite or not in the support of the likelihood.
        ModelError: if the components do not fit the data or each other.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> len(rows_for(vae, torch.zeros(3, 4)))
        3
    """
    context = context_like(getattr(vae, "trained_on", None), context, source=f"context of {source}")
    data = data_for(vae, data, source=source, mask=mask, context=context)
    rows = rows_of(data, context=context, mask=None if isinstance(data, Data) else mask, source=source)
    warn_if_coarse(rows, vae, *name_and_columns(data, source))
    vae.check(rows.x, rows.context, rows.mask)
    if isinstance(decoder := getattr(vae, "decoder", None), Likelihood):
        decoder.refuse(rows.x, *name_and_columns(data, source))
    return rows


def data_for(
    vae: "Amortized",
    data: Any,
    *,
    source: str = "data",
    missing: Sequence[Any] | None = None,
    mask: Any = None,
    context: Any = None,
) -> Any:
    """Convert tables to :class:`Data` with the columns and category codes of a VAE's training data.

    Args:
        vae: the VAE.
        data: as for :func:`rows_for`; data without named columns are returned unchanged.
        source: the name of the data, for messages.
        missing: codes of missing values in a table, besides NaN; if not given, NaN is an error.
        mask: as for :func:`rows_of`. The mask is stored in the result for tables and :class:`Data`, and ignored for
            other data.
        context: the context, if it is not part of the data; then the data need no context columns, and the result has
            no context.

    Raises:
        DataError: if the VAE was trained on named columns, and the data have other columns.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> _ = pv.fit(vae, {"a": [0.0, 1.0], "b": [2.0, 3.0]}, epochs=1, progress=False)
        >>> data_for(vae, {"b": [5.0], "a": [4.0]}).x
        tensor([[4., 5.]])
    """
    return data_like(getattr(vae, "trained_on", None), data, source=source, missing=missing, mask=mask, context=context)


def data_like(
    known: Any,
    data: Any,
    *,
    source: str = "data",
    missing: Sequence[Any] | None = None,
    mask: Any = None,
    context: Any = None,
) -> Any:
    """Convert tables to :class:`Data` with the columns and category codes of training data.

    Args:
        known: an object with the attributes ``columns``, ``categories`` and ``context_columns`` of the training data,
            such as a source; or None.
        data: as for :func:`data_for`.
        source: the name of the data, for messages.
        missing: as for :func:`data_for`.
        mask: as for :func:`data_for`.
        context: as for :func:`data_for`.

    Raises:
        DataError: if the training data had named columns, and the data have other columns.

    Example:
        >>> data_like(Data(torch.zeros(1, 2), columns=["a", "b"]), {"b": [5.0], "a": [4.0]}).x
        tensor([[4., 5.]])
    """
    like = None
    if getattr(known, "columns", None) is not None or getattr(known, "context_columns", None):
        like = Data(
            torch.empty(0), columns=known.columns, categories=getattr(known, "categories", {}),
            context_columns=getattr(known, "context_columns", None), source="the training data",
        )  # fmt: skip
    if is_table(data):
        data = as_frame(data, source)
        if like is not None and context is not None:
            like = _without_absent_context(like, data)
        if mask is not None:
            data = _observed_of(data, mask, like, source)
        else:
            data = data_of(data, like=like, missing=missing, source=source)
        return data if context is None else replace(data, context=None, context_columns=None)
    if not isinstance(data, Data):
        return data
    if mask is not None:
        data = replace(data, mask=as_mask(mask, data.x.shape, source, data.columns, data.row_labels))
    if context is not None:
        data = replace(data, context=None, context_columns=None)
    return data if like is None else matched(data, like)


def _without_absent_context(like: Data, frame: "pd.DataFrame") -> Data:
    """Leave out the context columns that a table lacks, because its context is given separately."""
    names = column_names(frame.columns)
    here = [name for name in like.context_columns or () if name in names and name not in (like.columns or ())]
    return replace(like, context_columns=here or None)


def _observed_of(table: Any, mask: Any, like: Data | None, source: str) -> Data:
    """Read the observed cells of a table, given a mask of its columns."""
    frame = as_frame(table, source)
    assert frame is not None  # guaranteed by is_table
    names = column_names(frame.columns)
    expected = like.columns if like is not None and matched_by_name(names, like.columns) else None
    context = () if like is None else like.context_columns or ()
    features = [name for name in names if (name not in context if expected is None else name in expected)]
    seen = as_frame(mask, f"mask of {source}")
    shape = np.shape(mask if seen is None else seen)
    if features and features[0] in UNNAMED and len(shape) == 2 and shape[1] == len(features) - 1:
        features = features[1:]  # the first column holds the row labels
    mask = as_mask(mask if seen is None else seen, (len(frame), len(features)), source, features)
    observed, place = np.ones(frame.shape, bool), {name: i for i, name in enumerate(features)}
    observed[:, [name in place for name in names]] = mask.cpu().numpy()
    data = data_of(frame.where(observed), like=like, missing=[], source=source)
    validate_same_labels("mask", None if seen is None else labels_of_index(seen), data.row_labels, source)
    x = data.x if data.mask is None else data.x.masked_fill(~data.mask, torch.nan)
    return replace(data, x=x, mask=mask[:, [place[name] for name in data.columns or features]])


def mask_nan(data: Any, *, source: str = "data") -> Data:
    """Mark NaN as missing values.

    Args:
        data: shape ``(datum, *features)``, with NaN; the other attributes of :class:`Data` and the missing values of
            its mask are kept.
        source: the name of the data, for messages.

    Returns:
        The data with 0 in place of NaN and the mask of observed values, an input of :func:`pyro_vae.fit`.

    Raises:
        DataError: if a value is infinite or not a number, or a row has no observed value.

    Example:
        >>> data = mask_nan(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
        >>> data.x, data.mask
        (tensor([[1., 0.],
                [2., 3.]]), tensor([[ True, False],
                [ True,  True]]))
    """
    if is_table(data):
        return data_of(data, missing=[], source=source)
    source, _ = name_and_columns(data, source)
    known = data if isinstance(data, Data) else Data(torch.empty(0))
    raw = from_array(data.x if isinstance(data, Data) else data, source)
    raw = raw if raw.is_floating_point() else raw.float()
    mask = ~raw.isnan() if known.mask is None else known.mask & ~raw.isnan()
    rows = rows_of(replace(known, x=raw, mask=mask, source=source))
    if (empty := (~mask.flatten(1).any(1)).nonzero()).numel():
        raise DataError(f"{source}: row {empty[0].item()} has no observed value; drop it (rows are counted from 0)")
    return replace(known, x=rows.x, mask=mask, source=source)
