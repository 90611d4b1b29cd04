"""Kullback-Leibler divergences of latent sites: had in closed form, or sampled?"""

from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
    register_kl,
)

from pyro_vae.errors import ModelError
from pyro_vae.traces import Program, Site, samples, traces


@register_kl(LowRankMultivariateNormal, Independent)
@register_kl(MultivariateNormal, Independent)
def _kl_from_diagonal(q: Any, p: Any) -> Tensor:
    """KL(q ‖ p) of a correlated normal from a diagonal one, such as N(0, I), in nats; Pyro has none.

    .. math:: KL = -H[q] - \\log p(\\mu_q) + \\tfrac12 \\sum_j \\Sigma_{jj} / s_j^2
    """
    fits = isinstance(p.base_dist, Normal) and p.reinterpreted_batch_ndims == 1 and p.event_shape == q.event_shape
    if not fits:
        raise NotImplementedError
    return 0.5 * (q.variance / p.variance).sum(-1) - p.log_prob(q.mean) - q.entropy()


def kl_provenance(model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Whether there is a closed form for each latent site's KL, or Pyro samples it without a word.

    Importing this library adds the normals with a full or low-rank covariance against a diagonal one.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: handed to both.

    Returns:
        Per latent site ``"analytic"`` or ``"Monte Carlo"``, as ``TraceMeanField_ELBO`` would treat it.

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


class AnalyticKL(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, made strict: what it would get silently wrong is refused.

    .. math:: \\mathcal L_i = E_q \\log p(x_i | z) - KL(q(z | x_i) \\,\\|\\, p(z))

    Refused are a KL without a closed form (Pyro samples it instead), a latent site scaled in the
    model but not alike in the guide (Pyro takes the guide's scale and ignores the model's), and
    more than one latent site (where the KL of the sum need not be the sum of the KLs).

    Args:
        args, kwargs: as ``pyro.infer.TraceMeanField_ELBO`` takes them, ``num_particles`` first.
        strict: whether a KL without a closed form is refused; if not, it is sampled, as Pyro does.

    Raises:
        ModelError: when called on such a pair.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> vae = linear.as_vae()
        >>> vae.prior = pv.priors.StudentT(2)
        >>> AnalyticKL().loss(vae.model, vae.guide, torch.zeros(3, 5))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: the KL of MultivariateNormal from StudentT at site z has no closed form ...
    """

    def __init__(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strict = strict
        self._closed_forms: set[Any] = set()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        latents = dict(samples(prune_subsample_sites(guide_trace)))
        if len(latents) != 1:
            raise ModelError(f"AnalyticKL takes one latent site, the guide has {list(latents)}; use Trace_ELBO")
        for name, q in latents.items():
            refuse_unequal_scales(name, q, model_trace.nodes[name])
            self._refuse_sampling(name, q["fn"], model_trace.nodes[name]["fn"])
        return model_trace, guide_trace

    def _refuse_sampling(self, name: str, q: Any, p: Any) -> None:
        pair = (_structure(q), _structure(p))
        if self.strict and pair not in self._closed_forms:  # looking costs a KL, so each kind of pair is looked at once
            if _kind(q, p) != "analytic":
                families = f"{family(q)} from {family(p)}"
                raise ModelError(f"the KL of {families} at site {name} has no closed form; use Trace_ELBO")
            self._closed_forms.add(pair)


def _structure(fn: Any) -> tuple[Any, ...]:
    return (type(fn), fn.event_dim, *(_structure(fn.base_dist) if isinstance(fn, Independent) else ()))


def family(fn: Any) -> str:
    """What a distribution is called, whatever it is wrapped in."""
    return type(base(fn)).__name__


def base(fn: Any) -> Any:
    """A distribution without its ``to_event``."""
    return base(fn.base_dist) if isinstance(fn, Independent) else fn


def refuse_unequal_scales(name: str, q: Site, p: Site) -> None:
    """Refuse a latent site scaled in the model but not alike in the guide: an analytic KL has one scale."""
    same = q["scale"] == p["scale"]
    if not (same if isinstance(same, bool) else bool(same.all())):
        raise ModelError(
            f"site {name} is scaled by {p['scale']} in the model and by {q['scale']} in the guide; "
            "scale both alike, or the KL is not the one that was meant"
        )
