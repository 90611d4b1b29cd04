"""Which latents carry anything, and how much of the data is in them?"""

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
from pyro_vae.core.device import numbers_at_once, refuse_seed, seeded
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_rounded
from pyro_vae.core.pair import Pair
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.core.zuko import MEAN_DRAWS, FlowDistribution
from pyro_vae.data.rows import rows_for
from pyro_vae.diagnose.site_kl import judge_sites, site_kl
from pyro_vae.errors import DataError

ACTIVE = 0.01
"""Burda et al.'s variance over data of a latent's posterior mean, above which it is called active."""

Density: TypeAlias = Callable[[Tensor], Tensor]


@torch.no_grad()
@takes_settings
def collapse(vae: VAE | Pair, x: Any, *, draws: int = 4, seed: int = 0, chunk: int = 2**18) -> xr.Dataset:
    """The KL of each latent, which are active, and the ELBO surgery of the mean KL.

    .. math:: \\underbrace{\\frac1n \\sum_i KL(q(z|x_i) \\| p(z))}_{\\text{mean KL}} =
        \\underbrace{\\frac1n \\sum_i KL(q(z|x_i) \\| q(z))}_{\\text{mutual information, at most } \\log n} +
        \\underbrace{KL(q(z) \\| p(z))}_{\\text{marginal KL}}, \\qquad q(z) = \\frac1n \\sum_i q(z|x_i)

    A latent is active if its posterior mean varies over the data by more than 0.01 (for a prior that depends on a
    context: the mean less the prior's). Means of flows are known by draws; what variance these add is taken off. The
    aggregate q(z) is that of the given data, all of them: the time goes with
    n² × draws. A mutual information near log n says only that n data are told apart; give more of them then.

    All errors are Monte-Carlo errors for the given data; what has a closed form has the error 0. KLs of one latent
    are those of the marginals of q and p, where these are known (not for flows). Where the prior depends on a context
    there is no one p(z), and no surgery.

    Of a :class:`pyro_vae.Pair` with sites :math:`z_1, \\ldots, z_L` each has its part of the KL, and these add up:

    .. math:: E_q \\log q(z_l | z_{<l}, x_i) - \\log p(z_l | \\mathrm{parents})

    Where the guide draws the sites in the order of the model (top-down, as in a ladder), each is a mean KL of its own;
    else it can be negative.

    Args:
        vae: a VAE or a Pair.
        x: data, shape ``(datum, *features)``, at least 2, or :class:`~pyro_vae.data.Data` with context and mask.
        draws: from q for each datum, at least 2.
        seed: of all draws.
        chunk: about so many numbers at a time, on a GPU 64 times as many.

    Returns:
        A dataset. Over ``latent``: ``kl`` and ``kl_se``, the mean over data, ``kl_sd`` the spread over data;
        ``marginal_kl_of_latent`` and its error; ``mean_variance``, the variance over data of the posterior mean, with
        ``mean_variance_se`` as of a sample of so many data; ``active``, 0 or 1. Without a dimension: ``mean_kl``,
        ``mutual_information`` and ``marginal_kl`` with their errors ``…_se``, all of the same draws;
        ``mean_kl_se_over_data``, the standard error of the mean KL over data; ``residual``, by
        how much they fail to add up; ``closed_form_kl``, the mean KL where it has one (else NaN). All KLs in nats.
        Of a Pair, over ``site``: ``kl``, ``kl_se``, ``kl_sd``, and ``kl_of_datum``; ``mean_kl`` is their sum.

    Raises:
        DataError: if there is one datum only, or the data are not finite numbers in rows, or outside the support.
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
    refuse_seed(seed)
    if isinstance(vae, Pair):
        return site_kl(vae, x, draws=draws, seed=seed, chunk=chunk)
    rows = rows_for(vae, x).like(vae)
    if len(rows) < 2:
        raise DataError("there is one datum only; a spread over data takes at least 2")
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
    """What is said of each latent but for its marginal KL."""
    each = [_kl_of_latents(q, p, z) for q, p, z in zip(guides, priors, zs, strict=True)]
    kl, error = (torch.cat(parts).double() for parts in zip(*each, strict=True))
    shift = [0.0 if common else p.mean for p in priors]
    means = torch.cat([q.mean - s for q, s in zip(guides, shift, strict=True)]).double()
    square = (means - means.mean(0)) ** 2
    variance = (square.mean(0) - torch.cat([_noise_of_mean(q) for q in guides]).double().mean(0)).clamp(min=0)
    nats = {"units": "nats"}
    found = {
        "kl": (kl.mean(0), nats),
        "kl_se": ((error**2).sum(0).sqrt() / len(kl), nats),
        "kl_sd": (kl.std(0), nats),
        "mean_variance": (variance, {"units": "squared units of z"}),
        "mean_variance_se": (square.std(0) / math.sqrt(len(kl)), {"units": "squared units of z"}),
        "active": ((variance > ACTIVE).int(), {"units": "1 where active"}),
    }
    return {name: ("latent", value.cpu().numpy(), units) for name, (value, units) in found.items()}


def _noise_of_mean(q: Any) -> Tensor:
    """The variance that the means have by being those of draws, ``(datum, latent)``; 0 where they are exact."""
    return q.variance / MEAN_DRAWS if isinstance(q, FlowDistribution) else torch.zeros_like(q.mean)


def _kl_of_latents(q: Any, p: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """The KL of each latent's marginals, datum by datum, and its error, both ``(datum, latent)``; NaN if not known."""
    if (exact := _closed(q, p)) is not None:
        return exact, torch.zeros_like(exact)
    of_q, of_p = _density(q), _density(p)
    if of_q is None or of_p is None:
        nothing = torch.full_like(z[0], torch.nan)
        return nothing, nothing
    ratio = of_q(z) - of_p(z)
    return ratio.mean(0), ratio.std(0) / math.sqrt(len(z))


