"""Detect posterior collapse: the active latents, and the information in them."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MixtureSameFamily, MultivariateNormal

from pyro_vae.__about__ import versions
from pyro_vae.core.compatibility import called
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import numbers_at_once, seeded, validate_seed
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_rounded
from pyro_vae.core.pair import Amortized
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.core.zuko import MEAN_DRAWS, FlowDistribution
from pyro_vae.data.rows import rows_for
from pyro_vae.diagnose.site_kl import judge_sites, site_kl
from pyro_vae.errors import DataError

ACTIVE = 0.01
"""A latent is active if the variance of its posterior mean over data is larger (Burda et al.)."""

Density: TypeAlias = Callable[[Tensor], Tensor]


@torch.no_grad()
@takes_settings
def collapse(vae: Amortized, x: Any, *, draws: int = 4, seed: int = 0, chunk: int = 2**18) -> xr.Dataset:
    """Compute the KL of each latent, the active latents, and the ELBO surgery of the mean KL.

    .. math:: \\underbrace{\\frac1n \\sum_i KL(q(z|x_i) \\| p(z))}_{\\text{mean KL}} =
        \\underbrace{\\frac1n \\sum_i KL(q(z|x_i) \\| q(z))}_{\\text{mutual information, at most } \\log n} +
        \\underbrace{KL(q(z) \\| p(z))}_{\\text{marginal KL}}, \\qquad q(z) = \\frac1n \\sum_i q(z|x_i)

    A latent is active if the variance of its posterior mean over the data is above 0.01 (for a prior that depends on a
    context, the variance of the difference from the prior mean). For flows, the mean is estimated from draws, and their
    variance is subtracted. The aggregate q(z) is that of all given data, so that the time grows with
    n² × draws. If the mutual information is close to log n, it is only a lower bound; pass more data then.

    All errors are Monte-Carlo errors for the given data; closed forms have the error 0. The KL of one latent is that of
    the marginals of q and p, if these are known (not for flows). If the prior depends on a context, there is no single
    p(z), and no surgery.

    For a :class:`pyro_vae.Pair` with sites :math:`z_1, \\ldots, z_L`, the KL is the sum of one part per site:

    .. math:: E_q \\log q(z_l | z_{<l}, x_i) - \\log p(z_l | \\mathrm{parents})

    If the guide draws the sites in the order of the model (top-down, as in a ladder), each part is a mean KL; otherwise
    a part can be negative.

    Args:
        vae: a VAE or a Pair.
        x: data, shape ``(datum, *features)``, at least 2, or :class:`~pyro_vae.data.Data` with context and mask.
        draws: the number of draws from q for each datum, at least 2.
        seed: of all draws.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU).

    Returns:
        A dataset. Over ``latent``: ``kl`` and ``kl_se``, the mean over data, and ``kl_sd``, the standard deviation over
        data; ``marginal_kl_of_latent`` and its error; ``mean_variance``, the variance over data of the posterior mean,
        with ``mean_variance_se``, its standard error over data; ``active``, 0 or 1. Without a dimension: ``mean_kl``,
        ``mutual_information`` and ``marginal_kl`` with their errors ``…_se``, all from the same draws;
        ``mean_kl_se_over_data``, the standard error of the mean KL over data; ``residual``, the difference between both
        sides of the equation; ``closed_form_kl``, the mean KL in closed form, or NaN. All KLs are in nats.
        For a Pair, over ``site``: ``kl``, ``kl_se``, ``kl_sd``, and ``kl_of_datum``; ``mean_kl`` is their sum.

    Raises:
        DataError: if there is only one datum, or the data are not finite numbers in rows, or outside the support.
        ModelError: if the VAE does not fit the data.
        SettingsError: if ``draws`` is below 2.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        | ELBO Surgery (Hoffman & Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        | Don't Blame the ELBO! (Lucas et al., 2019), https://arxiv.org/abs/1911.02469

    Example:
        >>> import pyro_vae as pv
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> linear = pv.exact.LinearGaussian(weight, torch.zeros(3), 0.5)
        >>> _ = torch.manual_seed(0)
        >>> found = collapse(linear.as_vae(diagonal=True), linear.sample(50))
        >>> found.active.values.tolist(), bool(abs(found.residual) < 1e-10)
        ([1, 0], True)
    """
    whole("draws", draws, 2)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    if not isinstance(vae, VAE):
        return site_kl(vae, x, draws=draws, seed=seed, chunk=chunk)
    rows = rows_for(vae, x).like(vae)
    if len(rows) < 2:
        raise DataError("there is only one datum; pass at least 2, for a spread over data")
    chunk = numbers_at_once(chunk, rows.x.device)
    parts = list(rows.split(max(1, chunk // rows.x[0].numel())))
    with seeded(seed, rows.x.device), evaluating(vae, draws * len(parts[0])):
        guides = [vae.posterior(part) for part in parts]
        priors = [called("prior", vae.prior, *part.given) for part in parts]
        common = not priors[0].batch_shape
        zs = [q.sample((draws,)) for q in guides]
        found = _latents(guides, priors, zs, common)
        found |= _surgery(guides, priors, zs, chunk, common)
    coords = {"latent": range(found["kl"][1].shape[0])}
    attrs = {"active_above": ACTIVE, "most_information": math.log(len(rows)), "data": len(rows), "draws": draws}
    kinds = {"common_prior": int(common), "kl_of_latent": _kind(guides[0], priors[0]), "seed": seed}
    return xr.Dataset(found, coords, attrs=attrs | kinds | versions())


def _latents(guides: list[Any], priors: list[Any], zs: list[Tensor], common: bool) -> dict[str, Any]:
    """Compute the variables over latents, except for the marginal KL."""
    each = [_kl_of_latents(q, p, z) for q, p, z in zip(guides, priors, zs, strict=True)]
    kl, error = (torch.cat(parts).double() for parts in zip(*each, strict=True))
    shift = [0.0 if common else p.mean for p in priors]
    means = torch.cat([q.mean - s for q, s in zip(guides, shift, strict=True)]).double()
    square = (means - means.mean(0)) ** 2
    variance = (square.mean(0) - torch.cat([_variance_of_mean(q) for q in guides]).double().mean(0)).clamp(min=0)
    nats = {"units": "nats"}
    found = {
        "kl": (kl.mean(0), nats),
        "kl_se": ((error**2).sum(0).sqrt() / len(kl), nats),
        "kl_sd": (kl.std(0), nats),
        "mean_variance": (variance, {"units": "squared units of z"}),
        "mean_variance_se": (square.std(0) / math.sqrt(len(kl)), {"units": "squared units of z"}),
        "active": ((variance > ACTIVE).int(), {"units": "1 if active"}),
    }
    return {name: ("latent", value.cpu().numpy(), units) for name, (value, units) in found.items()}


def _variance_of_mean(q: Any) -> Tensor:
    """Return the Monte-Carlo variance of the posterior means, ``(datum, latent)``; 0 if they are exact."""
    return q.variance / MEAN_DRAWS if isinstance(q, FlowDistribution) else torch.zeros_like(q.mean)


def _kl_of_latents(q: Any, p: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL of each latent's marginals for each datum, and its error, ``(datum, latent)``; NaN if unknown."""
    if (exact := _closed(q, p)) is not None:
        return exact, torch.zeros_like(exact)
    of_q, of_p = _density(q), _density(p)
    if of_q is None or of_p is None:
        unknown = torch.full_like(z[0], torch.nan)
        return unknown, unknown
    ratio = of_q(z) - of_p(z)
    return ratio.mean(0), ratio.std(0) / math.sqrt(len(z))


def _closed(q: Any, p: Any) -> Tensor | None:
    """Return the KL of each latent's marginals in closed form, or None."""
    of_q, of_p = _marginals(q), _marginals(p)
    if of_q is None or of_p is None:
        return None
    try:
        return torch.distributions.kl_divergence(of_q, of_p)
    except NotImplementedError:
        return None


def _marginals(d: Any) -> Any:
    """Return the marginal distributions of the latents, batch shape ``(…, latent)``, or None if unknown."""
    if isinstance(d, Independent) and d.reinterpreted_batch_ndims == 1:
        return d.base_dist
    if isinstance(d, MultivariateNormal | LowRankMultivariateNormal):
        return dist.Normal(d.mean, d.stddev)
    return None


def _density(d: Any) -> Density | None:
    """Return the marginal log-density of the latents, from ``(…, latent)`` to ``(…, latent)``, or None if unknown."""
    if isinstance(d, MixtureSameFamily):
        weights, part = d.mixture_distribution.logits.log_softmax(-1).unsqueeze(-1), _density(d.component_distribution)
        return None if part is None else lambda z: (part(z.unsqueeze(-2)) + weights).logsumexp(-2)
    known = _marginals(d)
    return None if known is None else known.log_prob


def _kind(q: Any, p: Any) -> str:
    if _closed(q, p) is not None:
        return "closed form"
    return "not known" if _density(q) is None or _density(p) is None else "Monte Carlo"


def _surgery(guides: list[Any], priors: list[Any], zs: list[Tensor], chunk: int, common: bool) -> dict[str, Any]:
    """Compute the mean KL, the mutual information and the marginal KL, and the marginal KL of each latent."""
    nats = {"units": "nats"}
    log_q = torch.cat([q.log_prob(z) for q, z in zip(guides, zs, strict=True)], 1).double()
    log_p = torch.cat([p.log_prob(z) for p, z in zip(priors, zs, strict=True)], 1).double()
    found = _estimate("mean_kl", log_q - log_p)
    of_datum = (log_q - log_p).mean(0)
    found["mean_kl_se_over_data"] = (), float(of_datum.std() / math.sqrt(len(of_datum))), nats
    found["closed_form_kl"] = ((), _closed_form_kl(guides, priors), nats)
    z = torch.cat(zs, 1)
    unknown = torch.full_like(log_q, torch.nan), torch.full_like(z.double(), torch.nan)
    joint, by_latent = _log_aggregate(guides, z, chunk) if common else unknown
    found |= _estimate("mutual_information", log_q - joint) | _estimate("marginal_kl", joint - log_p)
    of_p = _density(priors[0]) if common else None
    found |= _estimate("marginal_kl_of_latent", unknown[1] if of_p is None else by_latent - of_p(z).double())
    mean, information, marginal = (found[name][1] for name in ("mean_kl", "mutual_information", "marginal_kl"))
    return found | {"residual": ((), mean - information - marginal, nats)}


def _estimate(name: str, terms: Tensor) -> dict[str, Any]:
    """Return the mean of terms ``(draw, datum, …)`` with its standard error over draws, for the given data."""
    draws, number = terms.shape[:2]
    mean, error = terms.mean((0, 1)), (terms.var(0).sum(0) / draws).sqrt() / number
    dims, nats = ("latent",) * (terms.dim() - 2), {"units": "nats"}
    return {name: (dims, mean.cpu().numpy(), nats), f"{name}_se": (dims, error.cpu().numpy(), nats)}


def _closed_form_kl(guides: list[Any], priors: list[Any]) -> float:
    try:
        parts = [torch.distributions.kl_divergence(q, p) for q, p in zip(guides, priors, strict=True)]
    except NotImplementedError:
        return math.nan
    return float(torch.cat(parts).double().mean())


def _log_aggregate(guides: list[Any], z: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return ``log 1/n Σ_i q(z|x_i)`` of draws ``(draw, datum, latent)``, and that of the marginals of the latents.

    The second is NaN if unknown. Blocks of draws are combined with blocks of guides, so that at most about ``chunk``
    values are in memory.
    """
    number = sum(q.batch_shape[0] for q in guides)
    largest = max(q.batch_shape[0] for q in guides)
    blocks = z.flatten(0, 1).split(max(1, chunk // (largest * z.shape[-1])))
    found = [[_block(q, block) for q in guides] for block in blocks]
    joint, by_latent = (
        torch.cat([torch.stack([pair[i] for pair in pairs]).logsumexp(0) for pairs in found]) - math.log(number)
        for i in (0, 1)
    )
    return joint.reshape(z.shape[:-1]), by_latent.reshape(z.shape)


def _block(q: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log Σ_i q_i(z)`` over the batch of q, for z, ``(b,)``, and for each latent, ``(b, latent)``."""
    z = z.unsqueeze(1)
    density = _density(q)
    if density is None:
        return q.log_prob(z).double().logsumexp(1), torch.full_like(z[:, 0].double(), torch.nan)
    terms = density(z).double()
    joint = terms.sum(-1) if isinstance(q, Independent) else q.log_prob(z).double()
    return joint.logsumexp(1), terms.logsumexp(1)


def judge_collapse(found: xr.Dataset) -> Finding:
    """Judge whether the latents have collapsed to the prior.

    Args:
        found: from :func:`collapse`.

    Returns:
        Bad if no latent is active, doubtful if some are not, else fine; for a Pair, doubtful if the part of a site is
        below 0.01 nats.

    Example:
        >>> import pyro_vae as pv
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> linear = pv.exact.LinearGaussian(weight, torch.zeros(3), 0.5)
        >>> judge_collapse(collapse(linear.as_vae(diagonal=True), linear.sample(50))).level
        'doubtful'
    """
    if "site" in found.dims:
        return judge_sites(found)
    active, latents = int(found.active.sum()), found.sizes["latent"]
    level: Level = "bad" if active == 0 else "doubtful" if active < latents else "fine"
    why = (
        f"{active} of {latents} latents are active (variance of the posterior mean above {ACTIVE}, over "
        f"{found.attrs['data']} data); mean KL {_pm(found, 'mean_kl')}"
        f"{_over_data(found)}"
    )
    if found.attrs["common_prior"]:
        most = found.attrs["most_information"]
        information, marginal = _pm(found, "mutual_information"), _pm(found, "marginal_kl")
        if float(found.mutual_information) > 0.9 * most:
            why += (
                f"; the mutual information is at least {information}, close to log n = {most:.2f} nats, the largest "
                f"value for this number of data, and KL(q(z)‖p(z)) at most {marginal}; more data would separate them"
            )
        else:
            why += f" = mutual information {information} (of at most log n = {most:.2f}) + KL(q(z)‖p(z)) {marginal}"
    return Finding("collapse of latents", level, why, "" if level == "fine" else NEXT[level])


def _over_data(found: xr.Dataset) -> str:
    """Describe the standard error of the mean KL over data, which applies to other data."""
    error = float(found.mean_kl_se_over_data)
    return f" (standard error over data {format_rounded(error, error)})"


def _pm(found: xr.Dataset, name: str) -> str:
    return format_estimate(float(found[name]), float(found[f"{name}_se"]), "nats", over="draws")


NEXT = {
    "doubtful": (
        "harmless if the data need no more latents (fewer latents then give the same bound); otherwise use "
        "pv.elbo.FreeBits, a KL whose weight grows from 0 (pv.elbo.Beta), or a smaller noise scale"
    ),
    "bad": (
        "the decoder ignores z: use a smaller (or learned) noise scale, pv.elbo.FreeBits, a KL whose weight grows "
        "from 0 (pv.elbo.Beta), or a smaller decoder"
    ),
}
