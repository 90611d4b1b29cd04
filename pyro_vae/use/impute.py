"""Impute missing values from their posterior predictive distribution given the observed values."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.device import validate_seed
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.evidence.psis import BAD, LEAST
from pyro_vae.use.features import CODES, codes_of, likelihood_of, summarize, width_of
from pyro_vae.use.inputs import Found, by_block, read
from pyro_vae.use.labelled import label
from pyro_vae.use.posterior import COMPLETED, Weighted, resampled, weighted_posterior

MODAL = (*CODES, dist.Bernoulli)
"""Distributions that are imputed by their most probable value, since the mean is not a possible value."""


@torch.no_grad()
@takes_settings
def impute(
    vae: VAE,
    data: Any,
    *,
    context: Any = None,
    mask: Any = None,
    draws: int = 1000,
    imputations: int = 0,
    seed: int = 0,
    chunk: int = 2**22,
    progress: bool = False,
) -> xr.Dataset:
    """Fill in missing values by their mean under the posterior predictive, given the observed values.

    .. math:: \\hat x_m = E[x_m | x_o] = \\int E[x_m | z]\\, p(z | x_o)\\, dz
        \\approx \\sum_k w_k\\, E[x_m | z_k], \\qquad w_k \\propto \\frac{p(x_o, z_k)}{q(z_k)}

    The encoder alone is not enough: it was trained on complete rows, and sees 0 (or the mean) for a missing value.
    Draws of z come from a mixture of q(z|x), the prior and two components that are adapted to each datum. They have
    Pareto-smoothed importance weights, so that the imputed value converges to the conditional expectation of the model
    as ``draws`` grows. Where ``khat`` is above 0.7, the imputed value and its error are unreliable.

    Real numbers, counts and grey levels are imputed by their mean. An imputed count may therefore be 3.4: round it, or
    use ``imputations``, which are whole. Codes of a ``Categorical`` and bits of a ``Bernoulli`` are imputed by their
    most probable value.

    Args:
        vae: a VAE.
        data: what :func:`pyro_vae.data.rows_for` takes, or a :func:`pyro_vae.data.stream`, which is read once; memory
            is bounded, except for the result. Without a mask, NaN marks a missing value.
        context: of a conditional VAE, shape ``(datum, c)``, or a table, matched by name.
        mask: booleans, the shape of the data: true where observed. Missing values are ignored.
        draws: the number of draws of z for each datum with a missing value, at least 25.
        imputations: the number of completed tables to draw from the joint distribution of the missing values, for
            multiple imputation.
        seed: of the draws.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU); another chunk gives
            other draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``datum`` and ``feature``: ``x``, with the observed values unchanged, bit for bit (for a stream,
        in the VAE's precision); ``x_sd``, the standard deviation of the missing value itself, including the noise,
        which does not shrink with more draws; ``x_mcse``, the standard error of the imputed mean over draws. Both are
        0 for observed values; ``missing`` marks the others. With codes or bits, ``x_probability`` is the probability of
        the imputed value, with ``x_probability_mcse``; ``x_sd`` and ``x_mcse`` of codes and bits are NaN.
        Over ``datum``: ``khat``, and ``ess``, the effective sample size of the weighted draws; NaN for complete rows.
        ``imputed``, over ``imputation`` too, holds the completed tables.

    Raises:
        DataError: if the values or columns of the data do not fit the VAE.
        ModelError: if the VAE does not fit the data, or its features are not independent given z.
        SettingsError: if a setting is out of its range.

    References:
        | Stochastic Backpropagation (Rezende, Mohamed & Wierstra, 2014), appendix F, https://arxiv.org/abs/1401.4082
        | MIWAE (Mattei & Frellsen, 2019), https://arxiv.org/abs/1812.02633
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
        | Multiple Imputation for Nonresponse in Surveys (Rubin, 1987), https://doi.org/10.1002/9780470316696

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> found = impute(vae, {"a": [2.0, 0.5], "b": [None, 0.25]}, draws=4000)
        >>> gap = found.sel(datum=0, feature="b")  # exactly: mean 1, variance 1.5
        >>> bool(abs(gap.x - 1) < 5 * gap.x_mcse), round(gap.x_sd.item() ** 2, 1), found.x.sel(datum=1).values
        (True, 1.5, array([0.5 , 0.25]))
    """
    whole("draws", draws, LEAST)
    whole("imputations", imputations, 0)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    table = read(vae, data, context=context, mask=mask, nan_is_missing=True)

    likelihood = likelihood_of(vae, table.first)
    is_modal = torch.zeros(likelihood.event_shape.numel(), dtype=torch.bool)
    for where, _ in codes_of(likelihood, MODAL, 1):
        is_modal[where] = True

    def compute(rows: Rows) -> Found:
        return _impute_block(vae, rows, is_modal.to(rows.x.device), draws, imputations)

    width = max(width_of(likelihood), COMPLETED * vae.prior(*table.first.given).event_shape.numel())
    found = by_block(
        vae, table, compute, draws=draws, width=width, chunk=chunk, seed=seed, purpose="Imputing", progress=progress
    )
    if table.values is not None:
        for name in {"x", "imputed"} & {*found}:  # observed values as in the data, not rounded to the VAE's precision
            missing = found["missing"][:, None] if name == "imputed" else found["missing"]
            values = table.values[:, None] if name == "imputed" else table.values
            found[name] = np.where(missing, found[name], values).astype(table.values.dtype)
    variables = {name: (_dims(name), value) for name, value in found.items()}
    if "imputed" in found:
        variables["imputed"] = _dims("imputed"), found["imputed"].swapaxes(0, 1)
    made = label(variables, table.names, draws=draws, seed=seed)
    made["khat"].attrs["threshold"] = BAD
    return made


def _dims(name: str) -> list[str]:
    return {"khat": ["datum"], "ess": ["datum"], "imputed": ["imputation", "datum", "feature"]}.get(
        name, ["datum", "feature"]
    )


def _impute_block(vae: VAE, rows: Rows, is_modal: Tensor, draws: int, imputations: int) -> Found:
    """Impute the missing values of a block of rows."""
    x = rows.x.flatten(1)
    missing = torch.zeros_like(x, dtype=torch.bool) if rows.mask is None else ~rows.mask.flatten(1)
    found = _describe_observed(x, is_modal) | {"missing": missing}
    if imputations:
        found["imputed"] = x.unsqueeze(1).repeat(1, imputations, 1)
    incomplete = missing.any(1).nonzero().flatten()
    if not len(incomplete):
        return found
    part = rows.take(incomplete)
    for numbers, weighted in weighted_posterior(vae, part, draws):
        _fill(vae, part.take(numbers), weighted, imputations, found, incomplete[numbers])
    return found


def _fill(vae: VAE, rows: Rows, weighted: Weighted, imputations: int, found: Found, places: Tensor) -> None:
    """Write the imputed values of rows to their ``places`` in the results of the block."""
    missing, dtype = found["missing"][places], found["x"].dtype
    for name, value in summarize(weighted.likelihood, weighted.weights, MODAL).items():
        found[name][places] = torch.where(missing, value.to(dtype), found[name][places])
    found["khat"][places], found["ess"][places] = weighted.khat.to(dtype), weighted.ess.to(dtype)
    if imputations:
        z = resampled(weighted.z, weighted.weights, imputations)
        drawn = vae.likelihood(z, rows).sample().flatten(2).swapaxes(0, 1)
        found["imputed"][places] = torch.where(missing.unsqueeze(1), drawn, found["imputed"][places])


def _describe_observed(x: Tensor, is_modal: Tensor) -> Found:
    """Return the results for observed values: the values themselves, without an error."""
    undefined = x.new_full((len(x),), torch.nan)
    error = torch.where(is_modal, torch.nan, 0.0).to(x).repeat(len(x), 1)
    found = {"x": x.clone(), "x_sd": error, "x_mcse": error.clone()}
    if is_modal.any():
        sure = {"x_probability": 1.0, "x_probability_mcse": 0.0}
        found |= {name: torch.where(is_modal, value, torch.nan).to(x).repeat(len(x), 1) for name, value in sure.items()}
    return found | {"khat": undefined, "ess": undefined.clone()}