def _closed(q: Any, p: Any) -> Tensor | None:
    """The KL of each latent's marginals in closed form, where there is one."""
    of_q, of_p = _marginals(q), _marginals(p)
    if of_q is None or of_p is None:
        return None
    try:
        return torch.distributions.kl_divergence(of_q, of_p)
    except NotImplementedError:
        return None


def _marginals(d: Any) -> Any:
    """The distributions of each latent by itself, batch shape ``(…, latent)``, if they are of a known family."""
    if isinstance(d, Independent) and d.reinterpreted_batch_ndims == 1:
        return d.base_dist
    if isinstance(d, MultivariateNormal | LowRankMultivariateNormal):
        return dist.Normal(d.mean, d.stddev)
    return None


def _density(d: Any) -> Density | None:
    """The log-density of each latent by itself, from ``(…, latent)`` to ``(…, latent)``, where it is known."""
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
    """Mean KL, mutual information and marginal KL, and the marginal KL of each latent."""
    nats = {"units": "nats"}
    log_q = torch.cat([q.log_prob(z) for q, z in zip(guides, zs, strict=True)], 1).double()
    log_p = torch.cat([p.log_prob(z) for p, z in zip(priors, zs, strict=True)], 1).double()
    found = _named("mean_kl", log_q - log_p)
    of_datum = (log_q - log_p).mean(0)
    found["mean_kl_se_over_data"] = (), float(of_datum.std() / math.sqrt(len(of_datum))), nats
    found["closed_form_kl"] = ((), _whole_kl(guides, priors), nats)
    z = torch.cat(zs, 1)
    nothing = torch.full_like(log_q, torch.nan), torch.full_like(z.double(), torch.nan)
    joint, by_latent = _log_aggregate(guides, z, chunk) if common else nothing
    found |= _named("mutual_information", log_q - joint) | _named("marginal_kl", joint - log_p)
    of_p = _density(priors[0]) if common else None
    found |= _named("marginal_kl_of_latent", nothing[1] if of_p is None else by_latent - of_p(z).double())
    mean, information, marginal = (found[name][1] for name in ("mean_kl", "mutual_information", "marginal_kl"))
    return found | {"residual": ((), mean - information - marginal, nats)}


def _named(name: str, terms: Tensor) -> dict[str, Any]:
    """The mean of terms ``(draw, datum, …)`` with its error: draws of one datum are alike, data are given."""
    draws, number = terms.shape[:2]
    mean, error = terms.mean((0, 1)), (terms.var(0).sum(0) / draws).sqrt() / number
    dims, nats = ("latent",) * (terms.dim() - 2), {"units": "nats"}
    return {name: (dims, mean.cpu().numpy(), nats), f"{name}_se": (dims, error.cpu().numpy(), nats)}


def _whole_kl(guides: list[Any], priors: list[Any]) -> float:
    try:
        parts = [torch.distributions.kl_divergence(q, p) for q, p in zip(guides, priors, strict=True)]
    except NotImplementedError:
        return math.nan
    return float(torch.cat(parts).double().mean())


def _log_aggregate(guides: list[Any], z: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """``log 1/n Σ_i q(z|x_i)`` of draws ``(draw, datum, latent)``, and that of each latent by itself.

    The second is NaN where it is not known. Blocks of draws meet blocks of guides, so that no
    more than about ``chunk`` numbers are held.
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
    """``log Σ_i q_i(z)`` over the batch of q, for the whole z, ``(b,)``, and for each latent, ``(b, latent)``."""
    z = z.unsqueeze(1)
    density = _density(q)
    if density is None:
        return q.log_prob(z).double().logsumexp(1), torch.full_like(z[:, 0].double(), torch.nan)
    terms = density(z).double()
    joint = terms.sum(-1) if isinstance(q, Independent) else q.log_prob(z).double()
    return joint.logsumexp(1), terms.logsumexp(1)


def judge_collapse(found: xr.Dataset) -> Finding:
    """Do the latents carry anything?

    Args:
        found: from :func:`collapse`.

    Returns:
        Bad where no latent is active, doubtful where some are not, else fine; of a Pair doubtful where a site's part
        of the KL is below 0.01 nats.

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
                f"; so few data can show at most log n = {most:.2f} nats of mutual information, and show nearly that: "
                f"it is at least {information}, and KL(q(z)‖p(z)) at most {marginal}; more data would tell them apart"
            )
        else:
            why += f" = mutual information {information} (of at most log n = {most:.2f}) + KL(q(z)‖p(z)) {marginal}"
    return Finding("collapse of latents", level, why, "" if level == "fine" else NEXT[level])


def _over_data(found: xr.Dataset) -> str:
    """The standard error of the mean KL over data: how far that of other data may lie."""
    error = float(found.mean_kl_se_over_data)
    return f" (standard error over data {format_rounded(error, error)})"


def _pm(found: xr.Dataset, name: str) -> str:
    return format_estimate(float(found[name]), float(found[f"{name}_se"]), "nats", over="draws")


NEXT = {
    "doubtful": (
        "harmless if the data need no more latents (fewer then give the same bound); otherwise pv.elbo.FreeBits, a KL "
        "whose weight grows from 0 (pv.elbo.Beta), or a smaller noise scale"
    ),
    "bad": (
        "the decoder does without z: a smaller (or learned) noise scale, pv.elbo.FreeBits, a KL whose weight grows "
        "from 0 (pv.elbo.Beta), or a decoder with less room"
    ),
}
