"""Data in memory: checked, with their context and what of them is missing."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_vae.core.rows import Rows
from pyro_vae.errors import DataError
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
        image_shape: ``(height, width)`` where a row is an image.
        source: where it came from, for messages.
        row_labels: numbers, times or text that name the rows, shape ``(datum,)``; :meth:`rows` keeps them, and where
            there are none the numbers of the rows in the data they are taken from.

    Example:
        >>> Data(torch.zeros(3, 2), source="zeros").x.shape
        torch.Size([3, 2])
    """

    x: Tensor
    labels: Tensor | None = None
    context: Tensor | None = None
    mask: Tensor | None = None
    columns: Sequence[str] | None = None
    image_shape: tuple[int, int] | None = None
    source: str = "data"
    row_labels: np.ndarray | None = None

    def rows(self, index: Tensor) -> "Data":
        """The data of some rows."""
        own = {name: getattr(self, name) for name in ("x", "labels", "context", "mask")}
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
    if tensor.dtype != torch.float64:
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
    column = repr(columns[place[0]]) if columns else ", ".join(map(str, place))
    verb = "is" if count == 1 else "are"
    raise DataError(
        f"{source}: {count} of {tensor.numel()} values {verb} not finite, the first in row {first_row + row}, "
        f"column {column} ({shown}); fill or drop them (rows and columns are counted from 0)"
    )


def reason(error: Exception, limit: int = 200) -> str:
    """What a reader complains of, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + "…"


def rows_of(data: Any, *, context: Any = None, mask: Any = None, source: str = "data") -> Rows:
    """Data, context and mask as :class:`Rows`, checked.

    Args:
        data: a tensor, an array, :class:`Data` (with its own context and mask) or :class:`Rows`.
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
    source, columns = _named(data, source)
    if isinstance(data, Data):
        context = data.context if context is None else context
        mask = data.mask if mask is None else mask
        data = data.x
    if mask is not None:
        mask = torch.as_tensor(np.asarray(mask) if not isinstance(mask, Tensor) else mask)
        raw = data if isinstance(data, Tensor) else _from_numpy(data, source)
        if mask.dtype != torch.bool or mask.shape != raw.shape:
            raise DataError(
                f"{source}: the mask is of {mask.dtype} and shape {tuple(mask.shape)}; "
                f"give booleans of the data's shape {tuple(raw.shape)}"
            )
        data = torch.where(mask, raw, torch.zeros((), dtype=raw.dtype, device=raw.device))
    x = as_tensor(data, source=source, columns=columns)
    if context is not None:
        context = as_tensor(context, source=f"context of {source}")
        if context.dim() != 2 or len(context) != len(x):
            raise DataError(
                f"{source}: the context has shape {tuple(context.shape)} for {len(x)} data; give one row per datum"
            )
    return Rows(x, context, mask)


def rows_for(vae: "VAE", data: Any, *, context: Any = None, mask: Any = None, source: str = "data") -> Rows:
    """:func:`rows_of` data that fit the parts of a VAE and lie in the support of its likelihood.

    Args:
        vae: the VAE that is to see the data.
        data: as for :func:`rows_of`.
        context: shape ``(datum, c)``.
        mask: booleans, the shape of the data.
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
    rows = rows_of(data, context=context, mask=mask, source=source)
    vae.check(rows.x, rows.context)
    if isinstance(vae.decoder, Likelihood):
        vae.decoder.refuse(rows.x, *_named(data, source))
    return rows


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
    source, _ = _named(data, source)
    known = data if isinstance(data, Data) else Data(torch.empty(0))
    raw = data.x if isinstance(data, Data) else data if isinstance(data, Tensor) else _from_numpy(data, source)
    raw = raw if raw.is_floating_point() else raw.float()
    mask = ~raw.isnan() if known.mask is None else known.mask & ~raw.isnan()
    rows = rows_of(replace(known, x=raw, mask=mask, source=source))
    if (empty := (~mask.flatten(1).any(1)).nonzero()).numel():
        raise DataError(f"{source}: row {empty[0].item()} has no observed value, counted from 0; drop it")
    return replace(known, x=rows.x, mask=mask, source=source)
