"""Kullback-Leibler divergences of latent sites in closed form."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import (
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
    register_kl,
)

from pyro_vae.core.traces import Program, Site, samples, traces
from pyro_vae.errors import ModelError


@register_kl(LowRankMultivariateNormal, Independent)
@register_kl(MultivariateNormal, Independent)
def _kl_from_independent(q: Any, p: Any) -> Tensor:
    """KL(q ‖ p) of a correlated normal from independent normals, such as N(0, I), or Laplaces, in nats.

    .. math:: KL = -H[q] - \\sum_j E_{q_j} \\log p_j(z_j)

    The expectation is a sum over features, so it depends on q only through its means and variances. Pyro lacks this KL.
    """
    expected = next((function for kind, function in _EXPECTED.items() if isinstance(p.base_dist, kind)), None)
    if expected is None or p.reinterpreted_batch_ndims != 1 or p.event_shape != q.event_shape:
        raise NotImplementedError
    return -q.entropy() - expected(q, p.base_dist).sum(-1)


def _under_normal(q: Any, p: Any) -> Tensor:
    """E log p(z) of each feature, for z drawn from q and a normal p."""
    return p.log_prob(q.mean) - 0.5 * q.variance / p.variance


def _under_laplace(q: Any, p: Any) -> Tensor:
    """E log p(z) of each feature, for z drawn from q and a Laplace p: E|z - m| = s √(2/π) e^(-t²) + (μ - m) erf(t)."""
    difference, scale = q.mean - p.loc, q.variance.sqrt()
    t = difference / (math.sqrt(2) * scale)
    distance = scale * math.sqrt(2 / math.pi) * torch.exp(-(t**2)) + difference * torch.erf(t)
    return -torch.log(2 * p.scale) - distance / p.scale


_EXPECTED: dict[type, Callable[[Any, Any], Tensor]] = {Normal: _under_normal, Laplace: _under_laplace}


@register_kl(Independent, LowRankMultivariateNormal)
def _kl_from_low_rank(q: Any, p: Any) -> Tensor:
    """KL(q ‖ p) of independent normals from a low-rank normal; q is converted to a low-rank normal with W = 0."""
    applies = isinstance(q.base_dist, Normal) and q.reinterpreted_batch_ndims == 1 and p.event_shape == q.event_shape
    if not applies:
        raise NotImplementedError
    factor = torch.zeros_like(q.mean).unsqueeze(-1)
    return kl_divergence(LowRankMultivariateNormal(q.mean, factor, q.variance, validate_args=False), p)


def kl_provenance(model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Report for each latent site whether its KL has a closed form or is sampled.

    Pyro's ``TraceMeanField_ELBO`` samples a KL without a closed form silently. Importing this library registers
    closed forms for normals with a full or low-rank covariance from independent normals and Laplaces, and for
    independent normals from a low-rank normal.

    Args:
        model: a Pyro model.
        guide: the guide of the model.
        args: the arguments of model and guide.

    Returns:
        ``"analytic"`` or ``"Monte Carlo"`` for each latent site, as ``TraceMeanField_ELBO`` would compute it.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> x, normal, heavy = torch.zeros(3, 5), linear.as_vae(), linear.as_vae()
        >>> heavy.prior = pv.priors.StudentT(2)
        >>> kl_provenance(normal.model, normal.guide, x), kl_provenance(heavy.model, heavy.guide, x)
        ({'z': 'analytic'}, {'z': 'Monte Carlo'})
    """
    with torch.no_grad(), poutine.block():
        return _provenance(*traces(model, guide, *args, **kwargs))


def _provenance(model_trace: Trace, guide_trace: Trace) -> dict[str, str]:
    sites = {name: site for name, site in samples(guide_trace) if name in model_trace.nodes}
    return {name: _kind(site["fn"], model_trace.nodes[name]["fn"]) for name, site in sites.items()}


def _kind(q: Any, p: Any) -> str:
    try:
        kl_divergence(q, p)
    except NotImplementedError:
        return "Monte Carlo"
    return "analytic"


def closed_form(name: str, q: Site, p: Site, *, strict: bool) -> Tensor | None:
    """Return the KL of a latent site, of batch shape; None without a closed form if not ``strict``.

    Raises:
        ModelError: if ``strict`` and there is no closed form, or if the scales of the site differ.

    Example:
        >>> import pyro.distributions as dist
        >>> normal = {"fn": dist.Normal(torch.zeros(3), 1.0), "scale": 1.0}
        >>> closed_form("z", normal, normal, strict=True)
        tensor([0., 0., 0.])
    """
    validate_scales(name, q, p)
    try:
        return kl_divergence(q["fn"], p["fn"])
    except NotImplementedError as error:
        if not strict:
            return None
        families = f"{family(q['fn'])} from {family(p['fn'])}"
        raise ModelError(f"the KL of {families} at site {name} has no closed form; use Trace_ELBO") from error


def family(fn: Any) -> str:
    """Return the class name of a distribution without its wrappers."""
    return type(base(fn)).__name__


def base(fn: Any) -> Any:
    """Return a distribution without its ``Independent`` wrappers (``to_event``)."""
    return base(fn.base_dist) if isinstance(fn, Independent) else fn


def validate_scales(name: str, q: Site, p: Site) -> None:
    """Raise an error if a latent site has different scales in model and guide; an analytic KL has one scale."""
    same = q["scale"] == p["scale"]
    if not (same if isinstance(same, bool) else bool(same.all())):
        raise ModelError(
            f"site {name} is scaled by {p['scale']} in the model and by {q['scale']} in the guide; "
            "use the same scale in both"
        )
