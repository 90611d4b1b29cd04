"""The mean and the spread of each column, for a VAE that standardizes."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.rows import Rows
from pyro_vae.core.standardize import Standardize
from pyro_vae.data.rows import data_like, rows_of
from pyro_vae.data.tables import list_names
from pyro_vae.data.values import Data
from pyro_vae.errors import ConstantColumnsWarning
from pyro_vae.likelihoods import Likelihood


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
    rows = rows_of(data, mask=None if isinstance(data, Data) else mask)
    scaled = torch.ones(rows.x.shape[1:], dtype=torch.bool)
    return _warned(*moments(rows), scaled, data.columns if isinstance(data, Data) else None)


def units_for(likelihood: Likelihood, data: Data) -> Standardize | None:
    """Compute :func:`mean_and_sd` for the columns that a likelihood takes as real numbers; None if there are none.

    Args:
        likelihood: of the VAE that is to standardize; of its counts and categories no unit is needed.
        data: the training data.

    Warns:
        ConstantColumnsWarning: naming the columns of real numbers that hold one value each.

    Example:
        >>> from pyro_vae.likelihoods import Normal, Poisson
        >>> data, net = Data(torch.tensor([[1.0], [3.0]])), torch.nn.Linear(1, 1)
        >>> units_for(Normal(net), data).center.tolist(), units_for(Poisson(net), data)
        ([2.0], None)
    """
    real = likelihood.real_columns(data.x.shape[1:]).cpu()
    return _warned(*moments(rows_of(data)), real, data.columns) if bool(real.any()) else None


def context_units(data: Data) -> Standardize | None:
    """Compute the mean and the sd of the context columns of numbers; one-hot columns stay as they are.

    Args:
        data: the training data; a constant context column keeps its unit.

    Returns:
        The units of each number of the context, or None where no context column is of numbers.

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
    # Of equal numbers, rounding alone leaves an sd of up to a few units in the last place.
    return sd <= 1e-12 * center.abs()


def _warned(center: Tensor, sd: Tensor, scaled: Tensor, columns: Sequence[str] | None) -> Standardize:
    """The units of columns, with a warning on those that are to be scaled and are constant."""
    constant = _constant(center, sd) & scaled.to(sd.device)
    if count := int(constant.sum()):
        warnings.warn(
            f"{count} of {int(scaled.sum())} columns hold at most one value each ({_names(constant, columns)}): they "
            "tell nothing, and a scale learned for such a column alone has no lower bound; drop them",
            ConstantColumnsWarning,
            stacklevel=_callers_level(),
        )
    return _units(center, sd)


def _callers_level() -> int:
    """The stack level, for ``warnings.warn`` in the function that asks, of the user's line that led there."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in CALLED_BY_USERS:
        frame, level = frame.f_back, level + 1
    return level


CALLED_BY_USERS = "pyro_vae", "sklearn"
"""Packages whose lines are not the user's."""


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
