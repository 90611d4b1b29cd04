"""Estimate log p(x) of some data from another start, so that a mode the first estimate missed can show."""

from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.rows import rows_for
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.evidence.estimate import Method, log_evidence

OTHER_START: dict[str, Method] = {"iw": "ais_prior", "psis": "ais_prior", "ais": "ais_prior", "ais_prior": "ais"}
"""For each method, one that starts where it does not."""


@takes_settings
def cross_check(
    vae: VAE,
    x: Any,
    found: xr.Dataset,
    *,
    data: int = 16,
    num_particles: int = 32,
    temperatures: int = 100,
    leapfrog: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Repeat an estimate of log p(x) from another start for some of the data.

    An estimate from the guide cannot see a mode of the posterior that the guide misses: its standard error and k̂ are
    small, and it lies low. Annealing from the prior can reach modes that the guide misses, if there are enough chains.
    Both lie below log p(x) in expectation, so where the second is higher by more than the errors, the first is too low
    by at least that; where it is lower, the second has not converged and says nothing.

    .. math:: \\Delta_i = \\log \\hat p(x_i) - \\log \\hat p_{\\mathrm{second}}(x_i), \\qquad
        \\mathrm{se}_i^2 = \\mathrm{mcse}_i^2 + \\mathrm{mcse}_{\\mathrm{second}, i}^2

    Args:
        vae: the VAE that ``found`` is of.
        x: the data that ``found`` is of.
        found: from :func:`pyro_vae.log_evidence`, by any method but ``"bdmc"``.
        data: how many of the data to repeat, drawn at random; all where there are fewer.
        num_particles: chains per datum, at least 2.
        temperatures: steps of the second estimate, at least 1.
        leapfrog: steps of a Hamiltonian move at most, at least 1.
        seed: of the chosen data and of the particles.
        progress: whether to show a bar.

    Returns:
        ``found`` with, over ``checked`` (the chosen data), ``second_log_evidence``, ``second_mcse``, ``second_khat``,
        ``difference`` (of the first minus the second) and ``difference_se``, in nats; :func:`judge_evidence` reads
        them. The attribute ``second`` is the method of the second estimate.

    Raises:
        DataError: if ``found`` is of other data.
        ModelError: if the VAE does not fit the data, or its latents are discrete or bounded.
        SettingsError: if a setting is out of its range, or ``found`` is of simulated data.

    References:
        | Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
        | On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2016),
          https://arxiv.org/abs/1611.04273

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> vae, x = linear.as_vae(), torch.ones(3, 5).double()
        >>> checked = cross_check(vae, x, pv.log_evidence(vae, x))
        >>> bool((abs(checked.difference) < 5 * checked.difference_se).all())
        True
    """
    whole("data", data, 1)
    if found.attrs.get("method") not in OTHER_START:
        raise SettingsError(
            'found is not an estimate of given data; give what log_evidence returned by a method other than "bdmc", '
            "which brackets log p(x) itself"
        )
    rows = rows_for(vae, x)
    if found.attrs["data_hash"] != data_hash(row_hashes(rows)):
        raise DataError("found is of other data than x; give the data that log_evidence was given")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:data])
    second = log_evidence(
        vae, rows.take(torch.as_tensor(chosen, device=rows.x.device)), method=OTHER_START[found.attrs["method"]],
        num_particles=num_particles, temperatures=temperatures, leapfrog=leapfrog, seed=seed, progress=progress,
    )  # fmt: skip
    both = found.assign(_beside(found.isel(datum=chosen), second)).assign_coords(checked=found.datum.values[chosen])
    return both.assign_attrs(second=second.attrs["method"], second_estimate=second.attrs["estimate"])


def check_where_possible(vae: VAE, x: Any, found: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """Check an estimate of log p(x) from another start where gradients can move the latents.

    For discrete or bounded latents there is no check, and :func:`judge_evidence` says so.

    Args:
        vae: a VAE.
        x: held-out data.
        found: from :func:`pyro_vae.log_evidence` of these data.
        seed: of the other draws.

    Returns:
        What :func:`cross_check` returns, or ``found``.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> vae, x = linear.as_vae(), torch.ones(3, 5).double()
        >>> check_where_possible(vae, x, log_evidence(vae, x, num_particles=50)).attrs["second"]
        'ais_prior'
    """
    try:
        return cross_check(vae, x, found, seed=seed)
    except ModelError:
        return found


def _beside(first: xr.Dataset, second: xr.Dataset) -> dict[str, Any]:
    nats = {"units": "nats"}
    return {
        "second_log_evidence": ("checked", second.log_evidence.values, nats),
        "second_mcse": ("checked", second.mcse.values, nats),
        "second_khat": ("checked", second.khat.values, {"units": "1"}),
        "difference": ("checked", first.log_evidence.values - second.log_evidence.values, nats),
        "difference_se": ("checked", np.hypot(first.mcse.values, second.mcse.values), nats),
    }
