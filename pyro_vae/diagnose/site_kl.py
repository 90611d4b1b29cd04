"""Split the KL of a model with several latents into the parts of its sites."""

import math
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import numbers_at_once, seeded
from pyro_vae.core.finding import Finding
from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.data.rows import rows_for
from pyro_vae.elbo.log_weights import weigh, without_enumeration

UNUSED = 0.01
"""A site is unused if its part of the KL is below this number of nats."""


@torch.no_grad()
def site_kl(pair: Amortized, x: Any, *, draws: int, seed: int, chunk: int) -> xr.Dataset:
    """Estimate the KL of each site from draws of the guide.

    Args:
        pair: a model and its guide.
        x: data, shape ``(datum, *features)``.
        draws: draws from the guide per datum, at least 2.
        seed: seed of all draws.
        chunk: approximate number of array elements to process at once.

    Returns:
        The dataset that :func:`collapse` describes.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> site_kl(pv.Pair(vae.model, vae.guide), torch.ones(3, 5), draws=4, seed=0, chunk=100).site.values.tolist()
        ['z']
    """
    rows = rows_for(pair, x).like(pair)
    size = max(1, numbers_at_once(chunk, rows.x.device) // (draws * rows.x[0].numel()))
    with seeded(seed, rows.x.device), evaluating(pair, draws * min(size, len(rows))):
        parts = [_terms(pair, part, draws) for part in rows.split(size)]
    terms = {name: torch.cat([part[name] for part in parts], 1).double() for name in parts[0]}
    every = torch.stack(list(terms.values()))  # (site, draw, datum)
    errors = every.var(1).mean(-1).div(draws * len(rows)).sqrt()
    total = every.sum(0)
    variables = {
        "kl": ("site", every.mean((1, 2)).cpu().numpy()),
        "kl_se": ("site", errors.cpu().numpy()),
        "kl_sd": ("site", every.mean(1).std(-1).cpu().numpy()),
        "kl_of_datum": (("site", "datum"), every.mean(1).cpu().numpy()),
        "mean_kl": float(total.mean()),
        "mean_kl_se": float(total.var(0).mean().div(draws * len(rows)).sqrt()),
        "mean_kl_se_over_data": float(total.mean(0).std()) / math.sqrt(len(rows)),
    }
    nats = {"units": "nats"}
    return xr.Dataset(
        {name: (*value, nats) if isinstance(value, tuple) else ((), value, nats) for name, value in variables.items()},
        {"site": list(terms)},
        {"data": len(rows), "draws": draws, "seed": seed, "unused_below": UNUSED, **versions()},
    )


def _terms(pair: Amortized, rows: Rows, draws: int) -> dict[str, Tensor]:
    """Compute log q - log p of each site, shape ``(draw, datum)``."""
    w = weigh(pair.model, without_enumeration(pair.guide), *rows.arguments(), num_particles=draws)
    w.refuse()
    sites = {name: (w.guide_trace.nodes[name], w.model_trace.nodes[name]) for name in w.latents}
    return {
        name: w.by_datum(q["fn"].log_prob(q["value"]) - p["fn"].log_prob(q["value"])) for name, (q, p) in sites.items()
    }


def judge_sites(found: xr.Dataset) -> Finding:
    """Judge whether the guide uses each latent site.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> judge_sites(pv.diagnose.collapse(pv.Pair(vae.model, vae.guide), torch.ones(3, 5))).level
        'fine'
    """
    unused = [str(s) for s, kl in zip(found.site.values, found.kl.values, strict=True) if abs(kl) < UNUSED]
    parts = ", ".join(
        f"{site} {format_estimate(float(kl), float(error), over='')}"
        for site, kl, error in zip(found.site.values, found.kl.values, found.kl_se.values, strict=True)
    )
    why = f"the KL of each site is {parts} nats (± standard errors over draws)"
    advice = "warm up the KL (elbo.Beta with elbo.Linear), or draw the sites of the guide top-down, as in a ladder VAE"
    return Finding("latent sites", "doubtful" if unused else "fine", why, advice if unused else "")
