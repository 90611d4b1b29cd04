"""The mean and the spread of each column, for a VAE that standardizes."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.rows import Rows
from pyro_vae.core.standardize import Standardize
from pyro_vae.data.rows import Data, data_like, rows_of
from pyro_vae.data.tables import list_names
from pyro_vae.errors import ConstantColumnsWarning


def mean_and_sd(data: Any, *, mask: Any = None) -> Standardize:
    """Compute the mean and the sd of each column, for ``pv.VAE(..., standardize=...)``.

    .. math:: c_j = \\frac1{n_j} \\sum_i x_{ij}, \\qquad s_j^2 = \\frac1{n_j} \\sum_i (x_{ij} - c_j)^2

    What is missing is left out. A constant column keeps its unit, s = 1. Give the training data, not the held-out ones.

    Args:
        data: as for :func:`~pyro_vae.data.rows_of`: an array, a tensor, a DataFrame or :class:`~pyro_vae.data.Data`.
        mask: booleans, the shape of the data: true where observed.

    Returns:
        c and s of each column, in units of the data, computed in double precision.

    Raises:
        DataError: if an observed value is not a finite number.

    Warns:
        ConstantColumnsWarning: naming the columns that hold one value each.

    Example:
        >>> import torch
        >>> units = mean_and_sd(torch.tensor([[1.0, 1e6], [3.0, 3e6]]))
        >>> units.center.tolist(), units.unit.tolist()
        ([2.0, 2000000.0], [1.0, 1000000.0])
    """
    data = data_like(None, data, mask=mask)
    center, sd = moments(rows_of(data, mask=None if isinstance(data, Data) else mask))
    # Of equal numbers, rounding alone leaves an sd of up to a few units in the last place.
    constant = sd <= 1e-12 * center.abs()
    if count := int(constant.sum()):
        columns = data.columns if isinstance(data, Data) else None
        names = _names(constant, columns)
        warnings.warn(
            f"{count} of {constant.numel()} columns hold at most one value each ({names}): they tell nothing, and "
            "a scale learned for such a column alone has no lower bound; drop them",
            ConstantColumnsWarning,
            stacklevel=2,
        )
    return Standardize(center, sd.where(~constant, torch.ones_like(sd)))


def moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """Compute the mean and the sd of the observed values of each column, in double precision; 0 where there are none.

    Example:
        >>> moments(Rows(torch.tensor([[1.0], [3.0]])))
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    x = rows.x.double()
    seen = torch.ones_like(x, dtype=torch.bool) if rows.mask is None else rows.mask
    count = seen.sum(0).clamp(min=1)
    center = x.where(seen, torch.zeros_like(x)).sum(0) / count
    return center, ((x - center).where(seen, torch.zeros_like(x)).square().sum(0) / count).sqrt()


def _names(constant: Tensor, columns: Sequence[str] | None) -> str:
    """The columns by their names or places."""
    places = [tuple(place) for place in constant.nonzero().tolist()]
    if columns is not None and constant.dim() == 1:
        return list_names([columns[i] for (i,) in places])
    return list_names([", ".join(map(str, place)) for place in places]).replace("'", "")
