"""Data in memory, of whatever library: what is asked of them, and how they become :class:`~pyro_vae.data.Data`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.columns import list_names
from pyro_vae.data.images import Layout, layout_of
from pyro_vae.data.precision import narrow, unrounded
from pyro_vae.data.rows import checked, data_of
from pyro_vae.data.tables import is_table
from pyro_vae.data.values import Data, as_tensor, matched
from pyro_vae.errors import DataError, SettingsError

MOST_DENSE_BYTES = 2**31
"""A sparse matrix that is larger once it is dense is refused."""


@dataclass(frozen=True)
class Asked:
    """What :func:`pyro_vae.data.load` is asked for, besides the data.

    Example:
        >>> Asked(label="y").table({"a": [1.5, 2.5], "y": ["u", "v"]}, "data").label_names
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
        """Raise a SettingsError if something is asked for that does not apply."""
        if asked := [name for name, value in more.items() if value is not None]:
            raise SettingsError(f"{source}: {asked[0]} does not apply to this kind of data; leave it out")

    def of_tables(self) -> dict[str, Any]:
        """What applies to tables of named columns, None where it is not asked for."""
        lists = {"drop": self.drop or None, "context": self.context or None}
        return {name: getattr(self, name) for name in ("index", "label", "columns", "missing", "key")} | lists

    def table(self, table: Any, source: str, said: Sequence[str] = ()) -> Data:
        """Turn a table of named columns into data."""
        self.validate_unused(source, key=self.key)
        return data_of(
            table, index=self.index, label=self.label, drop=self.drop, columns=self.columns, missing=self.missing,
            context=self.context, like=self.like, source=source, said=said,
        )  # fmt: skip

    def array(
        self,
        array: Any,
        source: str,
        labels: np.ndarray | None = None,
        labels_source: str | None = None,
        said: Sequence[str] = (),
    ) -> Data:
        """Turn an array into data; where columns are asked for, they are called ``f0``, ``f1``, …"""
        if array.dtype.names is not None:
            return self._without_key().table(array, source)
        by_name = any(value for value in (self.index, self.label, self.drop, self.columns, self.context))
        by_name = by_name or (self.like is not None and bool(self.like.context_columns))
        if by_name and array.ndim == 2:
            import pandas as pd

            frame = pd.DataFrame(array, columns=[f"f{i}" for i in range(array.shape[1])])
            return self._without_key().table(frame, source)
        if by_name:
            raise SettingsError(f"{source}: the data have no columns to choose from; leave the names of columns out")
        exact = None
        layout = layout_of(array.shape, array.dtype) if array.ndim > 2 else Layout(None)
        if array.dtype.kind in "fiu" and array.ndim >= 2 and 0 not in array.shape:
            x = narrow(layout.rows(array))
            exact = unrounded(array, x) if array.ndim == 2 else None  # images are not imputed to the bit
            if gone := [value for value in self.missing or () if isinstance(value, int | float)]:
                x = x.masked_fill(torch.isin(x, torch.tensor(gone, dtype=x.dtype)), torch.nan)
        else:
            x = as_tensor(array, source=source)
        own = labels_of(labels, len(x), labels_source or source)
        data = Data(x.flatten(1), own, image_shape=layout.image_shape, source=source, exact=exact)
        data = checked(data, self.missing is not None, [*said, *layout.said()])
        return data if self.like is None else matched(data, self.like)

    def _without_key(self) -> "Asked":
        return replace(self, key=None)


NOTHING = Asked()


