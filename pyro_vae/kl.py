"""Kullback-Leibler divergences of latent sites: had in closed form, or sampled?"""

from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch.distributions import Independent, kl_divergence

from pyro_vae.errors import ModelError
from pyro_vae.traces import Program, Site, samples, traces


def kl_provenance(model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Whether Pyro has a closed form for each latent site's KL, or samples it without a word.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: handed to both.

    Returns:
        Per latent site ``"analytic"`` or ``"Monte Carlo"``, as ``TraceMeanField_ELBO`` would treat it.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> x, exact, diagonal = torch.zeros(3, 5), linear.as_vae(), linear.as_vae(diagonal=True)
        >>> kl_provenance(diagonal.model, diagonal.guide, x), kl_provenance(exact.model, exact.guide, x)
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

    Raises:
        ModelError: when called on such a pair.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> vae = linear.as_vae()
        >>> AnalyticKL().loss(vae.model, vae.guide, torch.zeros(3, 5))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: the KL of MultivariateNormal from Normal at site z has no closed form ...
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
        if pair not in self._closed_forms:  # looking costs a KL, so each kind of pair is looked at once
            if _kind(q, p) != "analytic":
                families = f"{family(q)} from {family(p)}"
                raise ModelError(f"the KL of {families} at site {name} has no closed form in Pyro; use Trace_ELBO")
            self._closed_forms.add(pair)


def _structure(fn: Any) -> tuple[Any, ...]:
    return (type(fn), fn.event_dim, *(_structure(fn.base_dist) if isinstance(fn, Independent) else ()))


def family(fn: Any) -> str:
    return type(base(fn)).__name__


def base(fn: Any) -> Any:
    return base(fn.base_dist) if isinstance(fn, Independent) else fn


def refuse_unequal_scales(name: str, q: Site, p: Site) -> None:
    same = q["scale"] == p["scale"]
    if not (same if isinstance(same, bool) else bool(same.all())):
        raise ModelError(
            f"site {name} is scaled by {p['scale']} in the model and by {q['scale']} in the guide; "
            "scale both alike, or the KL is not the one that was meant"
        )
