"""Is q calibrated for data that the model makes, anew or near the user's? Simulation-based calibration."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.compatibility import called
from pyro_vae.core.component import evaluating, observed
from pyro_vae.core.device import numbers_at_once, refuse_seed, seeded
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_p
from pyro_vae.core.generate import latents
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import rows_for
from pyro_vae.data.values import as_tensor
from pyro_vae.diagnose import _ecdf
from pyro_vae.errors import DataError

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Of the central intervals whose coverage is counted."""

MISS = 0.05
"""How often the band of a quantity is left by an exact guide."""

DOUBTFUL, BAD = 0.05, 0.001
"""p-values below which a guide is called doubtful, and, where the effect is large too, bad."""

HELD, APART = 0.8, 0.25
"""A large effect: 90 % intervals that hold less than this share, or an ECDF of ranks this far from uniform."""

NEAR = 0.05
"""90 % intervals on reconstructions that miss 90 % by less are fine."""

LIKELIHOOD = "log p(x|z)"


@torch.no_grad()
@takes_settings
def sbc(
    vae: VAE,
    *,
    simulations: int = 500,
    draws: int = 99,
    around: Any = None,
    context: Any = None,
    mask: Any = None,
    seed: int = 0,
    chunk: int = 2**20,
) -> xr.Dataset:
    """Simulation-based calibration of the guide, and the coverage of its intervals.

    .. math:: z \\sim p(z), \\; x \\sim p(x | z), \\; z_l \\sim q(z | x): \\quad
        \\mathrm{rank} \\, t(z, x) = \\#\\{l : t(z_l, x) < t(z, x)\\} \\sim U\\{0, …, L\\}

    If q is the posterior, the rank of any quantity t is uniform. The quantities are each latent, and the
    log-likelihood log p(x|z): the ranks of latents alone are uniform for q = prior too, which has not looked at x.
    The guide is amortised, so nothing is fitted again. Ties are ranked at random.

    It is tested with the ECDF of each quantity's ranks: the rarest of its binomial tails is held against what
    uniform ranks give, which yields a p-value and a band that an exact guide's ECDF leaves with probability 0.05.

    All of this is about data that the model makes. Where these do not look like the user's data, nothing is said about
    q(z|x) of the user's; k̂ and the inference gaps are. With ``around``, z is drawn from q(z|x_i) of the user's data
    instead of the prior, and x is a reconstruction: data near the user's. Such ranks are uniform only where q is exact
    and the mixture of q(z|x_i) over the data is the prior, so coverage is what to read, not the p-value.

    Args:
        vae: a VAE.
        simulations: how many z and x are drawn, at least 20; what can be told grows as its square root.
        draws: L, draws from q for each, at least 9; the ranks have L + 1 values.
        around: data to reconstruct, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with a context and
            mask of its own, of which each simulation takes one row at random.
        context: the contexts of a conditional VAE, shape ``(datum, c)``, of which each simulation takes one at random.
        mask: true where a value is observed, shape ``(datum, *features)``, of which each simulation takes one at
            random, in the same row as its context; what it misses must not hang on the values themselves.
        seed: of all draws.
        chunk: about so many numbers at a time, on a GPU 64 times as many.

    Returns:
        A dataset of ``rank`` over ``simulation`` and ``quantity``; ``p_value`` and ``p_value_se`` over ``quantity``,
        and ``joint_p_value``, the smallest times the number of quantities; ``ecdf_difference``, ``band_low`` and
        ``band_high`` over ``quantile``, how far the ECDF of the ranks lies above that of uniform ones; ``coverage``
        and ``coverage_se`` over ``level``, how often the central interval of q holds the quantity, and
        ``expected_coverage`` and ``expected_coverage_se``, the mean over latents. These errors are those of a Beta
        distribution, one hit and one miss more than were seen, so that a share of all or none has an error too.

    Raises:
        DataError: if contexts or masks are not what is asked for.
        ModelError: if the parts of the VAE do not fit each other.
        SettingsError: if a number is too small.

    References:
        | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
          https://arxiv.org/abs/1804.06788
        | Graphical Test for Discrete Uniformity (Säilynoja, Bürkner & Vehtari, 2022), https://arxiv.org/abs/2103.10522
        | Simulation-Based Calibration Checking with Data-Dependent Test Quantities (Modrák et al., 2023),
          https://arxiv.org/abs/2211.02383

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1).double(), torch.zeros(5).double(), 0.5)
        >>> found = sbc(linear.as_vae(), simulations=100)
        >>> found.quantity.values.tolist(), bool(found.joint_p_value > 0.05)
        (['z[0]', 'log p(x|z)'], True)
    """
    whole("simulations", simulations, 20)
    whole("draws", draws, 9)
    whole("chunk", chunk, 1)
    refuse_seed(seed)
    device, parts = vae.like(torch.zeros(())).device, []
    with seeded(seed, device), evaluating(vae, draws * simulations):
        if around is None:
            given = _given(vae, context, mask, simulations)
            z = latents(vae, given)
        else:
            rows = rows_for(vae, around, context=context, mask=mask).like(vae)
            given = rows.take(torch.randint(len(rows), (simulations,), device=device))
            z = vae.posterior(given).sample()
        x = called("decoder", vae.decoder, z, *given.given).sample()
        if given.mask is not None and given.mask.shape != x.shape:
            raise DataError(
                f"mask has shape {tuple(given.mask.shape[1:])} per datum, the model's data {tuple(x.shape[1:])}"
            )
        vae.check(x, given.context)
        rows = Rows(observed(x, given.mask), given.context, given.mask)
        size = max(1, numbers_at_once(chunk, device) // (draws * x[0].numel()))
        for part, truth in zip(rows.split(size), z.split(size), strict=True):
            parts.append(_ranks(vae, part, truth, draws))
        ranks = torch.cat(parts)
        within = torch.rand(ranks.shape).numpy()
    return _summary(ranks.cpu().numpy(), within, draws).assign_attrs(
        {"simulations": simulations, "draws": draws, "seed": seed, "latents": "prior" if around is None else "data"}
        | versions()
    )


def _given(vae: VAE, context: Any, mask: Any, number: int) -> Rows:
    """A context and a mask for each simulation, both of the same row; x is left empty."""
    nothing = torch.empty(number, 0)
    if context is None and mask is None:
        return Rows(nothing)
    context = None if context is None else vae.like(as_tensor(context, source="context"))
    device = vae.like(torch.zeros(())).device
    mask = None if mask is None else torch.as_tensor(mask, device=device)
    if mask is not None and (mask.dtype != torch.bool or mask.dim() < 2):
        raise DataError(f"mask is of {mask.dtype} and shape {tuple(mask.shape)}; give booleans, one row per datum")
    if context is not None and mask is not None and len(context) != len(mask):
        raise DataError(f"there are {len(context)} contexts and {len(mask)} masks; give one of each per datum")
    known = mask if context is None else context
    if mask is not None and not mask.numel():
        raise DataError(f"mask has shape {tuple(mask.shape)}; give at least one row and one feature")
    index = torch.randint(len(known), (number,), device=device)
    return Rows(nothing, *(None if value is None else value[index] for value in (context, mask)))


def _ranks(vae: VAE, rows: Rows, truth: Tensor, draws: int) -> Tensor:
    """The rank of each quantity among the draws of q, shape ``(datum, quantity)``."""
    q = vae.posterior(rows)
    z = torch.cat([truth.unsqueeze(0), q.sample((draws,))])
    scores = vae.likelihood(z, rows).log_prob(rows.x)
    quantities = torch.cat([z.flatten(2), scores.unsqueeze(-1)], -1)
    true, drawn = quantities[0], quantities[1:]
    below, equal = (drawn < true).sum(0), (drawn == true).sum(0)
    return below + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long().clamp(max=draws)


def _summary(ranks: np.ndarray, within: np.ndarray, draws: int) -> xr.Dataset:
    number, quantities = ranks.shape
    counts = _ecdf.counts_below(ranks, draws + 1)
    p, error = np.array([_ecdf.p_value(column, number) for column in counts.T]).T
    quantile = np.arange(1, draws + 1) / (draws + 1)
    low, high = _ecdf.band(number, draws + 1, MISS)
    share = {"units": "share of the simulations"}
    places = (ranks + within) / (draws + 1)  # uniform if the ranks are
    inside = np.abs(places[..., None] - 0.5) <= np.array(LEVELS) / 2
    coverage, latent = inside.mean(0), inside[:, :-1].mean(1)
    with_two = np.concatenate(
        [latent, [np.zeros(len(LEVELS)), np.ones(len(LEVELS))]]
    )  # so that all or none has an error
    middle = (number * coverage + 1) / (number + 2)
    found = {
        "rank": (("simulation", "quantity"), ranks, {"units": f"draws of {draws} below"}),
        "p_value": ("quantity", p, {"units": "probability"}),
        "p_value_se": ("quantity", error, {"units": "probability"}),
        "joint_p_value": ((), min(1.0, quantities * p.min()), {"units": "probability"}),
        "ecdf_difference": (("quantity", "quantile"), (counts / number).T - quantile, share),
        "band_low": ("quantile", low / number - quantile, share),
        "band_high": ("quantile", high / number - quantile, share),
        "coverage": (("quantity", "level"), coverage, share),
        "coverage_se": (("quantity", "level"), np.sqrt(middle * (1 - middle) / (number + 3)), share),
        "expected_coverage": ("level", latent.mean(0), share),
        "expected_coverage_se": ("level", with_two.std(0, ddof=1) / np.sqrt(number + 2), share),
    }
    names = [f"z[{i}]" for i in range(quantities - 1)] + [LIKELIHOOD]
    coords = {"simulation": range(number), "quantity": names, "quantile": quantile, "level": list(LEVELS)}
    thresholds = {"band_miss": MISS, "doubtful_below": DOUBTFUL, "bad_below": BAD, "held": HELD, "apart": APART}
    return xr.Dataset(found, coords, attrs=thresholds)


def judge_sbc(found: xr.Dataset) -> Finding:
    """Is the guide calibrated for data that the model makes, and by how much does it miss?

    A p-value falls with the number of simulations however small the miss, so it says only that there is one. How bad
    that is depends on the effect: the coverage of 90 % intervals, and how far the ECDF of the ranks is from uniform.

    Args:
        found: from :func:`sbc`.

    Returns:
        Fine where the joint p-value is at least 0.05, as it is for 95 % of the seeds or more if q is exact; bad where
        it is below 0.001 and 90 % intervals of a latent hold less than 80 %, or the ECDF of a quantity is more than
        0.25 off; else doubtful.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1).double(), torch.zeros(5).double(), 0.5)
        >>> judge_sbc(sbc(linear.as_vae(), simulations=100)).level
        'fine'
    """
    p, number = float(found.joint_p_value), found.attrs["simulations"]
    least = int(found.coverage.sel(level=0.9).values[:-1].argmin())
    worst = found.isel(quantity=int(found.p_value.values.argmin()))
    apart = float(abs(worst.ecdf_difference).max())
    large = float(found.coverage.sel(level=0.9)[least]) < HELD or apart > APART
    level: Level = "fine" if p >= DOUBTFUL else "bad" if p < BAD and large else "doubtful"
    why = (
        f"on data drawn from the model, not yours, {_held(found, least)}; the ranks of {worst.quantity.item()} are the "
        f"farthest from uniform, their ECDF by up to {apart:.2g}; {format_p(p)} for all {found.sizes['quantity']} "
        f"quantities in {number} simulations (doubtful below {DOUBTFUL}; bad below {BAD} with an interval that holds "
        f"less than {HELD:.0%} or an ECDF {APART} off)"
    )
    return Finding("calibration (SBC)", level, why, "" if level == "fine" else _advice(found))


def judge_reconstructions(found: xr.Dataset) -> Finding:
    """Do q's intervals hold the latents of data near the user's?

    Args:
        found: from :func:`sbc` with ``around``.

    Returns:
        By the mean over latents of the share that 90 % intervals hold: fine within 5 % of 90 %, bad below 80 % by more
        than 2 standard errors, else doubtful.

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1).double(), torch.zeros(5).double(), 0.5)
        >>> judge_reconstructions(sbc(linear.as_vae(), around=linear.sample(100))).level
        'fine'
    """
    wide = found.sel(level=0.9)
    held, error = float(wide.expected_coverage), float(wide.expected_coverage_se)
    level: Level = "bad" if held + 2 * error < HELD else "fine" if abs(held - 0.9) <= NEAR else "doubtful"
    why = f"on reconstructions of these data {_held(found, int(wide.coverage.values[:-1].argmin()))}"
    why += f" (fine within {100 * NEAR:.0f} % of 90 %, bad below {HELD:.0%}; {found.attrs['simulations']} simulations)"
    return Finding("coverage on reconstructions", level, why, "" if level == "fine" else _advice(found))


def _held(found: xr.Dataset, least: int) -> str:
    """The coverage of 90 % intervals: over all latents, and of the worst."""
    wide = found.sel(level=0.9)
    of_all = format_estimate(100 * float(wide.expected_coverage), 100 * float(wide.expected_coverage_se), "%", over="")
    told = f"90 % intervals hold the latents in {of_all} of the simulations"
    if found.sizes["quantity"] > 2:
        share, error = 100 * float(wide.coverage[least]), 100 * float(wide.coverage_se[least])
        told += f" (least of all {found.quantity.values[least]}, in {format_estimate(share, error, '%', over='')})"
    return told


def _advice(found: xr.Dataset) -> str:
    if level_of_latents(found) >= DOUBTFUL:
        return (
            "the latents' ranks alone are uniform, so q is too like the prior or misses correlations: take a "
            "posterior with correlations (FullNormal, Flow), or train on where the validation ELBO still rises"
        )
    wide = found.sel(level=0.9)
    worst = int(np.abs(wide.coverage.values[:-1] - 0.9).argmax())
    off = float(wide.coverage[worst] - 0.9)
    if abs(off) < 3 * float(wide.coverage_se[worst]):
        return (
            "the widths are about right, so q's means are off: make the encoder larger, or train on where the "
            "validation ELBO still rises"
        )
    kind = "narrow, or its means are off by much" if off < 0 else "wide"
    return (
        f"q of {found.quantity.values[worst]} is too {kind}: a richer posterior (FullNormal, Flow, Refined), or "
        "training on draws of the model too"
    )


def level_of_latents(found: xr.Dataset) -> float:
    """The joint p-value of the latents alone, which q = prior passes too.

    Example:
        >>> level_of_latents(xr.Dataset({"p_value": ("quantity", [0.5, 0.01, 1e-9])}))
        0.02
    """
    p = found.p_value.values[:-1]
    return float(min(1.0, len(p) * p.min()))
