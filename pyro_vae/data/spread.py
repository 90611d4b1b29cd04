"""Compute the mean and the standard deviation of each column, for a VAE that standardizes."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.rows import Rows
from pyro_vae.core.standardize import Standardize
from pyro_vae.data.columns import list_names
from pyro_vae.data.rows import data_like, rows_of
from pyro_vae.data.values import Data
from pyro_vae.errors import ConstantColumnsWarning
from pyro_vae.likelihoods import Likelihood


def mean_and_sd(data: Any, *, mask: Any = None) -> Standardize:
    """Compute the mean and the sd of each column, for ``pv.VAE(..., standardize=...)``.

    .. math:: c_j = \\frac1{n_j} \\sum_i x_{ij}, \\qquad s_j^2 = \\frac1{n_j} \\sum_i (x_{ij} - c_j)^2

    Missing values are left out. A constant column has s = 1. Use the training data, not held-out data.

    Args:
        data: as for :func:`~pyro_vae.data.rows_of`: an array, a tensor, a DataFrame or :class:`~pyro_vae.data.Data`.
        mask: booleans, same shape as the data: true where observed.

    Returns:
        c and s of each column, in units of the data, computed in double precision.

    Raises:
        DataError: if an observed value is not a finite number.

    Warns:
        ConstantColumnsWarning: naming the constant columns.

    Example:
        >>> import torch
        >>> units = mean_and_sd(torch.tensor([[1.0, 1e6], [3.0, 3e6]]))
        >>> units.center.tolist(), units.unit.tolist()
        ([2.0, 2000000.0], [1.0, 1000000.0])
    """
    data = data_like(None, data, mask=mask)
    rows = rows_of(data, mask=None if isinstance(data, Data) else mask)
    scaled = torch.ones(rows.x.shape[1:], dtype=torch.bool)
    return _units_with_warning(*moments(rows), scaled, data.columns if isinstance(data, Data) else None)


def units_for(likelihood: Likelihood, data: Data) -> Standardize | None:
    """Compute :func:`mean_and_sd` for the real columns of a likelihood; None if there are none.

    Args:
        likelihood: the likelihood of the VAE; its counts and categories are not standardized.
        data: the training data.

    Warns:
        ConstantColumnsWarning: naming the constant real columns.

    Example:
        >>> from pyro_vae.likelihoods import Normal, Poisson
        >>> data, net = Data(torch.tensor([[1.0], [3.0]])), torch.nn.Linear(1, 1)
        >>> units_for(Normal(net), data).center.tolist(), units_for(Poisson(net), data)
        ([2.0], None)
    """
    real = likelihood.real_columns(data.x.shape[1:]).cpu()
    return _units_with_warning(*moments(rows_of(data)), real, data.columns) if bool(real.any()) else None


def context_units(data: Data) -> Standardize | None:
    """Compute the mean and the sd of numeric (not one-hot) context columns.

    Args:
        data: the training data; a constant context column has s = 1.

    Returns:
        The standardization of the context, or None if no context column is numeric.

    Example:
        >>> context = torch.tensor([[30.0, 1.0, 0.0], [50.0, 0.0, 1.0]])
        >>> columns = {"context_columns": ["age", "sex"], "categories": {"sex": ["f", "m"]}}
        >>> context_units(Data(torch.zeros(2, 1), context=context, **columns)).center.tolist()
        [40.0, 0.0, 0.0]
    """
    if data.context is None:
        return None
    numeric = torch.ones(data.context.shape[1], dtype=torch.bool)
    if data.context_columns:
        widths = [(name, len(data.categories.get(name, [name]))) for name in data.context_columns]
        numeric = torch.tensor([name not in data.categories for name, width in widths for _ in range(width)])
    center, sd = moments(Rows(data.context))
    return _units(center, sd).only(numeric) if bool(numeric.any()) else None


def _units(center: Tensor, sd: Tensor) -> Standardize:
    return Standardize(center, sd.where(~_constant(center, sd), torch.ones_like(sd)))


def _constant(center: Tensor, sd: Tensor) -> Tensor:
    # Rounding leaves equal numbers with an sd of up to a few units in the last place.
    return sd <= 1e-12 * center.abs()


def _units_with_warning(center: Tensor, sd: Tensor, scaled: Tensor, columns: Sequence[str] | None) -> Standardize:
    """Return the standardization of columns, and warn of constant columns among ``scaled``."""
    constant = _constant(center, sd) & scaled.to(sd.device)
    if count := int(constant.sum()):
        warnings.warn(
            f"{count} of {int(scaled.sum())} columns have at most one distinct value ({_names(constant, columns)}): "
            "they carry no information, and a scale learned for such a column alone has no lower bound; drop them",
            ConstantColumnsWarning,
            stacklevel=_user_stacklevel(),
        )
    return _units(center, sd)


def _user_stacklevel() -> int:
    """Return the ``stacklevel`` of the user's line, for ``warnings.warn`` in the calling function."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


LIBRARIES = "pyro_vae", "sklearn"
"""Packages whose lines are not user code."""


def moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """Compute the mean and sd of each column's observed values; 0 if there are none.

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
    """List the columns by names or indices."""
    places = [tuple(place) for place in constant.nonzero().tolist()]
    if columns is not None and constant.dim() == 1:
        return list_names([columns[i] for (i,) in places])
    return list_names([", ".join(map(str, place)) for place in places]).replace("'", "")
