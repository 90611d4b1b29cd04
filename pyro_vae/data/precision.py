"""Choose single or double precision for the columns of a table; 1700000000 + i needs double."""

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import DataError

COARSE = 1e-3
"""A column is coarse if the spacing of single-precision numbers exceeds this share of its sd."""

BLOCK = 2**20
"""How many numbers are examined at a time, to limit the additional memory."""


def coarse_columns(x: Tensor, mask: Tensor | None = None) -> list[int]:
    """Find the columns that single precision would change noticeably.

    Args:
        x: data in double precision, shape ``(datum, feature)``; non-finite values are ignored.
        mask: true where a value was observed.

    Example:
        >>> coarse_columns(torch.stack([torch.arange(9.0), 1.7e9 + torch.arange(9.0).double()], 1))
        [1]
    """
    if x.dtype != torch.float64 or x.dim() != 2:
        return []
    width = BLOCK // max(len(x), 1) + 1
    blocks = x.split(width, 1)
    masks = [None] * len(blocks) if mask is None else mask.split(width, 1)
    return torch.cat([*map(_is_coarse, blocks, masks)]).nonzero().flatten().tolist()


def _is_coarse(x: Tensor, mask: Tensor | None) -> Tensor:
    seen = x.isfinite() if mask is None else x.isfinite() & mask
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    count = seen.sum(0).clamp(min=1)
    mean = torch.where(seen, x, zero).sum(0) / count
    sd = (torch.where(seen, x - mean, zero).square().sum(0) / count).sqrt()
    step = torch.where(seen, x, zero).abs().amax(0) * torch.finfo(torch.float32).eps
    changed = (seen & (x.float().double() != x)).any(0)
    return (step > COARSE * sd) & (sd > 0) & changed


def validate_integers(array: np.ndarray, where: str) -> None:
    """Validate that double precision holds integers exactly.

    Args:
        array: numbers of any type and shape.
        where: the data and the column, for the message.

    Raises:
        DataError: if an integer above 2⁵³ would be rounded.

    Example:
        >>> validate_integers(np.array([2**60, 2**53 + 1]), "data")
        Traceback (most recent call last):
        pyro_vae.errors.DataError: data: has 9007199254740993, which double precision would round; ...
    """
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8 or not array.size:
        return
    if max(-int(array.min()), int(array.max())) <= 2**53:
        return
    rounded = array.astype(np.float64).astype(np.longdouble) != array.astype(np.longdouble)
    if rounded.any():
        raise DataError(
            f"{where}: has {array[rounded][0]}, which double precision would round; subtract a constant from the "
            "column, use it as row labels (index), or drop it"
        )


def unrounded(array: np.ndarray, x: Tensor) -> Tensor | None:
    """Return numbers in double precision, or None if ``x`` equals them.

    Args:
        array: the numbers.
        x: the result of :func:`narrow`.

    Example:
        >>> array = np.array([[0.5], [0.1]])
        >>> unrounded(array, narrow(array)), unrounded(array[:1], narrow(array[:1]))
        (tensor([[0.5000],
                [0.1000]], dtype=torch.float64), None)
    """
    rows = max(1, BLOCK // max(array[:1].size, 1))
    starts = range(0, len(array), rows)
    same = (np.array_equal(array[i : i + rows], x[i : i + rows].numpy(), equal_nan=True) for i in starts)
    if x.dtype == torch.float64 or all(same):
        return None
    return torch.as_tensor(np.array(array, np.float64))


def narrow(array: np.ndarray) -> Tensor:
    """Convert numbers to single precision, or to double if a column would be too coarse.

    Example:
        >>> narrow(np.array([[1.5], [2.5]])).dtype, narrow(np.array([[1700000000], [1700000001]])).dtype
        (torch.float32, torch.float64)
    """
    if array.dtype == np.float32 or array.dtype.itemsize < 3:
        return torch.as_tensor(array.astype(np.float32))
    shared = np.ascontiguousarray(array, np.float64)
    double = torch.as_tensor(shared if shared.flags.writeable else shared.copy())
    flat = double.flatten(1) if double.dim() > 1 else double
    return double.clone() if coarse_columns(flat) else double.float()
