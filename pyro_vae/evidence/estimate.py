"""Estimates of log p(x) of each datum by five methods."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import numbers_at_once, seeded, validate_seed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.progress import ticking
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, row_hashes, trained_on
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import row_names
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.annealed import PILOT, anneal_from_guide, anneal_from_prior
from pyro_vae.evidence.bidirectional import SPREADING_MOVES, bidirectional
from pyro_vae.evidence.generative import generative_attribute
from pyro_vae.evidence.kinds import countable_features, encode_features, kind
from pyro_vae.evidence.weights import Estimates, Plan, importance_weighted, pareto_smoothed

Method: TypeAlias = Literal["iw", "psis", "ais", "ais_prior", "bdmc"]
METHODS = get_args(Method)

BY_METHOD: dict[str, Callable[[Any, Rows, Plan], Estimates]] = {
    "iw": importance_weighted,
    "psis": pareto_smoothed,
    "ais": anneal_from_guide,
    "ais_prior": anneal_from_prior,
    "bdmc": bidirectional,
}

PARTICLES = {"iw": 500, "psis": 500, "ais": 32, "ais_prior": 32, "bdmc": 32}
"""The default number of particles of each method."""

ESTIMATES = {
    "iw": "the importance-weighted bound",
    "psis": "Pareto-smoothed importance sampling",
    "ais": "annealed importance sampling from the guide",
    "ais_prior": "annealed importance sampling from the prior",
    "bdmc": "bidirectional Monte Carlo on simulated data",
}

ANNEALED = ("ais", "ais_prior", "bdmc")
"""The methods with Hamiltonian moves, which need gradients with respect to z."""

DIMS = {"x": "feature", "z": "latent"}
UNITS = {"acceptance": "1", "khat": "1", "x": "of the data", "z": "of the latents"}


def validate_particles(num_particles: int) -> None:
    """Raise an error for fewer than two particles, which give no standard error.

    Example:
        >>> validate_particles(2)
    """
    whole("num_particles", num_particles, 2)


def validate_method(method: str, among: tuple[str, ...] = METHODS) -> None:
    """Raise an error for an unknown method.

    Example:
        >>> validate_method("iw")
    """
    if method not in among:
        raise SettingsError(f"method is {method!r}; it must be {', '.join(among[:-1])} or {among[-1]}")


@torch.no_grad()
@takes_settings
def log_evidence(
    vae: Amortized,
    x: Any,
    *,
    method: Method = "iw",
    num_particles: int | None = None,
    temperatures: int = 100,
    leapfrog: int = 5,
    chunk: int = 2**20,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Estimate log p(x) of each datum, with its Monte-Carlo standard error.

    .. math:: \\log p(x_i) \\gtrsim \\log \\frac1K \\sum_k w_{ki}, \\qquad \\mathbb E\\, w_{ki} = p(x_i)

    The methods differ in the weights:

    - ``"iw"``: ``w = p(x, z) / q(z|x)`` of draws from the guide, the importance-weighted bound;
    - ``"psis"``: the same weights, the largest of each datum replaced by quantiles of a fitted Pareto tail; the
      variance is smaller and the bias two to four times that of ``"iw"``;
    - ``"ais"``: annealed importance sampling from q(z|x) to p(x, z) along ``q^(1-β) p^β``, with ``temperatures`` steps
      and Hamiltonian moves. If the guide is exact, every weight is p(x). Step sizes and scales are tuned for each datum
      in a pilot run and then fixed, since adaptation during the run would bias the weights;
    - ``"ais_prior"``: annealing from p(z), independent of the guide, which can reach modes that the guide misses
      (although few chains may miss a narrow mode). It needs more temperatures;
    - ``"bdmc"``: bidirectional Monte Carlo on simulated data, one datum for each row of ``x``, with its context and
      mask (the values of ``x`` are not used). The latents from which the data were simulated are exact draws from the
      posteriors, from which chains also anneal backwards: ``E lower ≤ log p(x) ≤ E upper``.

    The mean weight is unbiased, so in expectation its logarithm lies below log p(x). ``bias`` estimates the difference
    by the jackknife. It is reliable if ``khat`` is below 0.5, rough up to 0.7, and an underestimate above;
    ``docs/evidence.md`` has the measured bias and coverage for each k̂.

    ``mcse``, ``khat`` and ``bias`` depend on the draws only and cannot reveal missed mass: if the guide covers one of
    two equal modes, the estimate is too low by log 2 and all three look perfect.
    :func:`~pyro_vae.evidence.cross_check` repeats the estimate from another start for some of the data, and ``"bdmc"``
    brackets log p(x) of simulated data.

    Args:
        vae: a VAE, or a :class:`pyro_vae.Pair`, whose latents of all sites are moved together.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        method: ``"iw"``, ``"psis"``, ``"ais"``, ``"ais_prior"`` or ``"bdmc"``.
        num_particles: the number of draws or chains per datum K, at least 2 (25 for ``"psis"`` and for k̂); by default
            500 draws or 32 chains.
        temperatures: annealing steps of ``"ais"``, ``"ais_prior"`` and ``"bdmc"``, at least 1; 1 is importance
            sampling.
        leapfrog: the largest number of leapfrog steps of a Hamiltonian move, at least 1; each move draws its number.
        chunk: the approximate number of decoded numbers to hold at a time; 64 times as many on a GPU.
        seed: the seed of the particles.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``datum``, in nats. ``log_evidence`` and its standard error ``mcse``; ``khat``, the tail shape of
        the weights (NaN below 25 particles; for ``"bdmc"`` of the chains from the guide); ``bias``, negative if
        log p(x) is underestimated, and ``bias_se``; for annealing, ``acceptance``, the acceptance rate of the moves.

        With ``"bdmc"``, instead of ``bias``: ``lower`` with ``lower_mcse``, ``upper`` with ``upper_mcse_given_z``, the
        simulated data ``x (datum, feature)`` and their latents ``z (datum, latent)``. ``log_evidence`` is then the
        midpoint of the bounds, and ``mcse`` combines half the gap with the errors of both bounds. All chains of an
        upper bound start at the exact draw z, so its error is conditional on z. If the posterior has several modes and
        the guide misses some, the bounds of a datum may agree although both are wrong, while those of another datum
        are far apart: only the mean gap over many data reveals it.

        ``attrs`` hold the settings, the ``kind`` of p(x) (a density, a probability or both) and of each feature
        (``countable``), the hashes of the data and of the generative model, and which of the data are training data.

    Raises:
        DataError: if the data are not rows of finite numbers, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data, or for annealing, if its latents are discrete or bounded.
        SettingsError: if a setting is out of range.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
        | Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
        | Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse, Ghahramani & Adams, 2015),
          https://arxiv.org/abs/1511.02543
        | On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2016),
          https://arxiv.org/abs/1611.04273

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = torch.ones(3, 5).double()
        >>> found = log_evidence(linear.as_vae(), x, num_particles=10)
        >>> bool((abs(found.log_evidence - linear.log_marginal(x).numpy()) < 1e-12).all())
        True
        >>> both = log_evidence(linear.as_vae(), x, method="bdmc", num_particles=4, temperatures=3)
        >>> bool((abs(both.upper - both.lower) < 1e-9).all())
        True
    """
    validate_method(method)
    num_particles = PARTICLES[method] if num_particles is None else num_particles
    validate_particles(num_particles)
    for name, number in {"temperatures": temperatures, "leapfrog": leapfrog, "chunk": chunk}.items():
        whole(name, number, 1)
    validate_seed(seed)
    if torch.is_inference_mode_enabled() and method in ANNEALED:
        raise SettingsError(
            f"method {method!r} needs gradients, but inference mode is on; call log_evidence outside of it"
        )
    x = data_for(vae, x)
    data = rows_for(vae, x)
    rows = data.like(vae)
    numbers = numbers_at_once(chunk, rows.x.device)
    parts = list(rows.split(max(1, numbers // (num_particles * rows.x[0].numel()))))
    both_ways = SPREADING_MOVES + 2 * temperatures
    ticks = 1 if method not in ANNEALED else PILOT + (both_ways if method == "bdmc" else temperatures)
    with (
        seeded(seed, rows.x.device),
        evaluating(vae, num_particles * max(map(len, parts))),
        ticking("Estimating log p(x)", ticks * len(parts), progress) as tick,
    ):
        plan = Plan(num_particles, temperatures, leapfrog, tick)
        estimates = [BY_METHOD[method](vae, part, plan) for part in parts]
    names = np.arange(len(rows)) if method == "bdmc" else row_names(x, len(rows))  # simulated data have no labels
    table = _as_dataset({name: torch.cat([part[name] for part in estimates]) for name in estimates[0]}, names)
    if method == "bdmc":
        data = Rows(torch.as_tensor(table.x.values), data.context)
    annealing = {"temperatures": temperatures, "leapfrog": leapfrog} if method in ANNEALED else {}
    hashes, countable = row_hashes(data), countable_features(vae, rows)
    overlap = trained_on(vae, hashes, getattr(x, "row_labels", None))
    return table.assign_attrs(
        method=method, estimate=ESTIMATES[method], num_particles=num_particles, **annealing, seed=seed,
        data_hash=data_hash(hashes), trained_on=overlap, kind=kind(countable),
        countable=encode_features(countable), **generative_attribute(vae), **versions(),
    )  # fmt: skip


def _as_dataset(estimates: Estimates, names: np.ndarray) -> xr.Dataset:
    arrays = {name: value.flatten(1) if name in DIMS else value for name, value in estimates.items()}
    return xr.Dataset(
        {
            name: (("datum", DIMS[name]) if name in DIMS else "datum", value.cpu().numpy(), _units(name))
            for name, value in arrays.items()
        },
        {"datum": names},
    )


def _units(name: str) -> dict[str, str]:
    return {"units": UNITS.get(name, "nats")}
