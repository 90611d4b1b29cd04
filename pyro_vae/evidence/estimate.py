"""Estimate log p(x) of each datum, by five methods."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import numbers_at_once, refuse_seed, seeded
from pyro_vae.core.pair import Amortised, Pair
from pyro_vae.core.progress import ticking
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, row_hashes, trained_on
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import row_names
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.evidence.annealed import PILOT, annealed, annealed_from_prior
from pyro_vae.evidence.bidirectional import APART, bidirectional
from pyro_vae.evidence.generative import generative_attribute
from pyro_vae.evidence.kinds import as_text, countable_features, kind
from pyro_vae.evidence.weights import Found, Plan, importance_weighted, pareto_smoothed

Method: TypeAlias = Literal["iw", "psis", "ais", "ais_prior", "bdmc"]
METHODS = get_args(Method)

BY_METHOD: dict[str, Callable[[Any, Rows, Plan], Found]] = {
    "iw": importance_weighted,
    "psis": pareto_smoothed,
    "ais": annealed,
    "ais_prior": annealed_from_prior,
    "bdmc": bidirectional,
}

PARTICLES = {"iw": 500, "psis": 500, "ais": 32, "ais_prior": 32, "bdmc": 32}
"""Weights per datum, where none are asked for."""

ESTIMATES = {
    "iw": "importance-weighted bound",
    "psis": "Pareto-smoothed importance sampling",
    "ais": "annealed importance sampling from the guide",
    "ais_prior": "annealed importance sampling from the prior",
    "bdmc": "bidirectional Monte Carlo on simulated data",
}

ANNEALED = ("ais", "ais_prior", "bdmc")
"""The methods that move z by gradients."""

DIMS = {"x": "feature", "z": "latent"}
UNITS = {"acceptance": "1", "khat": "1", "x": "of the data", "z": "of the latents"}


def refuse_particles(num_particles: int) -> None:
    """Refuse fewer particles than an error can be had of.

    Example:
        >>> refuse_particles(2)
    """
    whole("num_particles", num_particles, 2)


def refuse_method(method: str, among: tuple[str, ...] = METHODS) -> None:
    """Refuse a method that is not there.

    Example:
        >>> refuse_method("iw")
    """
    if method not in among:
        raise SettingsError(f"method is {method!r}; it must be {', '.join(among[:-1])} or {among[-1]}")


@torch.no_grad()
@takes_settings
def log_evidence(
    vae: Amortised,
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

    What the weights are is the method's:

    - ``"iw"``: ``w = p(x, z) / q(z|x)`` of draws from the guide, the importance-weighted bound;
    - ``"psis"``: the same, with the largest of each datum replaced by the quantiles of a Pareto tail fitted to
      them; its variance is smaller and its bias two to four times that of ``"iw"``;
    - ``"ais"``: chains that go from q(z|x) to p(x, z) by ``temperatures`` steps, along
      ``q^(1-β) p^β``, moved by Hamiltonian Monte Carlo. Where the guide is exact, every weight is p(x). Step sizes and
      scales are tuned for each datum in a pilot run before, and stay as they are in the run: adapted in it, the weights
      would not be unbiased;
    - ``"ais_prior"``: the same from p(z), which knows nothing of the guide, so that it can reach modes that the guide
      misses (few chains may miss a narrow one too); it takes more temperatures;
    - ``"bdmc"``: as many data as ``x`` has are simulated from the model (at the contexts and with the missing
      values of ``x``, whose values are not used). The latents that made them are exact draws from their posteriors,
      from which chains go backwards too: ``E lower ≤ log p(x) ≤ E upper``.

    Each mean weight is unbiased, so in expectation its logarithm lies below log p(x). ``bias`` measures by how much, by
    leaving each weight out. It can be relied on where ``khat`` is below 0.5; up to 0.7 it is rough, and above it
    understates. ``docs/evidence.md`` has the measured bias and coverage for each k̂.

    What no draw has shown is in none of ``mcse``, ``khat`` and ``bias``: a guide on one of two equal modes lies log 2
    low and looks perfect. :func:`~pyro_vae.evidence.cross_check` repeats the estimate from another start for some of
    the data, and ``"bdmc"`` brackets log p(x) of simulated data.

    Args:
        vae: a VAE, or for all methods but ``"bdmc"`` a :class:`pyro_vae.Pair`, whose latents of all sites are moved
            together.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        method: ``"iw"``, ``"psis"``, ``"ais"``, ``"ais_prior"`` or ``"bdmc"``.
        num_particles: K, draws or chains per datum, at least 2 (25 for ``"psis"``, and for k̂); if not given, 500 draws
            or 32 chains.
        temperatures: steps along the path of ``"ais"``, ``"ais_prior"`` and ``"bdmc"``, at least 1; with 1, importance
            sampling.
        leapfrog: steps of a Hamiltonian move at most, at least 1; each move takes a number from 1 to this.
        chunk: about so many numbers of decoded data at a time, on a GPU 64 times as many.
        seed: of the particles.
        progress: whether to show a bar.

    Returns:
        A dataset over ``datum``, in nats: ``log_evidence`` and its standard error ``mcse``; ``khat``, the shape of the
        tail of its weights (NaN below 25 particles; of the chains from the guide with ``"bdmc"``); ``bias``, which is
        measured and negative where log p(x) is underestimated, and ``bias_se``; ``acceptance``, the share of moves that
        were taken, where there are moves. With ``"bdmc"``, instead of ``bias``, ``lower`` with ``lower_mcse``,
        ``upper`` with ``upper_mcse_given_z``, the simulated data ``x (datum, feature)`` and their latents
        ``z (datum, latent)``; ``log_evidence`` is then the middle, and ``mcse`` joins half the gap and the errors of
        both bounds. All chains of an upper bound start from the one exact draw z, and its error is given that draw.
        Where the posterior has several modes and the guide misses some, the bounds of one datum may agree and both be
        wrong, while those of another are far apart: only the mean gap over the data is sure to show it. ``attrs`` hold
        the settings, the ``kind`` of p(x) (a density, a probability or both) and that of each feature (``countable``),
        the hashes of the data and of the generative model, and which of the data were trained on, if any.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data, or its latents are discrete or bounded where they are to
            be moved.
        SettingsError: if a setting is out of its range.

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
    refuse_method(method)
    num_particles = PARTICLES[method] if num_particles is None else num_particles
    refuse_particles(num_particles)
    for name, number in {"temperatures": temperatures, "leapfrog": leapfrog, "chunk": chunk}.items():
        whole(name, number, 1)
    refuse_seed(seed)
    if torch.is_inference_mode_enabled() and method in ANNEALED:
        raise SettingsError("inference mode is on, where no gradient can be had to move z by; call outside of it")
    if method == "bdmc" and isinstance(vae, Pair):
        raise ModelError(
            "method 'bdmc' simulates data from a prior and a decoder, which a Pair does not name; take iw, psis or ais"
        )
    x = data_for(vae, x)
    given = rows_for(vae, x)
    rows = given.like(vae)
    most = numbers_at_once(chunk, rows.x.device)
    parts = list(rows.split(max(1, most // (num_particles * rows.x[0].numel()))))
    pieces = 1 if method not in ANNEALED else PILOT + (APART + 2 * temperatures if method == "bdmc" else temperatures)
    with (
        seeded(seed, rows.x.device),
        evaluating(vae, num_particles * max(map(len, parts))),
        ticking("Estimating log p(x)", pieces * len(parts), progress) as tick,
    ):
        plan = Plan(num_particles, temperatures, leapfrog, tick)
        found = [BY_METHOD[method](vae, part, plan) for part in parts]
    names = np.arange(len(rows)) if method == "bdmc" else row_names(x, len(rows))  # simulated data have no labels
    table = _labelled({name: torch.cat([part[name] for part in found]) for name in found[0]}, names)
    if method == "bdmc":
        given = Rows(torch.as_tensor(table.x.values), given.context)
    annealing = {"temperatures": temperatures, "leapfrog": leapfrog} if method in ANNEALED else {}
    hashes, countable = row_hashes(given), countable_features(vae, rows)
    met = trained_on(vae, hashes, getattr(x, "row_labels", None))
    return table.assign_attrs(
        method=method, estimate=ESTIMATES[method], num_particles=num_particles, **annealing, seed=seed,
        data_hash=data_hash(hashes), trained_on=met, kind=kind(countable),
        countable=as_text(countable), **generative_attribute(vae), **versions(),
    )  # fmt: skip


def _labelled(found: Found, names: np.ndarray) -> xr.Dataset:
    arrays = {name: value.flatten(1) if name in DIMS else value for name, value in found.items()}
    return xr.Dataset(
        {
            name: (("datum", DIMS[name]) if name in DIMS else "datum", value.cpu().numpy(), _units(name))
            for name, value in arrays.items()
        },
        {"datum": names},
    )


def _units(name: str) -> dict[str, str]:
    return {"units": UNITS.get(name, "nats")}
