"""Simulation-based calibration of q, on data from the model or on reconstructions of the user's data."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating, observed
from pyro_vae.core.device import numbers_at_once, seeded, validate_seed
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_p
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import context_like, context_numbers, rows_for
from pyro_vae.data.values import as_tensor
from pyro_vae.diagnose import _ecdf
from pyro_vae.errors import DataError

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The levels of the central intervals whose coverage is estimated."""

MISS = 0.05
"""The probability that the ECDF of an exact guide leaves the band of a quantity."""

DOUBTFUL, BAD = 0.05, 0.001
"""The p-values below which a guide is doubtful, and, if the effect is large too, bad."""

HELD, APART = 0.8, 0.25
"""A large effect: 90 % intervals with a coverage below HELD, or an ECDF of ranks APART or more from uniform."""

NEAR = 0.05
"""On reconstructions, 90 % intervals are fine if their coverage differs from 90 % by less."""

LIKELIHOOD = "log p(x|z)"


@torch.no_grad()
@takes_settings
def sbc(
    vae: Amortized,
    *,
    simulations: int = 500,
    draws: int = 99,
    around: Any = None,
    context: Any = None,
    mask: Any = None,
    seed: int = 0,
    chunk: int = 2**20,
) -> xr.Dataset:
    """Run simulation-based calibration of the guide, and estimate the coverage of its intervals.

    .. math:: z \\sim p(z), \\; x \\sim p(x | z), \\; z_l \\sim q(z | x): \\quad
        \\mathrm{rank} \\, t(z, x) = \\#\\{l : t(z_l, x) < t(z, x)\\} \\sim U\\{0, …, L\\}

    If q is the posterior, the rank of any quantity t is uniform. The quantities are each latent, and the
    log-likelihood log p(x|z): the ranks of latents alone are uniform for q = prior too, which ignores x.
    The guide is amortized, so that nothing is fitted again. Ties are ranked at random.

    The test uses the ECDF of each quantity's ranks: the smallest of its binomial tails is compared with its
    distribution for uniform ranks, which yields a p-value and a band that the ECDF of an exact guide leaves with
    probability 0.05.

    The result holds for data from the model. If these differ from the user's data, it says nothing about q(z|x) of the
    user's data; k̂ and the inference gaps do. With ``around``, z is drawn from q(z|x_i) of the user's data instead of
    the prior, and x is a reconstruction, close to the user's data. These ranks are uniform only if q is exact and the
    mixture of q(z|x_i) over the data is the prior, so use the coverage, not the p-value.

    Args:
        vae: a VAE, or a :class:`pyro_vae.Pair` that was trained or has checked data. The quantities of a Pair are the
            components of each site, and the log-likelihood is that of the site observed as x.
        simulations: the number of pairs (z, x), at least 20; the errors fall as its square root.
        draws: L, the number of draws from q for each pair, at least 9; the ranks have L + 1 values.
        around: data to reconstruct, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and
            mask; each simulation uses a random row.
        context: the contexts of a conditional VAE, shape ``(datum, c)``; each simulation uses a random row.
        mask: true where a value is observed, shape ``(datum, *features)``; each simulation uses a random row, the same
            as for the context. Values must be missing independently of the values themselves.
        seed: of all draws.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU).

    Returns:
        A dataset of ``rank`` over ``simulation`` and ``quantity``; ``p_value`` and ``p_value_se`` over ``quantity``,
        and ``joint_p_value``, the smallest p-value times the number of quantities; ``ecdf_difference``, ``band_low``
        and ``band_high`` over ``quantile``, the ECDF of the ranks minus that of uniform ranks, and its band;
        ``coverage`` and ``coverage_se`` over ``level``, the share of simulations in which the central interval of q
        contains the quantity, and ``expected_coverage`` and ``expected_coverage_se``, the mean over latents. These
        errors are those of a Beta distribution with one more hit and one more miss, so that a share of 0 or 1 has an
        error too.

    Raises:
        DataError: if contexts or masks have the wrong type or shape.
        ModelError: if the components of the VAE do not fit each other; for a Pair, if its model uses the values of x
            other than as ``obs=x``, or has a latent outside the plate over data.
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
    validate_seed(seed)
    device, parts = vae.like(torch.zeros(())).device, []
    with seeded(seed, device), evaluating(vae, draws * simulations):
        if around is None:
            given = _sample_contexts(vae, context, mask, simulations)
            z = vae.draw_latents(given)
        else:
            rows = rows_for(vae, around, context=context, mask=mask).like(vae)
            given = rows.take(torch.randint(len(rows), (simulations,), device=device))
            vae.validate_draws(given)
            z = vae.posterior(given).sample()
        x = vae.likelihood(z, Rows(given.x, given.context)).sample()
        if given.mask is not None and given.mask.shape != x.shape:
            raise DataError(
                f"mask has shape {tuple(given.mask.shape[1:])} per datum, but the model's data {tuple(x.shape[1:])}"
            )
        vae.check(x, given.context)
        rows = Rows(observed(x, given.mask), given.context, given.mask)
        size = max(1, numbers_at_once(chunk, device) // (draws * x[0].numel()))
        for part, truth in zip(rows.split(size), z.split(size), strict=True):
            parts.append(_ranks(vae, part, truth, draws))
        ranks, names = torch.cat(parts), vae.latent_names(given.take(slice(1)))
        within = torch.rand(ranks.shape).numpy()
    return _summary(ranks.cpu().numpy(), within, draws, names).assign_attrs(
        {"simulations": simulations, "draws": draws, "seed": seed, "latents": "prior" if around is None else "data"}
        | versions()
    )


def _sample_contexts(vae: Amortized, context: Any, mask: Any, number: int) -> Rows:
    """Sample a context and a mask for each simulation, both from the same row, with stand-ins for x."""
    x = vae.stand_in(number)
    if context is None and mask is None:
        return Rows(x)
    context = None if context is None else _numbers_of(vae, context)
    device = vae.like(torch.zeros(())).device
    mask = None if mask is None else torch.as_tensor(mask, device=device)
    if mask is not None and (mask.dtype != torch.bool or mask.dim() < 2):
        raise DataError(f"mask has type {mask.dtype} and shape {tuple(mask.shape)}; pass booleans, one row per datum")
    if context is not None and mask is not None and len(context) != len(mask):
        raise DataError(f"there are {len(context)} contexts and {len(mask)} masks; pass one of each per datum")
    known = mask if context is None else context
    if mask is not None and not mask.numel():
        raise DataError(f"mask has shape {tuple(mask.shape)}; pass at least one row and one feature")
    index = torch.randint(len(known), (number,), device=device)
    return Rows(x, *(None if value is None else value[index] for value in (context, mask)))


def _numbers_of(vae: Amortized, context: Any) -> Tensor:
    """Return the numbers of a context; a table is matched by name to the context columns of the training data."""
    named = context_like(getattr(vae, "trained_on", None), context)
    return vae.like(as_tensor(context_numbers(named), source="context"))


def _ranks(vae: Amortized, rows: Rows, truth: Tensor, draws: int) -> Tensor:
    """Rank each quantity among the draws of q, shape ``(datum, quantity)``."""
    q = vae.posterior(rows)
    z = torch.cat([truth.unsqueeze(0), q.sample((draws,))])
    scores = vae.likelihood(z, rows).log_prob(rows.x)
    quantities = torch.cat([z.flatten(2), scores.unsqueeze(-1)], -1)
    true, drawn = quantities[0], quantities[1:]
    below, equal = (drawn < true).sum(0), (drawn == true).sum(0)
    return below + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long().clamp(max=draws)


def _summary(ranks: np.ndarray, within: np.ndarray, draws: int, latents: list[str]) -> xr.Dataset:
    number, quantities = ranks.shape
    counts = _ecdf.counts_below(ranks, draws + 1)
    p, error = np.array([_ecdf.p_value(column, number) for column in counts.T]).T
    quantile = np.arange(1, draws + 1) / (draws + 1)
    low, high = _ecdf.band(number, draws + 1, MISS)
    share = {"units": "share of the simulations"}
    places = (ranks + within) / (draws + 1)  # uniform on [0, 1] if the ranks are uniform
    inside = np.abs(places[..., None] - 0.5) <= np.array(LEVELS) / 2
    coverage, latent = inside.mean(0), inside[:, :-1].mean(1)
    # One more hit and one more miss, so that a coverage of 0 or 1 has an error too.
    with_two = np.concatenate([latent, [np.zeros(len(LEVELS)), np.ones(len(LEVELS))]])
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
    coords = {
        "simulation": range(number),
        "quantity": [*latents, LIKELIHOOD],
        "quantile": quantile,
        "level": list(LEVELS),
    }
    thresholds = {"band_miss": MISS, "doubtful_below": DOUBTFUL, "bad_below": BAD, "held": HELD, "apart": APART}
    return xr.Dataset(found, coords, attrs=thresholds)


def judge_sbc(found: xr.Dataset) -> Finding:
    """Judge whether the guide is calibrated on data from the model.

    With enough simulations, the p-value is small for any deviation, so it only shows that there is one. Its severity is
    the effect: the coverage of 90 % intervals, and the distance of the ECDF of the ranks from uniform.

    Args:
        found: from :func:`sbc`.

    Returns:
        Fine if the joint p-value is at least 0.05 (if q is exact, for at least 95 % of the seeds); bad if it is below
        0.001 and the coverage of 90 % intervals of a latent is below 80 %, or the ECDF of a quantity is more than 0.25
        from uniform; else doubtful.

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
        f"on data from the model, not yours, {_coverage(found, least)}; the ranks of {worst.quantity.item()} are the "
        f"farthest from uniform, with a distance of up to {apart:.2g} of their ECDF; {format_p(p)} for all "
        f"{found.sizes['quantity']} quantities in {number} simulations (doubtful below {DOUBTFUL}; bad below {BAD} if "
        f"a coverage is below {HELD:.0%} or an ECDF more than {APART} from uniform)"
    )
    return Finding("calibration (SBC)", level, why, "" if level == "fine" else _advice(found))


