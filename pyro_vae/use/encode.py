"""Encode data as the mean and the standard deviation of q(z|x)."""

import math
from typing import Any

import torch
import xarray as xr

from pyro_vae.core.component import Distribution
from pyro_vae.core.device import validate_seed
from pyro_vae.core.joined import JoinedPosterior
from pyro_vae.core.pair import Pair
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.core.zuko import FlowDistribution
from pyro_vae.use.inputs import Found, by_block, read
from pyro_vae.use.labelled import label


@torch.no_grad()
@takes_settings
def encode(
    vae: VAE | Pair,
    data: Any,
    *,
    context: Any = None,
    mask: Any = None,
    draws: int = 1000,
    seed: int = 0,
    chunk: int = 2**22,
    progress: bool = False,
) -> xr.Dataset:
    """Compute the latents of data: the mean and the standard deviation of q(z|x).

    .. math:: z_i = E_{q(z | x_i)}[z], \\qquad \\mathrm{sd}_i^2 = \\mathrm{Var}_{q(z | x_i)}[z]

    Both have a closed form for normal posteriors. For flows they are estimated from ``draws`` draws, with an error.

    Args:
        vae: a VAE.
        data: what :func:`pyro_vae.data.rows_for` takes (a table, whose columns are matched by name,
            :class:`~pyro_vae.data.Data`, an array, a tensor), or a :func:`pyro_vae.data.stream`, which is read once and
            need not fit into memory.
        context: of a conditional VAE, shape ``(datum, c)``, or a table, matched by name.
        mask: booleans, the shape of the data: true where observed.
        draws: the number of draws for each datum, used if the mean of q(z|x) has no closed form, at least 2.
        seed: of the draws.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU). With draws, another
            chunk gives other draws; otherwise it only changes rounding.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``datum`` and ``latent``: ``z`` and ``z_sd``, and with draws also ``z_mcse``, the standard error
        of ``z`` over draws. ``datum`` has the row labels of the data; :func:`pyro_vae.as_table` converts it to columns
        ``z0``, ``z0_sd``, ….

    Raises:
        DataError: if the values or columns of the data do not fit the VAE.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a setting is out of its range.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pandas as pd, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> found = encode(vae, pd.DataFrame({"a": [0.0, 3.0], "b": [0.0, 3.0]}, index=["r", "s"]))
        >>> round(found.z.sel(datum="s", latent=0).item(), 6), round(found.z_sd.sel(datum="s", latent=0).item() ** 2, 6)
        (2.0, 0.333333)
    """
    whole("draws", draws, 2)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    table = read(vae, data, context=context, mask=mask)

    def compute(rows: Rows) -> Found:
        return _moments(vae.posterior(rows), draws)

    sites = vae.posterior(table.first.like(vae)) if isinstance(vae, Pair) else None
    if sites is not None:
        sites.validate_real()
    event = vae.prior(*table.first.given).event_shape if sites is None else sites.event_shape
    width = max(table.first.x[0].numel(), event.numel())
    found = by_block(
        vae, table, compute, draws=draws, width=width, chunk=chunk, seed=seed, purpose="Encoding", progress=progress
    )
    made = label(
        {name: (["datum", "latent"], value) for name, value in found.items()},
        table.names,
        {"latent": sites.names} if sites else None,
    )
    return made.assign_attrs(draws=draws, seed=seed) if "z_mcse" in found else made


def _moments(q: Distribution | JoinedPosterior, draws: int) -> Found:
    """Return the mean and the standard deviation, with a standard error if they are estimated from draws."""
    if not isinstance(q, FlowDistribution):
        try:
            return {"z": q.mean, "z_sd": q.variance.sqrt()}
        except NotImplementedError:
            pass
    z = q.sample((draws,)).double()
    sd = z.std(0)
    return {name: value.to(z) for name, value in {"z": z.mean(0), "z_sd": sd, "z_mcse": sd / math.sqrt(draws)}.items()}
