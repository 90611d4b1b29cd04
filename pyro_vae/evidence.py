"""log p(x) of data that were not trained on."""

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae._numbers import whole
from pyro_vae.core import VAE, evaluating
from pyro_vae.device import refuse_seed, seeded
from pyro_vae.elbo import log_weights
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.exact import LinearGaussian, quadrature_log_marginal
from pyro_vae.rows import Rows, rows_for


def refuse_particles(num_particles: int) -> None:
    """Refuse fewer particles than an error can be had of.

    Example:
        >>> refuse_particles(2)
    """
    whole("num_particles", num_particles, 2)


@torch.no_grad()
def log_evidence(vae: VAE, x: Any, *, num_particles: int = 500, chunk: int = 2**20, seed: int = 0) -> xr.Dataset:
    """The importance-weighted bound on log p(x) of each datum, with its Monte-Carlo standard error.

    .. math:: \\log p(x_i) \\gtrsim \\log \\frac1K \\sum_k w_{ki}, \\qquad w_{ki} = p(x_i, z_{ki}) / q(z_{ki} | x_i)

    In expectation it lies below log p(x), by half the squared relative error of the mean weight where
    that is small; the relative error is what ``mcse`` estimates. A guide that misses part of the
    posterior makes both too small: look at :func:`pyro_vae.diagnose.psis` too.

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        num_particles: K, at least 2.
        chunk: about so many weights at a time.
        seed: of the particles.

    Returns:
        A dataset over ``datum`` of ``log_evidence`` and ``mcse``, in nats.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data.
        SettingsError: if ``num_particles`` is no whole number of at least 2.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = torch.ones(3, 5).double()
        >>> found = log_evidence(linear.as_vae(), x, num_particles=10)
        >>> bool((abs(found.log_evidence - linear.log_marginal(x).numpy()) < 1e-12).all())
        True
    """
    refuse_particles(num_particles)
    refuse_seed(seed)
    rows, parts = rows_for(vae, x).like(vae), []
    size = max(1, chunk // (num_particles * rows.x[0].numel()))
    with seeded(seed, rows.x.device), evaluating(vae):
        for part in rows.split(size):
            weights = _log_weights(vae, part, num_particles)
            log_mean = weights.logsumexp(0) - math.log(num_particles)
            parts.append(torch.stack([log_mean, (weights - log_mean).exp().std(0) / math.sqrt(num_particles)]))
    found, error = torch.cat(parts, 1).cpu().numpy()
    nats = {"units": "nats"}
    return xr.Dataset(
        {"log_evidence": ("datum", found, nats), "mcse": ("datum", error, nats)},
        attrs={"method": "importance-weighted bound", "num_particles": num_particles, "seed": seed, **versions()},
    )


def _log_weights(vae: VAE, rows: Rows, num_particles: int) -> Tensor:
    return log_weights(vae.model, vae.guide, *rows.arguments(), num_particles=num_particles).double()


def known_evidence(vae: Any, rows: Rows, given: Any = None) -> tuple[float, float, str]:
    """The mean of log p(x), its standard error, and where it is from: given, an oracle's, or not known (NaN).

    Args:
        vae: where nothing is given, a linear-Gaussian VAE or one with at most two latents has an oracle.
        rows: the data.
        given: a dataset from :func:`log_evidence`, numbers of shape ``(datum,)``, or nothing.

    Raises:
        DataError: if what is given is not one number per datum.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> known_evidence(linear.as_vae(), Rows(torch.ones(3, 5)))[2]
        'linear-Gaussian'
    """
    if given is None:
        return _oracle(vae, rows)
    mcse = np.asarray(given["mcse"], dtype=float) if isinstance(given, xr.Dataset) else np.zeros(1)
    values = given["log_evidence"] if isinstance(given, xr.Dataset) else given
    try:
        values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError("log_evidence holds what is no number; give one number per datum") from error
    if not np.isfinite(values).all():
        raise DataError("log_evidence holds a value that is not finite; give one number per datum")
    if values.shape != (len(rows),):
        raise DataError(f"log_evidence has shape {values.shape} for {len(rows)} data; give one number per datum")
    return float(values.mean()), float(np.sqrt((mcse**2).sum()) / len(values)), "given"


@torch.no_grad()
def _oracle(vae: Any, rows: Rows) -> tuple[float, float, str]:
    nothing = math.nan, math.nan, "not known"
    if not isinstance(vae, VAE) or rows.context is not None or rows.mask is not None:
        return nothing
    try:
        return float(LinearGaussian.of(vae).log_marginal(rows.x).mean()), 0.0, "linear-Gaussian"
    except ModelError:
        pass
    try:
        return float(quadrature_log_marginal(vae, rows.x).mean()), 0.0, "quadrature"
    except (ModelError, SettingsError):
        return nothing
