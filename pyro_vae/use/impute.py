"""Missing values filled in by what the model says of them, given what was observed."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.device import refuse_seed
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.evidence.psis import BAD, LEAST
from pyro_vae.use.features import CODES, codes_of, likelihood_of, summarize, width_of
from pyro_vae.use.inputs import Found, by_block, read
from pyro_vae.use.labelled import label
from pyro_vae.use.posterior import COMPLETED, Weighted, resampled, weighted_posterior

PICKED = (*CODES, dist.Bernoulli)
"""Distributions whose most probable value is filled in, as a mean would be no value of theirs."""


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

    The guide alone is not enough: it was trained on whole rows, and sees 0 (or the mean) in place of a gap. Draws
    of z come from a mixture of the guide, the prior and two parts that are adapted to each datum, and are weighted by
    Pareto-smoothed importance weights, so that the answer converges to the conditional expectation of the model as
    ``draws`` grows. ``khat`` below 0.7 says that it has done so; where it is above, the answer and its error cannot be
    relied on.

    Real numbers, counts and grey levels get their mean (so that an imputed count may be 3.4: round it, or take
    ``imputations``, where it is whole). Codes of a ``Categorical`` and bits of a ``Bernoulli`` get their most probable
    value.

    Args:
        vae: a VAE.
        data: what :func:`pyro_vae.data.rows_for` takes, or a :func:`pyro_vae.data.stream`, which is read once; all but
            the result stays in bounded memory. NaN says that a value is missing, unless there is a mask.
        context: of a conditional VAE, shape ``(datum, c)``.
        mask: booleans, the shape of the data: true where observed. What is missing may hold anything.
        draws: of z for each datum in which something is missing, at least 25.
        imputations: how many completed tables to draw besides, of the joint distribution of what is missing: for
            multiple imputation, whose analyses are then pooled.
        seed: of the draws.
        chunk: about so many numbers at a time, on a GPU 64 times as many; another chunk makes other draws.
        progress: whether to show a bar.

    Returns:
        A dataset over ``datum`` and ``feature``: ``x``, whose observed values are to the bit those that were given (of
        a stream in the VAE's precision); ``x_sd``, the standard deviation of the missing value itself, noise included,
        which does not fall with more draws; ``x_mcse``, the standard error of the imputed mean over the draws. Both are
        0 for what was observed; ``missing`` says what was not. Where there are codes or bits, ``x_probability`` is the
        probability of the value that was filled in, with ``x_probability_mcse``; their ``x_sd`` and ``x_mcse`` are NaN.
        Over ``datum``: ``khat``, and ``ess``, how many draws of the exact posterior the weighted ones are worth; NaN
        where nothing was missing. ``imputed``, over ``imputation`` too, are the completed tables.

    Raises:
        DataError: if the data are not those that the VAE takes, by value or by column.
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
    refuse_seed(seed)
    table = read(vae, data, context=context, mask=mask, nan_is_missing=True)

    likelihood = likelihood_of(vae, table.first)
    picked = torch.zeros(likelihood.event_shape.numel(), dtype=torch.bool)
    for where, _ in codes_of(likelihood, PICKED, 1):
        picked[where] = True

    def compute(rows: Rows) -> Found:
        return _filled(vae, rows, picked.to(rows.x.device), draws, imputations)

    width = max(width_of(likelihood), COMPLETED * vae.prior(*table.first.given).event_shape.numel())
    found = by_block(
        vae, table, compute, draws=draws, width=width, chunk=chunk, seed=seed, purpose="Imputing", progress=progress
    )
    if table.values is not None:
        for name in {"x", "imputed"} & {*found}:  # what was observed, as it was given
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


def _filled(vae: VAE, rows: Rows, picked: Tensor, draws: int, imputations: int) -> Found:
    """What is known of the values of rows once those that are missing are filled in."""
    x = rows.x.flatten(1)
    missing = torch.zeros_like(x, dtype=torch.bool) if rows.mask is None else ~rows.mask.flatten(1)
    found = _observed(x, picked) | {"missing": missing}
    if imputations:
        found["imputed"] = x.unsqueeze(1).repeat(1, imputations, 1)
    own = missing.any(1).nonzero().flatten()
    if not len(own):
        return found
    part = rows.take(own)
    for numbers, weighted in weighted_posterior(vae, part, draws):
        _fill(vae, part.take(numbers), weighted, imputations, found, own[numbers])
    return found


def _fill(vae: VAE, rows: Rows, weighted: Weighted, imputations: int, found: Found, places: Tensor) -> None:
    """Fill in the missing values of rows, whose places in the block are given."""
    missing, dtype = found["missing"][places], found["x"].dtype
    for name, value in summarize(weighted.likelihood, weighted.weights, PICKED).items():
        found[name][places] = torch.where(missing, value.to(dtype), found[name][places])
    found["khat"][places], found["ess"][places] = weighted.khat.to(dtype), weighted.ess.to(dtype)
    if imputations:
        z = resampled(weighted.z, weighted.weights, imputations)
        drawn = vae.likelihood(z, rows).sample().flatten(2).swapaxes(0, 1)
        found["imputed"][places] = torch.where(missing.unsqueeze(1), drawn, found["imputed"][places])


def _observed(x: Tensor, picked: Tensor) -> Found:
    """What is known of values that were all observed: themselves, without an error."""
    nothing = x.new_full((len(x),), torch.nan)
    error = torch.where(picked, torch.nan, 0.0).to(x).repeat(len(x), 1)
    found = {"x": x.clone(), "x_sd": error, "x_mcse": error.clone()}
    if picked.any():
        sure = {"x_probability": 1.0, "x_probability_mcse": 0.0}
        found |= {name: torch.where(picked, value, torch.nan).to(x).repeat(len(x), 1) for name, value in sure.items()}
    return found | {"khat": nothing, "ess": nothing.clone()}