def labels_of(labels: np.ndarray | None, rows: int, source: str) -> Tensor | None:
    """Labels seen to be one integer a row.

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
    """Names as a list, of text between commas too.

    Example:
        >>> as_list("age, sex"), as_list(None)
        (['age', 'sex'], None)
    """
    if names is None:
        return None
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else [*names]


def as_missing(values: str | Sequence[Any] | None) -> list[Any] | None:
    """Values that say that a value is missing: text, and numbers where it is one.

    Example:
        >>> as_missing("?,-999")
        ['?', '-999', -999.0]
    """
    listed = as_list([values] if isinstance(values, int | float) else values)
    if listed is None:
        return None
    every: list[Any] = []
    for value in listed:
        every.append(str(value))
        try:
            every.append(float(value))
        except (TypeError, ValueError):
            continue
    return every


def from_memory(source: Any, asked: Asked) -> Data:
    """Turn data of whatever library into :class:`~pyro_vae.data.Data`.

    Args:
        source: a table, an array, a tensor, a sparse matrix, an AnnData, or lists of numbers.
        asked: of them.

    Raises:
        DataError: if they cannot be used, or are sparse and too large to be made dense.

    Example:
        >>> from_memory(np.eye(2), NOTHING).x
        tensor([[1., 0.],
                [0., 1.]])
    """
    if isinstance(source, Data):
        asked.validate_unused(source.source, **asked.of_tables())
        return source if asked.like is None else matched(source, asked.like)
    if is_table(source):
        return asked.table(source, "data")
    if hasattr(source, "obs_names") and hasattr(source, "var_names"):
        return of_anndata(source, asked)
    if callable(getattr(source, "collect", None)):
        raise DataError(f"data: a {type(source).__name__} holds no values yet; give what its collect() returns")
    array = dense(source)
    asked.validate_unused("data", key=asked.key)
    if isinstance(array, np.ma.MaskedArray):
        as_tensor(array)  # refuses it where something is masked
    return asked.array(np.asarray(array), "data")


def dense(source: Any) -> Any:
    """A sparse matrix of scipy or torch made dense, a tensor as an array, and anything else as NumPy has it.

    Raises:
        DataError: if it would take more than 2 GiB.

    Example:
        >>> from scipy import sparse
        >>> dense(sparse.eye_array(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    is_scipy = hasattr(source, "toarray") and hasattr(source, "nnz")
    is_torch = isinstance(source, Tensor) and source.layout != torch.strided
    if (is_scipy or is_torch) and (size := 8 * int(np.prod(source.shape))) > MOST_DENSE_BYTES:
        shape = " × ".join(map(str, source.shape))
        raise DataError(
            f"data: a sparse matrix of {shape} takes {size / 2**30:.1f} GiB once it is dense; give fewer rows or "
            "columns at a time, or write it to Zarr or Parquet and read it by pyro_vae.data.stream"
        )
    if is_scipy:
        return source.toarray()
    if isinstance(source, Tensor):
        tensor = (source.to_dense() if is_torch else source).detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if not isinstance(source, np.ndarray):
        as_tensor(source)  # which has a sentence for what is no array
    return np.asanyarray(source)


def of_anndata(source: Any, asked: Asked, name: str = "data") -> Data:
    """Turn an AnnData into data: its matrix or a layer, with label and context from ``obs``.

    Args:
        source: whatever has ``X``, ``layers``, ``obs``, ``obs_names`` and ``var_names``.
        asked: of it; ``key`` is the name of a layer.
        name: what to call it in messages.

    Raises:
        DataError: if there is no such layer or column of ``obs``.
    """
    import pandas as pd

    if asked.key is not None and asked.key not in source.layers:
        raise DataError(f"{name}: there is no layer {asked.key!r}; it has {[*source.layers] or 'none'}")
    matrix = dense(source.X if asked.key is None else source.layers[asked.key])
    frame = pd.DataFrame(np.asarray(matrix), index=source.obs_names, columns=[str(gene) for gene in source.var_names])
    for column in _of_obs(source, asked):
        if column not in source.obs:
            raise DataError(f"{name}: obs has no column {column!r}; it has {list_names([*source.obs]) or 'none'}")
        if column in frame:
            raise DataError(f"{name}: {column!r} is a column of obs and of the matrix; rename one")
        frame[column] = source.obs[column].array
    return asked._without_key().table(frame, name)


def _of_obs(source: Any, asked: Asked) -> list[str]:
    """The columns of ``obs`` to take; new data may lack labels."""
    known = asked.like.context_columns or () if asked.like is not None else ()
    lacks_label = asked.label is None or (asked.like is not None and asked.label not in source.obs)
    return list(dict.fromkeys([*(asked.context or known), *([] if lacks_label else [str(asked.label)])]))
