"""A second estimate of log p(x) from another start, which can reveal a mode that the first estimate missed."""

from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_vae.core.pair import Amortized
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.rows import rows_for
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.evidence.estimate import Method, log_evidence

OTHER_START: dict[str, Method] = {"iw": "ais_prior", "psis": "ais_prior", "ais": "ais_prior", "ais_prior": "ais"}
"""For each method, a method with another starting distribution."""


@takes_settings
def cross_check(
    vae: Amortized,
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

    An estimate from the guide cannot detect a posterior mode that the guide misses: it is too low, but its standard
    error and k̂ are small. Annealing from the prior can reach such modes, given enough chains. Both estimates lie below
    log p(x) in expectation. If the second is significantly higher, the first is too low by at least the difference; if
    it is lower, it has not converged and is not informative.

    .. math:: \\Delta_i = \\log \\hat p(x_i) - \\log \\hat p_{\\mathrm{second}}(x_i), \\qquad
        \\mathrm{se}_i^2 = \\mathrm{mcse}_i^2 + \\mathrm{mcse}_{\\mathrm{second}, i}^2

    Args:
        vae: the VAE of the first estimate.
        x: the data of the first estimate.
        found: the first estimate, from :func:`pyro_vae.log_evidence` with any method but ``"bdmc"``.
        data: the number of data to repeat, drawn at random; all data if there are fewer.
        num_particles: chains per datum, at least 2.
        temperatures: annealing steps of the second estimate, at least 1.
        leapfrog: the largest number of leapfrog steps of a Hamiltonian move, at least 1.
        seed: the seed of the choice of data and of the particles.
        progress: whether to show a progress bar.

    Returns:
        ``found`` with additional variables over ``checked`` (the chosen data), in nats: ``second_log_evidence``,
        ``second_mcse``, ``second_khat``, ``difference`` (first minus second) and ``difference_se``, which
        :func:`judge_evidence` takes into account. The attribute ``second`` is the method of the second estimate.

    Raises:
        DataError: if ``found`` belongs to other data.
        ModelError: if the VAE does not fit the data, or its latents are discrete or bounded.
        SettingsError: if a setting is out of range, or ``found`` belongs to simulated data.

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
            'found has no check from another start; pass a result of log_evidence with a method other than "bdmc", '
            "which brackets log p(x) already"
        )
    rows = rows_for(vae, x)
    if found.attrs["data_hash"] != data_hash(row_hashes(rows)):
        raise DataError("found belongs to other data than x; pass the same data as to log_evidence")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:data])
    second = log_evidence(
        vae, rows.take(torch.as_tensor(chosen, device=rows.x.device)), method=OTHER_START[found.attrs["method"]],
        num_particles=num_particles, temperatures=temperatures, leapfrog=leapfrog, seed=seed, progress=progress,
    )  # fmt: skip
    both = found.assign(_differences(found.isel(datum=chosen), second))
    both = both.assign_coords(checked=found.datum.values[chosen])
    return both.assign_attrs(second=second.attrs["method"], second_estimate=second.attrs["estimate"])


def check_where_possible(vae: Amortized, x: Any, found: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """Run :func:`cross_check` if the latents are unbounded real numbers.

    For discrete or bounded latents there is no check, which :func:`judge_evidence` reports.

    Args:
        vae: a VAE.
        x: held-out data.
        found: the result of :func:`pyro_vae.log_evidence` for these data.
        seed: the seed of the second estimate.

    Returns:
        The result of :func:`cross_check`, or ``found``.

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


def _differences(first: xr.Dataset, second: xr.Dataset) -> dict[str, Any]:
    """The second estimate and its difference from the first, as variables over ``checked``."""
    nats = {"units": "nats"}
    return {
        "second_log_evidence": ("checked", second.log_evidence.values, nats),
        "second_mcse": ("checked", second.mcse.values, nats),
        "second_khat": ("checked", second.khat.values, {"units": "1"}),
        "difference": ("checked", first.log_evidence.values - second.log_evidence.values, nats),
        "difference_se": ("checked", np.hypot(first.mcse.values, second.mcse.values), nats),
    }