def judge_reconstructions(found: xr.Dataset) -> Finding:
    """Judge whether q's intervals contain the latents of reconstructions of the user's data.

    Args:
        found: from :func:`sbc` with ``around``.

    Returns:
        By the mean over latents of the coverage of 90 % intervals: fine within 5 % of 90 %, bad below 80 % by more
        than 2 standard errors, else doubtful.

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1).double(), torch.zeros(5).double(), 0.5)
        >>> judge_reconstructions(sbc(linear.as_vae(), around=linear.sample(100))).level
        'fine'
    """
    wide = found.sel(level=0.9)
    mean, error = float(wide.expected_coverage), float(wide.expected_coverage_se)
    level: Level = "bad" if mean + 2 * error < HELD else "fine" if abs(mean - 0.9) <= NEAR else "doubtful"
    why = f"on reconstructions of these data, {_coverage(found, int(wide.coverage.values[:-1].argmin()))}"
    why += f" (fine within {100 * NEAR:.0f} % of 90 %, bad below {HELD:.0%}; {found.attrs['simulations']} simulations)"
    return Finding("coverage on reconstructions", level, why, "" if level == "fine" else _advice(found))


def _coverage(found: xr.Dataset, least: int) -> str:
    """Describe the coverage of 90 % intervals: the mean over latents, and that of the worst latent."""
    wide = found.sel(level=0.9)
    mean = format_estimate(100 * float(wide.expected_coverage), 100 * float(wide.expected_coverage_se), "%", over="")
    text = f"90 % intervals contain the latents in {mean} of the simulations"
    if found.sizes["quantity"] > 2:
        share, error = 100 * float(wide.coverage[least]), 100 * float(wide.coverage_se[least])
        text += f" (worst: {found.quantity.values[least]}, in {format_estimate(share, error, '%', over='')})"
    return text


