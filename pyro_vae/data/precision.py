"""Whether single precision is enough for a column: 1700000000 + i needs double."""

import numpy as np
import torch
from torch import Tensor

COARSE = 1e-3
"""A column is coarse where neighbours in single precision are further apart than this share of its sd."""


def coarse_columns(x: Tensor, mask: Tensor | None = None) -> list[int]:
    """Find the columns that single precision would change by more than a trifle.

    Args:
        x: in double precision, shape ``(datum, feature)``; what is not finite is passed over.
        mask: true where a value was observed.

    Example:
        >>> coarse_columns(torch.stack([torch.arange(9.0), 1.7e9 + torch.arange(9.0).double()], 1))
        [1]
    """
    if x.dtype != torch.float64 or x.dim() != 2:
        return []
    seen = x.isfinite() if mask is None else x.isfinite() & mask
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    count = seen.sum(0).clamp(min=1)
    mean = torch.where(seen, x, zero).sum(0) / count
    sd = (torch.where(seen, x - mean, zero).square().sum(0) / count).sqrt()
    step = torch.where(seen, x, zero).abs().amax(0) * torch.finfo(torch.float32).eps
    changed = (seen & (x.float().double() != x)).any(0)
    return ((step > COARSE * sd) & (sd > 0) & changed).nonzero().flatten().tolist()


def unrounded(array: np.ndarray, x: Tensor) -> Tensor | None:
    """Return numbers in double precision, and None where ``x`` holds the same.

    Args:
        array: the numbers.
        x: what :func:`narrow` made of them.

    Example:
        >>> array = np.array([[0.5], [0.1]])
        >>> unrounded(array, narrow(array)), unrounded(array[:1], narrow(array[:1]))
        (tensor([[0.5000],
                [0.1000]], dtype=torch.float64), None)
    """
    if x.dtype == torch.float64 or np.array_equal(array, x.numpy(), equal_nan=True):
        return None
    return torch.as_tensor(np.array(array, np.float64))


def narrow(array: np.ndarray) -> Tensor:
    """Numbers in single precision, or in double where a column would be too coarse.

    Example:
        >>> narrow(np.array([[1.5], [2.5]])).dtype, narrow(np.array([[1700000000], [1700000001]])).dtype
        (torch.float32, torch.float64)
    """
    if array.dtype == np.float32 or array.dtype.itemsize < 3:
        return torch.as_tensor(array.astype(np.float32))
    double = torch.as_tensor(array.astype(np.float64))
    flat = double.flatten(1) if double.dim() > 1 else double
    return double if coarse_columns(flat) else double.float()
