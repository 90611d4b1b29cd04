"""Is q calibrated over the model's own data? Simulation-based calibration without a refit."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating, infer, masked, observed
from pyro_vae.core.device import numbers_at_once, refuse_seed, seeded
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.generate import latents, likelihood
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import as_tensor
from pyro_vae.diagnose import _ecdf
from pyro_vae.errors import DataError

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Of the central intervals whose coverage is counted."""

MISS = 0.05
"""How often the band of a quantity is left by an exact guide."""

DOUBTFUL, BAD = 0.05, 0.001
"""p-values below which a guide is called doubtful, and bad."""

LIKELIHOOD = "log p(x|z)"


@torch.no_grad()
@takes_settings
def sbc(
    vae: VAE,
    *,
    simulations: int = 500,
    draws: int = 99,
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

    Args:
        vae: a VAE.
        simulations: how many z and x are drawn, at least 20; what can be told grows as its square root.
        draws: L, draws from q for each, at least 9; the ranks have L + 1 values.
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
    with seeded(seed, device), evaluating(vae):
        given = _given(vae, context, mask, simulations)
        z = latents(vae, simulations, given.context)
        x = likelihood(vae, z, given.context).sample()
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
        {"simulations": simulations, "draws": draws, "seed": seed, **versions()}
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
    q = infer(vae.encoder, rows.x, rows.context, rows.mask)
    z = torch.cat([truth.unsqueeze(0), q.sample((draws,))])
    scored = likelihood(vae, z, rows.context)
    scored = scored if rows.mask is None else masked(scored, rows.mask)
    quantities = torch.cat([z.flatten(2), scored.log_prob(rows.x).unsqueeze(-1)], -1)
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
    thresholds = {"band_miss": MISS, "doubtful_below": DOUBTFUL, "bad_below": BAD}
    return xr.Dataset(found, coords, attrs=thresholds)


def judge_sbc(found: xr.Dataset) -> Finding:
    """Is the guide calibrated?

    Args:
        found: from :func:`sbc`.

    Returns:
        Fine where the joint p-value is at least 0.05, as it is for 95 % of the seeds or more if q is exact; bad where
        it is below 0.001; else doubtful.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1).double(), torch.zeros(5).double(), 0.5)
        >>> judge_sbc(sbc(linear.as_vae(), simulations=100)).level
        'fine'
    """
    p, number = float(found.joint_p_value), found.attrs["simulations"]
    level: Level = "fine" if p >= DOUBTFUL else "doubtful" if p >= BAD else "bad"
    worst = found.isel(quantity=int(found.p_value.values.argmin()))
    wide = found.sel(level=0.9)
    why = (
        f"{_shown(p)} that ranks of {found.sizes['quantity']} quantities in {number} simulations stray so far "
        f"(doubtful below {DOUBTFUL}, bad below {BAD}), the worst {worst.quantity.item()}, "
        f"{_shown(float(worst.p_value))}, ECDF off by up to {float(abs(worst.ecdf_difference).max()):.3f}; "
        f"90 % intervals of the latents hold {100 * float(wide.expected_coverage):.1f} ± "
        f"{100 * float(wide.expected_coverage_se):.1f} %"
    )
    return Finding("calibration (SBC)", level, why, "" if level == "fine" else _advice(found))


def _shown(p: float) -> str:
    return f"p = {p:.2g}" if p > 1e-99 else "p below 1e-99"


def _advice(found: xr.Dataset) -> str:
    if level_of_latents(found) >= DOUBTFUL:
        return (
            "the latents' ranks alone are uniform, so q is too like the prior or misses correlations: train the "
            "encoder longer, or take a posterior with correlations (FullNormal, Flow)"
        )
    wide = found.sel(level=0.9)
    worst = int(found.p_value.values[:-1].argmin())
    off = float(wide.coverage[worst] - 0.9)
    if abs(off) < 3 * float(wide.coverage_se[worst]):
        return "the widths are about right, so q's means are off: train the encoder longer or make it larger"
    kind = "narrow, or its means are off by much" if off < 0 else "wide"
    return (
        f"q of {found.quantity.values[worst]} is too {kind}: a richer posterior (FullNormal, Flow, Refined), or longer "
        "training on draws of the model"
    )


def level_of_latents(found: xr.Dataset) -> float:
    """The joint p-value of the latents alone, which q = prior passes too.

    Example:
        >>> level_of_latents(xr.Dataset({"p_value": ("quantity", [0.5, 0.01, 1e-9])}))
        0.02
    """
    p = found.p_value.values[:-1]
    return float(min(1.0, len(p) * p.min()))