def _advice(found: xr.Dataset) -> str:
    if level_of_latents(found) >= DOUBTFUL:
        return (
            "the ranks of the latents are uniform, so q is too close to the prior or misses correlations: use a "
            "posterior with correlations (FullNormal, Flow), or train longer if the validation ELBO still rises"
        )
    wide = found.sel(level=0.9)
    worst = int(np.abs(wide.coverage.values[:-1] - 0.9).argmax())
    off = float(wide.coverage[worst] - 0.9)
    if abs(off) < 3 * float(wide.coverage_se[worst]):
        return (
            "the widths of q are about right, so its means are off: use a larger encoder, or train longer if the "
            "validation ELBO still rises"
        )
    kind = "narrow, or its means are far off" if off < 0 else "wide"
    return (
        f"q of {found.quantity.values[worst]} is too {kind}: use a richer posterior (FullNormal, Flow, Refined), or "
        "train on draws from the model too"
    )


def level_of_latents(found: xr.Dataset) -> float:
    """Return the joint p-value of the latents alone, which is large for q = prior too.

    Example:
        >>> level_of_latents(xr.Dataset({"p_value": ("quantity", [0.5, 0.01, 1e-9])}))
        0.02
    """
    p = found.p_value.values[:-1]
    return float(min(1.0, len(p) * p.min()))
